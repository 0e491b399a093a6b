"""One unrolled meta-step with a learned step size for every weight: ours against ``higher`` and a hand-written loop.

    python benchmarks/unroll.py            # about six minutes on one core
    python benchmarks/unroll.py --quick    # about two minutes

A meta-step is T inner steps of gradient descent with step sizes 1/Lambda^2, and the gradient of the final loss with respect to
Lambda. Ours runs through tasks, episodes and ``Unrolled``. All methods compute the same numbers, which is checked first. Times
are process CPU time with one thread, medians (minima in brackets) over runs in which the methods take turns; a ratio is the
median over those runs of the ratio within a turn. Memory is the peak resident set above what the process held before the
first meta-step, each method in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_metaopt import LearnedOptimizer, Unrolled
from lightning_metaopt.differentiable import register_higher
from lightning_metaopt.episode import Episode, start
from lightning_metaopt.models import MLP
from lightning_metaopt.objectives import FinalLoss
from lightning_metaopt.rules import DCOGradient, KroneckerMirror
from lightning_metaopt.tasks import ModuleTask
from lightning_metaopt.tasks.network import Network
from lightning_metaopt.tree import escape

LARGE, TINY = ((784, 100, 100, 10), 128), ((32, 32, 32, 10), 16)  # layers, samples of a minibatch
SCALE = 5.0  # Lambda: step size 0.04
Gradients = list[torch.Tensor]


class FixedBatch(ModuleTask):
    """The same minibatch at every step, so that only the unrolling is timed."""

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        return self.data

    def val_batch(self) -> dict[str, torch.Tensor]:
        return self.data


class Problem:
    """``size`` networks with their minibatches, and the same meta-step written in several ways."""

    def __init__(self, case: tuple[tuple[int, ...], int], size: int) -> None:
        (sizes, samples), generator = case, torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.module = MLP(sizes)
        self.inputs = torch.rand(size, samples, sizes[0], generator=generator)
        self.targets = torch.randint(sizes[-1], (size, samples), generator=generator)
        network = Network(self.module, self.inputs[0, :2])
        data = {"inputs": self.inputs, "targets": self.targets}
        task = FixedBatch(data, {}, network, cross_entropy, samples=samples)
        self.rule = DCOGradient.for_module(self.module, scale=SCALE)
        self.episode: Episode = start(self.rule, task)
        self.names = [f"scale.{escape(name)}" for name in self.episode.params]
        self.scales = [torch.full_like(p, SCALE, requires_grad=True) for p in self.module.parameters()]
        self.mirror = KroneckerMirror.for_module(self.module, lr=1 / SCALE**2)

    def ours(self, steps: int, chunk: int | str | None = "auto") -> Gradients:
        grads = Unrolled(steps, chunk=chunk)(self.rule, self.episode, FinalLoss()).grads
        return [grads[name] for name in self.names]

    def ours_together(self, steps: int) -> Gradients:
        return self.ours(steps, None)

    def ours_one_by_one(self, steps: int) -> Gradients:
        return self.ours(steps, 1)

    def hand_written(self, steps: int) -> Gradients:
        total: Gradients = []
        for index in range(len(self.inputs)):
            inputs, targets = self.inputs[index], self.targets[index]
            params = {name: leaf[index].detach().requires_grad_() for name, leaf in self.episode.params.items()}
            rates = [scale.square().reciprocal() for scale in self.scales]
            for _ in range(steps):
                loss = cross_entropy(functional_call(self.module, params, (inputs,)), targets)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {n: p - r * g for (n, p), r, g in zip(params.items(), rates, grads, strict=True)}
            loss = cross_entropy(functional_call(self.module, params, (inputs,)), targets) / len(self.inputs)
            found = torch.autograd.grad(loss, self.scales)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        return total

    def higher(self, steps: int) -> Gradients:
        import higher

        inputs, targets = self.inputs[0], self.targets[0]
        self.module.load_state_dict({name: leaf[0] for name, leaf in self.episode.params.items()})
        optimizer = torch.optim.SGD([{"params": [p]} for p in self.module.parameters()], lr=1.0)
        rates = {"lr": [scale.square().reciprocal() for scale in self.scales]}
        with higher.innerloop_ctx(self.module, optimizer, override=rates) as (net, inner):
            for _ in range(steps):
                inner.step(cross_entropy(net(inputs), targets))
            return list(torch.autograd.grad(cross_entropy(net(inputs), targets), self.scales))

    def kronecker(self, steps: int) -> Gradients:
        """Another rule, whose meta-gradient is that of ``higher_kronecker``."""
        grads = Unrolled(steps)(self.mirror, self.episode, FinalLoss()).grads
        return [grads[name] for name, _ in self.mirror.named_parameters()]

    def higher_kronecker(self, steps: int) -> Gradients:
        """The same rule through ``higher``, as its users would do it."""
        import higher

        register_higher()
        inputs, targets = self.inputs[0], self.targets[0]
        self.module.load_state_dict({name: leaf[0] for name, leaf in self.episode.params.items()})
        phi = dict(self.mirror.named_parameters())
        optimizer = LearnedOptimizer(self.module.named_parameters(), self.mirror)
        with higher.innerloop_ctx(self.module, optimizer, override={"phi": [phi]}) as (net, inner):
            for _ in range(steps):
                inner.step(cross_entropy(net(inputs), targets))
            return list(torch.autograd.grad(cross_entropy(net(inputs), targets), list(phi.values())))

    def higher_per_tensor(self, steps: int) -> Gradients:
        """An easier problem, for orientation: one step size for each of the six tensors."""
        scales, self.scales = self.scales, [torch.tensor(SCALE, requires_grad=True) for _ in self.scales]
        try:
            return self.higher(steps)
        finally:
            self.scales = scales


def take_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of every method, in turns, after two turns that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            before = time.process_time()
            run()
            if turn >= 2:
                found[name].append(1e3 * (time.process_time() - before))
    return found


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def resident_mb(peak: bool = False) -> float:
    """Resident set of this process, or its peak since the process began its own program (Linux)."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10


