"""Time of M-L2O's optimizer beside peers: windows of meta-training, and steps when deployed.

    python benchmarks/ml2o.py             # about two minutes on one core
    python benchmarks/ml2o.py --quick     # fewer turns
    python benchmarks/ml2o.py --only window

**Window**: the gradient of the sum of losses over T = 20 steps on 128 LASSO problems of 10 coordinates, with respect to an RNNprop
of one layer of 20 units: ours, and ``torch.nn.LSTMCell`` in a plain unroll, each with inner gradients held constant (first
order) and differentiated (second order); the same network through ``higher`` (second order: it has no other exact mode that
is one graph); and three replicas with 128 problems each at once. That all compute the same gradient is checked first.

**Deployment**: ``LearnedOptimizer`` with RNNprop on a module's parameters: time of a step for each parameter, and, in a process of
its own for each, the growth of peak memory from before the optimizer is made, for each parameter.

CPU time of the process, one thread; within a turn each goes once, in an order that rotates; medians over turns, and medians of the
ratios within a turn. The C library is told to keep memory that is freed: otherwise some rows pay for pages that other rows have
given back to the system. ``--trim`` leaves it as it is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import higher
import torch
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, start
from lightning_metaopt.objectives import Objective, PerReplica, SumLoss
from lightning_metaopt.rule import Rule
from lightning_metaopt.rules import RNNprop, Stacked
from lightning_metaopt.task import Task

STEPS, PROBLEMS = 20, 128
KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}


class Plain(nn.Module):
    """RNNprop as one would write it down: coordinates are rows, the cell is PyTorch's."""

    def __init__(self, rule: RNNprop) -> None:
        super().__init__()
        hidden = rule.hidden
        self.enter, self.cell, self.leave = nn.Linear(2, hidden), nn.LSTMCell(hidden, hidden), nn.Linear(hidden, 1)
        ours = rule.cells[0]
        pairs = [
            (self.enter.weight, rule.in_weight),
            (self.enter.bias, rule.in_bias),
            (self.cell.weight_ih, ours.weight_input),
            (self.cell.weight_hh, ours.weight_hidden),
            (self.cell.bias_ih, ours.bias),
            (self.leave.weight, rule.out_weight),
            (self.leave.bias, rule.out_bias),
        ]
        with torch.no_grad():
            self.cell.bias_hh.zero_()
            for mine, theirs in pairs:
                mine.copy_(theirs)
        self.beta1, self.beta2, self.eps, self.scale = rule.beta1, rule.beta2, rule.eps, rule.scale
        self.hidden = hidden

    def begin(self, x: Tensor) -> list[Tensor]:
        count = x.numel()
        return [torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(count, self.hidden), x.new_zeros(count, self.hidden)]

    def step(self, grad: Tensor, state: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
        mean = self.beta1 * state[0] + (1 - self.beta1) * grad
        square = self.beta2 * state[1] + (1 - self.beta2) * grad.square()
        root = (square / (1 - self.beta2**count)).sqrt() + self.eps
        features = torch.stack([mean / (1 - self.beta1**count) / root, grad / root], -1).view(-1, 2)
        h, c = self.cell(nn.functional.elu(self.enter(features)), (state[2], state[3]))
        return self.scale * torch.tanh(self.leave(h)).view_as(grad), [mean, square, h, c]


def plain_window(plain: Plain, task: Task, x: Tensor, second: bool) -> tuple[Tensor, ...]:
    """The gradient by a loop over steps and one call of autograd."""
    state, total, x = plain.begin(x), x.new_zeros(()), x.clone().requires_grad_()
    for count in range(1, STEPS + 1):
        loss = task.loss({"theta": x}, {}, task.batch(0))
        total = total + loss.mean()
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=second, retain_graph=True)
        update, state = plain.step(grad if second else grad.detach(), state, count)
        x = x + update
    total = total + task.loss({"theta": x}, {}, task.batch(0)).mean()
    return torch.autograd.grad(total, list(plain.parameters()))


class Point(nn.Module):
    """The problems' variables as the parameters of a module, for ``higher``."""

    def __init__(self, task: Task, x: Tensor) -> None:
        super().__init__()
        self.task, self.theta = task, nn.Parameter(x.clone())

    def forward(self) -> Tensor:
        return self.task.loss({"theta": self.theta}, {}, self.task.batch(0))


