"""A KroneckerMirror that was meta-trained on a small network, carried to a wider and deeper one, on digits.

    python benchmarks/mirror_transfer.py           # two to five minutes on one core

Meta-trained on 784-32-10 with 2,000 digits (40 meta-steps on the mean loss of 30 steps, 3 seeds), carried to 784-100-100-10, which
is trained for 150 steps of 64 on 2,000 other digits (5 seeds for each rule) and tested on 1,000. SGD, momentum and Adam take the
best of eight learning rates by the mean loss of two seeds on the digits of meta-training; the rules' rates are not tuned.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import lightning_metaopt as lmo
from lightning_metaopt.data import Digits
from lightning_metaopt.models import MLP
from lightning_metaopt.rules import KroneckerMirror
from lightning_metaopt.study.progress import quiet_lightning
from lightning_metaopt.tasks import ImageClassification

SMALL, LARGE = [784, 32, 10], [784, 100, 100, 10]
META_SEEDS, SEEDS = range(3), range(10, 15)
Maker = Callable[[nn.Module], Optimizer]


def train(make: Maker, split: str, seed: int, steps: int = 150) -> tuple[float, float]:
    """Mean training loss and test accuracy in %."""
    data, test = Digits(split), Digits("test")
    images, unseen = data.images.float() / 255, test.images.float() / 255
    torch.manual_seed(seed)
    net = MLP(LARGE)
    optimizer, total = make(net), 0.0
    for step in range(steps):
        if step % 31 == 0:
            order = torch.randperm(len(images))
        rows = order[64 * (step % 31) : 64 * (step % 31 + 1)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images[rows]), data.labels[rows])
        loss.backward()
        optimizer.step()
        total += min(loss.item(), 10.0) / steps
    with torch.no_grad():
        return total, 100 * (net(unseen).argmax(1) == test.labels).float().mean().item()


def meta_train(sizes: list[int], seed: int) -> KroneckerMirror:
    net = MLP(sizes)
    family = ImageClassification(Digits("meta"), net, batch_size=64, held_out=0.1)
    learner = lmo.MetaLearner(
        KroneckerMirror.for_module(net, seed=seed),
        family,
        metagrad=lmo.Unrolled(30),
        objective="mean",
        optimizer=partial(Adam, lr=0.1),
        tasks=1,
        steps_per_epoch=40,
        val_tasks=0,
        seed=seed,
    )
    loop = lmo.MetaLoop(max_epochs=1, gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False, logger=False)
    rule = loop.fit(learner)
    assert isinstance(rule, KroneckerMirror)
    return rule


def tuned(make: Callable[[float], Maker], rates: list[float]) -> tuple[float, Maker]:
    best = min(rates, key=lambda rate: sum(train(make(rate), "meta", seed)[0] for seed in (0, 1)))
    return best, make(best)


def use(rule: KroneckerMirror) -> Maker:
    return lambda net: lmo.LearnedOptimizer(net.named_parameters(), rule)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    makers: dict[str, list[Maker]] = {}
    for name, make, rates in (
        ("SGD", lambda rate: lambda net: SGD(net.parameters(), rate), [0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5]),
        (
            "momentum",
            lambda rate: lambda net: SGD(net.parameters(), rate, momentum=0.9),
            [0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25, 0.4],
        ),
        ("Adam", lambda rate: lambda net: Adam(net.parameters(), rate), [5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 0.01, 0.02]),
    ):
        best, chosen = tuned(make, rates)
        makers[f"{name}, lr = {best:g}"] = [chosen]
    batch = Digits("meta").images[:500].float() / 255
    small = [meta_train(SMALL, seed) for seed in META_SEEDS]
    torch.manual_seed(0)
    large = MLP(LARGE)
    fresh = [KroneckerMirror.for_module(large, seed=seed) for seed in META_SEEDS]
    makers["a new rule, nothing learned"] = [use(rule) for rule in fresh]
    makers["carried over, without data"] = [use(rule.transferred_to(large)) for rule in small]
    makers["carried over, mean inputs"] = [use(rule.transferred_to(large, batch)) for rule in small]
    makers["meta-trained on this network"] = [use(meta_train(LARGE, seed)) for seed in META_SEEDS]
    print("| optimizer | mean training loss (sd) | test accuracy, % (sd) |\n| --- | --- | --- |")
    for name, alike in makers.items():
        runs = [train(maker, "train", seed) for maker in alike for seed in SEEDS]
        (loss, spread), (accuracy, apart) = ((statistics.mean(v), statistics.stdev(v)) for v in zip(*runs, strict=True))
        print(f"| {name} | {loss:.3f} ({spread:.3f}) | {accuracy:.1f} ({apart:.1f}) |", flush=True)


if __name__ == "__main__":
    main()
