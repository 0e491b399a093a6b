"""Learning step sizes online: what a step costs in time and memory, and how much the initial learning rate still matters.

    python benchmarks/online.py                        # everything, about 15 minutes on one core
    python benchmarks/online.py --parts step tiny      # some parts: step, memory, tiny, robust
    python benchmarks/online.py --quick                # 1 million parameters, few rounds, one seed

``step`` times ``optimizer.step()`` on 10 million parameters, all methods in one process on the same parameters, in turn, so that
other load on the machine meets all alike; ratios are medians of the ratios within a round. ``memory`` counts in a process of its
own for each method the bytes of all tensors but parameters and gradients after three steps, and how far the peak of the process
lies above what it had before the first step. ``tiny`` trains a module of 4 small tensors in a ``Trainer`` with and without
callback. ``robust`` trains a perceptron on digits from 0.01 to 100 times a method's tuned starting point. Time is CPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from online_robustness import followed, robust
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_metaopt import baselines
from lightning_metaopt.callbacks import HypergradientDescent, OptimisticMetaGrad

PARTS = ("step", "memory", "tiny", "robust")


# ------------------------------------------------------------------------------------------------------------------- one step
def with_sgd(make: Any, **options: Any) -> Callable[[Any], Optimizer]:
    return followed(lambda o: make.attach(o, **options), lambda p: SGD(p, 1e-4, foreach=True))


STEPS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW, fused": lambda p: AdamW(p, 1e-5, fused=True),
    "SGD, foreach": lambda p: SGD(p, 1e-4, foreach=True),
    "OptimisticMetaGrad, element, compiled": with_sgd(OptimisticMetaGrad, compile=True),
    "OptimisticMetaGrad, element, blocks": with_sgd(OptimisticMetaGrad, compile=False),
    "OptimisticMetaGrad, tensor, compiled": with_sgd(OptimisticMetaGrad, scope="tensor", compile=True),
    "OptimisticMetaGrad, tensor, blocks": with_sgd(OptimisticMetaGrad, scope="tensor", compile=False),
    "OptimisticMetaGrad, optimizer, compiled": with_sgd(OptimisticMetaGrad, scope="optimizer", compile=True),
    "OptimisticMetaGrad, optimizer, blocks": with_sgd(OptimisticMetaGrad, scope="optimizer", compile=False),
    "HypergradientDescent, compiled": with_sgd(HypergradientDescent, meta_lr=1e-12, compile=True),
    "HypergradientDescent, blocks": with_sgd(HypergradientDescent, meta_lr=1e-12, compile=False),
    "Prodigy": baselines.Prodigy,
    "DAdaptSGD": baselines.DAdaptSGD,
    "DAdaptAdam": baselines.DAdaptAdam,
    "DoG": baselines.DoG,
    "Mechanic (SGD)": baselines.Mechanic,
    "ScheduleFreeSGD": lambda p: baselines.ScheduleFreeSGD(p, lr=1e-4),
    "ScheduleFreeAdamW": lambda p: baselines.ScheduleFreeAdamW(p, lr=1e-5),
}


def parameters(width: int) -> list[nn.Parameter]:
    """Weights and biases of an MLP with gradients."""
    sizes = [784, width, width * 2 // 3, width // 4, 10]
    shapes = [shape for i, o in pairwise(sizes) for shape in ((i, o), (o,))]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def made(name: str, params: list[nn.Parameter]) -> Optimizer:
    optimizer = STEPS[name](params)
    if isinstance(optimizer, (baselines.ScheduleFreeSGD, baselines.ScheduleFreeAdamW)):
        optimizer.train()
    return optimizer


def step(width: int, rounds: int) -> None:
    params = parameters(width)
    optimizers = {name: made(name, params) for name in STEPS}
    starts = {}
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for turn in range(rounds + 3):
        for name, optimizer in optimizers.items():
            begin, wall = time.process_time(), time.perf_counter()
            optimizer.step()
            if turn >= 3:  # the first ones make the state and compile
                times[name].append(1e3 * (time.process_time() - begin))
            else:
                starts[name] = starts.get(name, 0.0) + time.perf_counter() - wall
    assert all(torch.isfinite(p).all() for p in params)
    print(f"#### A step on {sum(p.numel() for p in params) / 1e6:.2f} million float32 parameters, {rounds} rounds\n")
    print("| method | CPU-ms, median (quartiles) | / fused AdamW (quartiles) | / SGD | first three steps, wall s |")
    print("| --- | --- | --- | --- | --- |")
    for name, own in times.items():
        low, middle, high = statistics.quantiles(own, n=4)
        against = [statistics.quantiles([a / b for a, b in zip(own, times[other], strict=True)], n=4) for other in list(STEPS)[:2]]
        (a, b, c), (_, sgd, _) = against
        print(
            f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {b:.2f} ({a:.2f} to {c:.2f}) | {sgd:.1f} | {starts[name]:.1f} |"
        )
    print(flush=True)


# --------------------------------------------------------------------------------------------------------------------- memory
def bytes_of_tensors() -> int:
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident(which: str) -> int:
    """``VmRSS``, the memory of the process now, or ``VmHWM``, its peak, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def memory_of(name: str, width: int) -> None:
    """In a process of its own, on Linux."""
    params = parameters(width)
    gc.collect()
    before, start = bytes_of_tensors(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    optimizer = made(name, params)
    for _ in range(3):
        optimizer.step()
    gc.collect()
    count = sum(p.numel() for p in params)
    print(json.dumps([(bytes_of_tensors() - before) / count, (resident("VmHWM") - start) / count]))


def memory(width: int) -> None:
    print("#### Memory, bytes for each parameter\n\n| method | state | peak of the process above its start |\n| --- | --- | --- |")
    for name in STEPS:
        command = [sys.executable, __file__, "--child", name, "--width", str(width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        state, peak = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {name} | {state:.1f} | {peak:.0f} |", flush=True)
    print()


# ---------------------------------------------------------------------------------------------------------------- tiny modules
class Tiny(LightningModule):
    """Two layers of 32 and 2 units on batches of 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), 0.01)


class Clock(Callback):
    """CPU time from the 20th step on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 20:
            self.begin = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.spent = time.process_time() - self.begin


class Bare(Callback):
    """The least that such a step takes: the same rule for these four tensors alone, with no check but that numbers are finite, no
    options, schedules, limits of steps, logs or checkpoints.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        params = list(pl_module.parameters())
        self.rows = [param.detach().view(-1) for param in params]
        self.past, self.log, self.mean, self.square = (torch.zeros_like(torch.cat(self.rows)) for _ in range(4))
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        self.old = torch.cat(self.rows)

    @torch.no_grad()
    def after(self, optimizer: Optimizer, *_: Any) -> None:
        lr = optimizer.param_groups[0]["lr"]
        param = torch.cat(self.rows)
        grad = torch.cat([param.grad.view(-1) for param in optimizer.param_groups[0]["params"]])
        if not math.isfinite(torch.dot(param, grad).item()):
            return
        increase = grad * self.past
        torch.sub(self.old, param, out=self.past).div_(lr)
        increase.addcmul_(grad, self.past, value=0.5).clamp_(-1e18, 1e18)
        self.mean.lerp_(increase, 0.1)
        self.square.mul_(0.999).addcmul_(increase, increase, value=0.001)
        self.log.addcdiv_(self.mean, self.square.sqrt().mul_(2e3).add_(1e-20)).clamp_(-9, 9)
        step = self.past * self.log.exp()
        torch.add(self.old, step, alpha=-lr, out=param)
        self.lengths = torch.dot(step, step).item(), torch.dot(self.old, self.old).item()
        for row, part in zip(self.rows, param.split([row.numel() for row in self.rows]), strict=True):
            row.copy_(part)


TINY: dict[str, Callable[[], list[Callback]]] = {
    "no callback": list,
    "a callback that does nothing": lambda: [Callback()],
    "the bare operations of the element-wise rule": lambda: [Bare()],
    "OptimisticMetaGrad, element": lambda: [OptimisticMetaGrad()],
    "OptimisticMetaGrad, tensor": lambda: [OptimisticMetaGrad(scope="tensor")],
    "OptimisticMetaGrad, optimizer": lambda: [OptimisticMetaGrad(scope="optimizer")],
    "HypergradientDescent": lambda: [HypergradientDescent(1e-4)],
}


def tiny(rounds: int, steps: int = 220) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4 * steps, 32)), batch_size=4)
    times: dict[str, list[float]] = {name: [] for name in TINY}
    for turn in range(rounds + 1):
        for name, make in TINY.items():
            clock = Clock()
            trainer = Trainer(
                max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[*make(), clock], barebones=False, **quiet
            )
            trainer.fit(Tiny(), batches)
            if turn:
                times[name].append(1e6 * clock.spent / (steps - 20))
    print(f"#### A Trainer's step on a tiny module (4 tensors, 1,122 parameters), {rounds} rounds of {steps - 20} steps\n")
    print("| | CPU-us a step, median (quartiles) | added, median of rounds (quartiles) |\n| --- | --- | --- |")
    for name, own in times.items():
        low, middle, high = statistics.quantiles(own, n=4)
        a, b, c = statistics.quantiles([100 * (x / y - 1) for x, y in zip(own, times["no callback"], strict=True)], n=4)
        shown = "" if name == "no callback" else f"{b:.0f} % ({a:.0f} to {c:.0f})"
        print(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {shown} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="1 million parameters, few rounds, one seed")
    parser.add_argument("--rounds", type=int, default=15, help="how often each optimizer is stepped, each module trained")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="of each training on digits")
    parser.add_argument("--width", type=int, default=3150, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.quick:
        args.width, args.rounds, args.seeds, args.steps = 800, 4, 1, 100
    if args.child:
        memory_of(args.child, args.width)
        return
    print(f"torch {torch.__version__}, one thread\n")
    if "step" in args.parts:
        step(args.width, args.rounds)
    if "memory" in args.parts:
        memory(args.width)
    if "tiny" in args.parts:
        tiny(args.rounds)
    if "robust" in args.parts:
        robust(args.seeds, args.steps)


if __name__ == "__main__":
    main()
