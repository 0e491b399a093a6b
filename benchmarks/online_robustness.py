"""How much the initial learning rate still matters to methods that learn it; part of ``online.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lightning_metaopt import baselines
from lightning_metaopt.callbacks import HypergradientDescent, OptimisticMetaGrad
from lightning_metaopt.data import Digits
from lightning_metaopt.models import MLP

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)


def followed(attach: Callable[[Optimizer], Any], base: Callable[[Any], Optimizer]) -> Callable[[Any], Optimizer]:
    """An optimizer that an engine follows; the engine is kept alive by the optimizer's hooks."""

    def make(params: Any) -> Optimizer:
        optimizer = base(params)
        attach(optimizer)
        return optimizer

    return make


def scaled(make: Any, option: str, value: float, **others: Any) -> Callable[[float], Callable[[Any], Optimizer]]:
    return lambda factor: lambda p: make(p, **{option: factor * value}, **others)


def attached(make: Any, **options: Any) -> Callable[[float], Callable[[float], Callable[[Any], Optimizer]]]:
    return lambda lr: lambda factor: followed(lambda o: make.attach(o, **options), lambda p: SGD(p, factor * lr))


GRID = [10 ** (k / 2) for k in range(-8, 3)]
# What starts a method: a learning rate, which is tuned, or the first guess of a distance or a scale, which is left as published.
TUNED: dict[str, Any] = {
    "SGD": (lambda lr: scaled(SGD, "lr", lr), "lr"),
    "AdamW": (lambda lr: scaled(AdamW, "lr", lr), "lr"),
    "ScheduleFreeSGD": (lambda lr: scaled(baselines.ScheduleFreeSGD, "lr", lr), "lr"),
    "ScheduleFreeAdamW": (lambda lr: scaled(baselines.ScheduleFreeAdamW, "lr", lr), "lr"),
}
FROM_SGD: dict[str, Any] = {
    "OptimisticMetaGrad, element": attached(OptimisticMetaGrad),
    "OptimisticMetaGrad, tensor": attached(OptimisticMetaGrad, scope="tensor"),
    "OptimisticMetaGrad, optimizer": attached(OptimisticMetaGrad, scope="optimizer"),
    "Mechanic (SGD)": lambda lr: lambda factor: lambda p: baselines.Mechanic(p, base=lambda q: SGD(q, factor * lr)),
}
HYPER = {f"HypergradientDescent, {form}": form for form in ("additive", "multiplicative")}
PUBLISHED = {
    "Prodigy": (scaled(baselines.Prodigy, "d0", 1e-6), "d0"),
    "DAdaptSGD": (scaled(baselines.DAdaptSGD, "d0", 1e-6), "d0"),
    "DAdaptAdam": (scaled(baselines.DAdaptAdam, "d0", 1e-6), "d0"),
    "DoG": (scaled(baselines.DoG, "reps_rel", 1e-6), "reps_rel"),
}


class Problem:
    """A perceptron on 2,000 digits."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.data = {split: Digits(split, standardize=True) for split in ("train", "meta", "test")}

    def train(self, make: Callable[[Any], Optimizer], seed: int, judge: str) -> tuple[float, float]:
        """Mean loss of the batches (at most 10 for each) and final accuracy on the split ``judge``."""
        torch.manual_seed(seed)
        net, data = MLP([784, 32, 10]), self.data["train"]
        optimizer = make(net.parameters())
        switched = isinstance(optimizer, (baselines.ScheduleFreeSGD, baselines.ScheduleFreeAdamW))
        if switched:
            optimizer.train()
        losses = []
        for _ in range(self.steps):
            rows = torch.randint(len(data.labels), (50,))
            optimizer.zero_grad()
            loss = F.cross_entropy(net(data.images[rows]), data.labels[rows])
            losses.append(float(loss.detach().clamp(max=10).nan_to_num(10.0)))
            loss.backward()
            optimizer.step()
        if switched:
            optimizer.eval()
        with torch.no_grad():
            right = net(self.data[judge].images).argmax(1) == self.data[judge].labels
        return statistics.fmean(losses), float(right.float().mean())

    def best(self, make: Any, grid: list[float]) -> float:
        """By accuracy on digits that are used for nothing else, with two seeds of their own."""
        return max(grid, key=lambda value: statistics.fmean(self.train(make(value), seed, "meta")[1] for seed in (100, 101)))


def robust(seeds: int, steps: int) -> None:
    problem = Problem(steps)
    cases: dict[str, tuple[Any, str]] = {}
    for name, (family, knob) in TUNED.items():
        value = problem.best(lambda lr, family=family: family(lr)(1.0), GRID)
        cases[name] = family(value), f"{knob} = {value:.2g}"
        if name == "SGD":
            lr = value
    for name, family in FROM_SGD.items():
        cases[name] = family(lr), f"SGD's lr = {lr:.2g}"
    for name, form in HYPER.items():
        rates = [10.0**k for k in range(-6, 0)]
        rate = problem.best(lambda beta, form=form: attached(HypergradientDescent, meta_lr=beta, form=form)(lr)(1.0), rates)
        cases[name] = attached(HypergradientDescent, meta_lr=rate, form=form)(lr), f"SGD's lr = {lr:.2g}, meta_lr = {rate:.2g}"
    for name, (family, knob) in PUBLISHED.items():
        cases[name] = family, f"{knob} = 1e-6"
    print(f"#### Digits, {steps} steps of 50 images, {seeds} seeds: final accuracy in % on 1,000 digits (mean training loss)\n")
    print("| method | start | " + " | ".join(f"{factor:g}x" for factor in FACTORS) + " | sd of accuracy over seeds, largest |")
    print("| --- | --- |" + " --- |" * (len(FACTORS) + 1))
    for name, (family, start) in cases.items():
        shown, spread = [], 0.0
        for factor in FACTORS:
            found = [problem.train(family(factor), seed, "test") for seed in range(seeds)]
            losses, right = zip(*found, strict=True)
            shown.append(f"{100 * statistics.fmean(right):.1f} ({statistics.fmean(losses):.2f})")
            spread = max(spread, 100 * statistics.stdev(right) if seeds > 1 else 0.0)
        print(f"| {name} | {start} | " + " | ".join(shown) + f" | {spread:.1f} |", flush=True)
    print()
