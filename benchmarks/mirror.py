"""Time of one ``KroneckerMirror`` step beside the optimizers of ``torch.optim``, on the parameters of a ResNet-18.

    python benchmarks/mirror.py               # one minute on one core
    python benchmarks/mirror.py --quick       # 5 rounds
    python benchmarks/mirror.py --iteration   # whole training iterations (forward, backward, step) instead, several minutes

All optimizers step the same 62 tensors (11.2 million numbers) in one process, in turn and in an order that rotates, so that other
load on the machine meets all of them alike. Reported is the median of the CPU time over the rounds (with quartiles), and the median
of its ratio to momentum within a round.

What has to move for each number of the network, counted before anything was measured:

- momentum (foreach): ``v *= mu`` (v > v), ``v += g`` (g, v > v), ``p -= lr v`` (v, p > p): 32 bytes, 5 operations.
- KroneckerMirror of rank r: the check that gradients are finite (g), ``G a`` and ``b' G`` (g, once for both where a block of rows
  stays in cache), ``p -= rate (G - L R)`` (g, p > p): 20 bytes, 8 r + 4 operations. Block by block is what saves it from 32 bytes.

By bytes it would be cheaper than momentum; thin products of matrices do not reach the speed of memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import lightning_metaopt as lmo
from lightning_metaopt.models import ResNet18
from lightning_metaopt.rule import Rule

Maker = Callable[[nn.Module], Optimizer]


class Plain(Optimizer):
    """The pure form of a rule, without the in-place path: what the fast path is compared with."""

    def __init__(self, net: nn.Module, rule: Rule) -> None:
        self.rule, self.named = rule, dict(net.named_parameters())
        super().__init__(list(self.named.values()), {})
        self.memory = rule.init({name: p.detach()[None] for name, p in self.named.items()})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # no closure here
        grads = {name: p.grad[None] for name, p in self.named.items() if p.grad is not None}
        params = {name: p.detach()[None] for name, p in self.named.items()}
        updates, self.memory = self.rule(grads, self.memory, params)
        for name, update in updates.items():
            self.named[name].add_(update[0])


def mirror(net: nn.Module, **options: object) -> Rule:
    return lmo.rules.KroneckerMirror.for_module(net, lr=1e-4, **options)


BASE = "torch SGD, momentum 0.9 (foreach)"
CASES: dict[str, Maker] = {
    BASE: lambda net: SGD(net.parameters(), 1e-4, momentum=0.9, foreach=True),
    "torch SGD, momentum 0.9 (fused)": lambda net: SGD(net.parameters(), 1e-4, momentum=0.9, fused=True),
    "torch SGD (foreach)": lambda net: SGD(net.parameters(), 1e-4, foreach=True),
    "HeavyBall": lambda net: lmo.LearnedOptimizer(net.named_parameters(), lmo.rules.HeavyBall(1e-4)),
    "KroneckerMirror": lambda net: lmo.LearnedOptimizer(net.named_parameters(), mirror(net)),
    "KroneckerMirror, rank 4": lambda net: lmo.LearnedOptimizer(net.named_parameters(), mirror(net, rank=4)),
    "KroneckerMirror, momentum": lambda net: lmo.LearnedOptimizer(net.named_parameters(), mirror(net, momentum=0.9)),
    "KroneckerMirror, eager twin": lambda net: Plain(net, mirror(net)),
}


def steps(net: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Callable[[], None]]:
    """One step on gradients that stay as they are."""
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def iterations(net: nn.Module, optimizers: dict[str, Optimizer], batch: int) -> dict[str, Callable[[], None]]:
    """Forward, backward and step."""
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def whole(optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return {name: lambda optimizer=optimizer: whole(optimizer) for name, optimizer in optimizers.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--rounds", type=int, help="how often each optimizer is stepped; 40, or 10 iterations")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--iteration", action="store_true", help="time forward, backward and step together")
    parser.add_argument("--batch", type=int, default=16, help="images of an iteration")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rounds = 5 if args.quick else args.rounds or (10 if args.iteration else 40)
    net = ResNet18(classes=10)
    chosen = [BASE, "torch SGD (foreach)", "KroneckerMirror"] if args.iteration else list(CASES)
    optimizers = {name: CASES[name](net) for name in chosen}
    work = iterations(net, optimizers, args.batch) if args.iteration else steps(net, optimizers)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(rounds + 2):
        shift = turn % len(chosen)
        for name in chosen[shift:] + chosen[:shift]:
            begin = time.process_time()
            work[name]()
            if turn >= 2:  # the first ones make the state
                times[name].append(1e3 * (time.process_time() - begin))
    count = sum(p.numel() for p in net.parameters())
    print(
        f"ResNet-18, {len(list(net.parameters()))} tensors, {count / 1e6:.2f} million float32 parameters, "
        f"{args.threads} thread(s), {rounds} rounds, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print("| optimizer | CPU-ms, median (quartiles) | ratio to momentum, median (quartiles) |\n| --- | --- | --- |")
    for name in chosen:
        low, middle, high = statistics.quantiles(times[name], n=4)
        below, ratio, above = statistics.quantiles([a / b for a, b in zip(times[name], times[BASE], strict=True)], n=4)
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} ({below:.2f} to {above:.2f}) |")


if __name__ == "__main__":
    main()