def print_added_memory(case: str, size: int, method: str, steps: int) -> None:
    """For a process of its own: peak resident set above that before the first meta-step, in MB."""
    getattr(Problem(TINY, 1), method)(1)  # loads everything that is loaded once
    problem = Problem(LARGE if case == "large" else TINY, size)
    before = resident_mb()
    for _ in range(3):
        getattr(problem, method)(steps)
    print(resident_mb(peak=True) - before)


def added_memory(case: str, size: int, method: str, steps: int, repeats: int) -> float:
    command = [sys.executable, __file__, "--memory", case, str(size), method, str(steps)]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(repeats)]
    return statistics.median(float(output) for output in outputs)


def table(title: str, case: str, size: int, methods: list[str], steps: int, repeats: int, base: list[str]) -> None:
    problem = Problem(LARGE if case == "large" else TINY, size)
    runs = {name: lambda name=name: getattr(problem, name)(steps) for name in methods}
    expected = runs[base[0]]()
    for name in methods:
        if name != "higher_per_tensor":
            torch.testing.assert_close(runs[name](), expected, rtol=1e-3, atol=1e-6)
    times = take_turns(runs, repeats)
    memory = {name: added_memory(case, size, name, steps, 1 if repeats < 10 else 3) for name in methods}
    print(f"\n{title}, T = {steps}\n")
    print("| method | CPU ms | added MB |", *(f"time / {b} | MB / {b} |" for b in base))
    print("| --- | --- | --- |", *("--- | --- |" for _ in base))
    for name in methods:
        row = f"| {name.replace('_', ' ')} | {statistics.median(times[name]):.1f} ({min(times[name]):.1f}) | {memory[name]:.0f} |"
        print(row, *(f"{ratio(times, name, b):.2f} | {memory[name] / memory[b]:.2f} |" for b in base), flush=True)


def kronecker(repeats: int) -> None:
    title = "KroneckerMirror: MLP 784-100-100-10, batch 128"
    table(title, "large", 1, ["kronecker", "higher_kronecker"], 20, repeats, ["higher_kronecker"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--kronecker", action="store_true", help="only the table of KroneckerMirror")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="higher")
    if options.memory:
        case, size, method, steps = options.memory
        print_added_memory(case, int(size), method, int(steps))
        return
    if options.kronecker:
        kronecker(5 if options.quick else 20)
        return
    print(f"torch {torch.__version__}, one thread; step sizes for all weights, gradient of the final loss")
    for steps in (1, 5, 20):
        repeats = 5 if options.quick else {1: 60, 5: 30, 20: 20}[steps]
        methods = ["ours", "hand_written", "higher", "higher_per_tensor"]
        table("One problem: MLP 784-100-100-10, batch 128", "large", 1, methods, steps, repeats, ["hand_written", "higher"])
    kronecker(5 if options.quick else 20)
    methods = ["ours", "ours_together", "ours_one_by_one", "hand_written"]
    for steps in (5, 20):
        repeats = 5 if options.quick else 10
        table("16 problems: MLP 32-32-32-10, batch 16", "tiny", 16, methods, steps, repeats, ["hand_written"])
    repeats = 2 if options.quick else 5
    table("16 problems: MLP 784-100-100-10, batch 128", "large", 16, methods, 5, repeats, ["hand_written"])
    table("One problem: MLP 32-32-32-10, batch 16", "tiny", 1, methods, 20, 10, ["hand_written"])


if __name__ == "__main__":
    main()