class Holder(torch.optim.SGD):
    """Tells ``higher`` which parameters take the steps."""


class Steps(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]  # higher has no types
    """:class:`Plain` as ``higher`` has optimizers."""

    plain: Plain
    memory: list[Tensor]
    count = 0

    def _update(self, grouped_grads: list[list[Tensor]], **options: object) -> None:
        grad = grouped_grads[0][0]
        if not self.count:
            self.memory = self.plain.begin(grad.detach())
        self.count += 1
        update, self.memory = self.plain.step(grad, self.memory, self.count)
        self.param_groups[0]["params"][0] = self.param_groups[0]["params"][0] + update


higher.register_optim(Holder, Steps)


def higher_window(plain: Plain, task: Task, x: Tensor) -> tuple[Tensor, ...]:
    """The second-order gradient through ``higher``."""
    net = Point(task, x)
    with higher.innerloop_ctx(net, Holder(net.parameters(), lr=1.0)) as (inner, steps):
        steps.plain = plain
        total = x.new_zeros(())
        for _ in range(STEPS):
            loss = inner()
            total = total + loss.mean()
            steps.step(loss.sum())
        total = total + inner().mean()
        return torch.autograd.grad(total, list(plain.parameters()))


Window = Callable[[], tuple[Tensor, ...] | list[Tensor]]


def windows(problems: int = PROBLEMS) -> dict[str, Window]:
    """What is compared, on the same problems from the same start, after a check that the gradients agree."""
    rule = RNNprop(seed=0)
    plain = Plain(rule)
    task = lmo.tasks.Lasso().draw(seed=0, size=problems)
    begin = start(rule, task)
    x = begin.params["theta"]
    stacked = Stacked([RNNprop(seed=seed) for seed in range(3)])
    thrice = start(stacked, lmo.tasks.Repeated(lmo.tasks.Lasso(), 3).draw(seed=0, size=3 * problems))

    def ours(which: Rule, episode: Episode, objective: Objective, first_order: bool) -> Window:
        metagrad = lmo.Unrolled(STEPS, first_order=first_order)
        return lambda: list(metagrad(which, episode, objective).grads.values())

    made: dict[str, Window] = {}
    for order, first in (("first", True), ("second", False)):
        made[f"{order} order, ours"] = ours(rule, begin, SumLoss(), first)
        made[f"{order} order, nn.LSTMCell"] = lambda first=first: plain_window(plain, task, x, not first)  # type: ignore[misc]
        made[f"{order} order, ours, three replicas"] = ours(stacked, thrice, PerReplica("sum", 3), first)
    made["second order, higher"] = lambda: higher_window(plain, task, x)
    for order, others in (("first", ["nn.LSTMCell"]), ("second", ["nn.LSTMCell", "higher"])):
        mine = norm(made[f"{order} order, ours"]())
        for other in others:
            theirs = norm(made[f"{order} order, {other}"]())
            assert abs(mine - theirs) < 1e-3 * mine, (order, other, mine, theirs)
    return made


def norm(gradient: tuple[Tensor, ...] | list[Tensor]) -> float:
    """Of all that is not a second copy of the bias, which PyTorch's cell has."""
    seen: list[Tensor] = []
    for leaf in gradient:
        if not any(leaf.shape == other.shape and torch.equal(leaf, other) for other in seen):
            seen.append(leaf)
    return float(torch.stack([leaf.norm() for leaf in seen]).norm())


def report_windows(turns: int, problems: int) -> None:
    made = windows(problems)
    names = list(made)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.process_time()
            made[name]()
            if turn:
                times[name].append(1e3 * (time.process_time() - begin))
    partners = {
        "first order, ours": ["first order, nn.LSTMCell"],
        "second order, ours": ["second order, nn.LSTMCell", "second order, higher"],
        "first order, ours, three replicas": ["first order, ours"],
        "second order, ours, three replicas": ["second order, ours"],
    }
    print(f"{turns} turns, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| window | CPU-ms, median (quartiles) | ratio, median (quartiles) |\n| --- | --- | --- |")
    for name in names:
        shown = []
        for partner in partners.get(name, []):
            low, middle, high = statistics.quantiles([a / b for a, b in zip(times[name], times[partner], strict=True)], n=4)
            shown.append(f"{middle:.2f} ({low:.2f} to {high:.2f}) of {partner.partition(', ')[2]}")
        low, middle, high = statistics.quantiles(times[name], n=4)
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {'; '.join(shown)} |")


