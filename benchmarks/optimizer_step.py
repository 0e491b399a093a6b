"""Time of one ``optimizer.step()``: learned optimizers beside those of ``torch.optim``, on 10 million parameters.

    python benchmarks/optimizer_step.py            # about 10 seconds on one core
    python benchmarks/optimizer_step.py --quick    # 1 million parameters, 5 rounds

All optimizers run in one process on the same shapes, in turn, so that other load on the machine meets all of them alike.
A round steps each optimizer once; reported is the median of its CPU time over the rounds (with quartiles), its ratio to the
partner in ``torch.optim`` (median of the ratios within a round), and the bytes that have to move for each parameter when
nothing stays in cache: 4 for each tensor that is read or written once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import lightning_metaopt as lmo

Maker = Callable[[list[nn.Parameter]], Optimizer]

# (name, partner in this list, bytes for each parameter, maker)
CASES: list[tuple[str, str | None, str, Maker]] = [
    ("torch SGD (foreach)", None, "12: g, p > p", lambda p: SGD(p, 0.01, foreach=True)),
    (
        "LearnedOptimizer, GradientDescent",
        "torch SGD (foreach)",
        "16: check g; g, p > p",
        lambda p: lmo.LearnedOptimizer(p, lmo.rules.GradientDescent()),
    ),
    (
        "torch SGD momentum (foreach)",
        None,
        "32: v > v; g, v > v; v, p > p",
        lambda p: SGD(p, 0.01, momentum=0.9, foreach=True),
    ),
    (
        "LearnedOptimizer, HeavyBall",
        "torch SGD momentum (foreach)",
        "28: check g; g, v > v; v, p > p",
        lambda p: lmo.LearnedOptimizer(p, lmo.rules.HeavyBall()),
    ),
    ("torch Adam (foreach)", None, "72: seven passes, one temporary", lambda p: Adam(p, foreach=True)),
    ("torch Adam (fused)", None, "28: g, m, v, p > m, v, p", lambda p: Adam(p, fused=True)),
    (
        "LearnedOptimizer, Adam",
        "torch Adam (fused)",
        "32: check g; g, m, v, p > m, v, p",
        lambda p: lmo.LearnedOptimizer(p, lmo.rules.Adam()),
    ),
]


def parameters(width: int) -> list[nn.Parameter]:
    """Weights and biases of an MLP with gradients."""
    sizes = [784, width, width * 2 // 3, width // 4, 10]
    shapes = [shape for i, o in pairwise(sizes) for shape in ((i, o), (o,))]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 million parameters, 5 rounds")
    parser.add_argument("--rounds", type=int, default=25, help="how often each optimizer is stepped")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    width, rounds = (800, 5) if args.quick else (3150, args.rounds)
    params = parameters(width)
    optimizers = {name: make(params) for name, _, _, make in CASES}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            begin = time.process_time()
            optimizer.step()
            if turn >= 2:  # the first ones make the state
                times[name].append(1e3 * (time.process_time() - begin))
    count = sum(p.numel() for p in params)
    print(f"{count / 1e6:.2f} million float32 parameters, {args.threads} thread(s), {rounds} rounds, torch {torch.__version__}\n")
    print("| optimizer | CPU-ms, median (quartiles) | ratio to its partner | bytes per parameter |")
    print("| --- | --- | --- | --- |")
    for name, partner, bytes_moved, _ in CASES:
        low, middle, high = statistics.quantiles(times[name], n=4)
        ratio = "" if partner is None else statistics.median(a / b for a, b in zip(times[name], times[partner], strict=True))
        shown = f"{ratio:.2f}" if partner else "1"
        print(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {shown} | {bytes_moved} |")


if __name__ == "__main__":
    main()