def report_parts(repeats: int = 300) -> None:
    """What every way has to do in the 20 steps of a window, in milliseconds of CPU time: products and the problems' derivatives."""
    joint, slopes, weight = torch.randn(40, 10 * PROBLEMS), torch.randn(80, 10 * PROBLEMS), torch.randn(80, 40)
    task = lmo.tasks.Lasso().draw(seed=0, size=PROBLEMS)
    x = task.data["start"].clone().requires_grad_()

    def gradient(graph: bool) -> Tensor:
        return torch.autograd.grad(task.loss({"theta": x}, {}, task.batch(0)).sum(), x, create_graph=graph)[0]

    parts: dict[str, Callable[[], object]] = {
        "three products of matrices": lambda: (weight @ joint, weight.mT @ slopes, joint @ slopes.mT),
        "gradients of the problems": lambda: gradient(False),
        "gradients and products with Hessians": lambda: torch.autograd.grad((gradient(True) * task.data["start"]).sum(), x),
    }
    for name, part in parts.items():
        for _ in range(repeats // 10):
            part()
        begin = time.process_time()
        for _ in range(repeats):
            part()
        print(f"{name}: {1e3 * STEPS * (time.process_time() - begin) / repeats:.1f} ms")


def deployed(count: int, bf16: bool) -> tuple[lmo.LearnedOptimizer, list[nn.Parameter]]:
    side = int(count**0.5)
    params = [nn.Parameter(torch.randn(side, side)), nn.Parameter(torch.randn(count - side * side))]
    for param in params:
        param.grad = torch.randn_like(param)
    return lmo.LearnedOptimizer(params, RNNprop(seed=0, bf16=bf16)), params


def peak_bytes() -> int:
    # Linux; getrusage would count what the process that started this one had.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def memory(count: int, bf16: bool) -> None:
    """In a process of its own: growth of the peak of resident memory, in bytes for each parameter."""
    small, _ = deployed(10_000, bf16)  # libraries and their buffers
    small.step()
    params = [nn.Parameter(torch.randn(count))]
    params[0].grad = torch.randn_like(params[0])
    before = peak_bytes()
    optimizer = lmo.LearnedOptimizer(params, RNNprop(seed=0, bf16=bf16))
    for _ in range(3):
        optimizer.step()
    print((peak_bytes() - before) / count)


def report_deployment(turns: int, counts: list[int]) -> None:
    kinds = [(count, bf16) for count in counts for bf16 in (False, True)]
    optimizers = {kind: deployed(*kind)[0] for kind in kinds}
    times: dict[tuple[int, bool], list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        for kind in kinds:
            begin = time.process_time()
            optimizers[kind].step()
            if turn:
                times[kind].append(1e6 * (time.process_time() - begin) / kind[0])
    print("\n| parameters | state | microseconds a parameter and step, median (quartiles) | bytes a parameter at the peak |")
    print("| --- | --- | --- | --- |")
    for count, bf16 in kinds:
        low, middle, high = statistics.quantiles(times[count, bf16], n=4)
        command = [sys.executable, __file__, "--memory", str(count), *(["--bf16"] if bf16 else [])]
        usual = {name: value for name, value in os.environ.items() if name not in KEEP}
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=usual).stdout
        kind = "bfloat16" if bf16 else "float32"
        print(f"| {count:,} | {kind} | {middle:.3f} ({low:.3f} to {high:.3f}) | {float(found):.0f} |")


def keep_memory() -> None:
    """Begin anew with a C library that gives no memory back (glibc reads these variables when a process starts)."""
    if KEEP.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 turns")
    parser.add_argument("--turns", type=int, default=25, help="turns that count")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of a window; with 1 nothing is left but the cost of calls")
    parser.add_argument(
        "--only", choices=["window", "deployment", "parts"], help="one part; the last is what all windows have to do"
    )
    parser.add_argument("--trim", action="store_true", help="let the C library give memory back, as it does on its own")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.memory:
        memory(args.memory, args.bf16)
        return
    if not args.trim:
        keep_memory()
    turns = 5 if args.quick else args.turns
    if args.only == "parts":
        report_parts()
        return
    if args.only != "deployment":
        report_windows(turns, args.problems)
    if args.only != "window":
        report_deployment(max(3, turns // 3), [100_000, 300_000, 1_000_000])


if __name__ == "__main__":
    main()
