"""Episodes on one batch of real digits: what the scripts on GPC beside this file share.

An episode is 500 steps on a fixed batch of 512 digits from new weights (784-100-100-10, Lecun-normal weights, biases zero; pixels
as fractions of white); in small, on 256 digits of half the width and height (196-64-64-10). All methods start the k-th episode of
a seed from the same weights.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_metaopt.baselines import DAdaptAdam, DoG, Mechanic
from lightning_metaopt.callbacks import GPCMetaOpt, HypergradientDescent
from lightning_metaopt.data import Digits
from lightning_metaopt.models import MLP

TUNING = 1000
LAST = 20  # steps whose mean loss is the final one
BASELINES: dict[str, list[dict[str, Any]]] = {
    "GD": [{"lr": lr} for lr in (0.2, 0.4, 0.6, 1.0)],
    "momentum": [{"lr": lr, "momentum": m} for lr, m in ((0.05, 0.95), (0.1, 0.9), (0.1, 0.95), (0.2, 0.9))],
    "AdamW": [{"lr": lr} for lr in (0.003, 0.005, 0.01, 0.02)],
    "HGD": [{"lr": 0.1, "meta_lr": rate} for rate in (1e-4, 1e-3, 1e-2, 1e-1)],
    "DoG": [{"lr": lr} for lr in (0.5, 1.0, 2.0, 4.0)],
    "D-Adaptation (Adam)": [{"lr": lr} for lr in (0.1, 0.25, 0.5, 1.0)],
    "Mechanic": [{"lr": lr, "momentum": m} for lr in (0.1, 1.0) for m in (0.0, 0.9)],
}
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "DoG": DoG,
    "D-Adaptation (Adam)": DAdaptAdam,
    "Mechanic": lambda params, **options: Mechanic(params, base=partial(SGD, **options)),
}


def optimizer_of(name: str, params: Any, options: dict[str, Any]) -> Optimizer:
    """By the name of the method; SGD where it does not say otherwise."""
    given = dict(options)
    rate = given.pop("meta_lr", None)
    made = MAKERS.get(name, SGD)(params, **given)
    if rate is not None:
        HypergradientDescent.attach(made, meta_lr=rate)
    return made


class Problem(LightningModule):
    """The perceptron on its batch, in every episode from weights of that episode's own seed."""

    small = False  # the size, for all

    def __init__(self, seed: int, base: str, options: dict[str, Any]) -> None:
        super().__init__()
        digits = Digits("train")
        rows = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(seed))[: 256 if self.small else 512]
        images = digits.images[rows].float() / 255
        self.batch = (nn.functional.avg_pool2d(images, 2) if self.small else images, digits.labels[rows])
        self.seed, self.base, self.options, self.episode = seed, base, options, 0
        self.model = MLP([196, 64, 64, 10] if self.small else [784, 100, 100, 10])
        self.begin(self)

    @torch.no_grad()
    def begin(self, module: nn.Module) -> None:
        """Weights for the next episode."""
        self.episode += 1
        generator = torch.Generator().manual_seed(1000 * self.seed + self.episode)
        for part in self.model.layers:
            if isinstance(part, nn.Linear):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) / part.in_features**0.5)
                part.bias.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """The optimizer, or what GPC learns on."""
        return optimizer_of(self.base, self.parameters(), self.options)


class Record(Callback):
    """The loss of each step, the profile at the end of each episode, and a row of the table."""

    def __init__(self, steps: int, control: GPCMetaOpt, add: Callable[..., None]) -> None:
        self.steps, self.control, self.add = steps, control, add
        self.losses: list[float] = []
        self.profiles: list[list[float]] = []
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """After a step."""
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) % self.steps == 0:
            rule, now = self.control.rule(), time.process_time()
            self.profiles.append(rule.profile().tolist())
            found = summary(self.losses[-self.steps :])
            self.add(len(self.profiles), *found, sum(self.profiles[-1]) - rule.lr, now - self.begin)
            self.begin = now


def plain(name: str, options: dict[str, Any], seed: int, episode: int, steps: int) -> list[float]:
    """The losses of a baseline in one episode."""
    problem = Problem(seed, name, options)
    problem.episode = episode - 1
    problem.begin(problem)
    optimizer, losses = problem.configure_optimizers(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.training_step(problem.batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def controlled(name: str, options: dict[str, Any], seed: int, episodes: int, steps: int, add: Callable[..., None]) -> Record:
    """GPC over all episodes, in one ``fit``; ``lr`` among its options is that of the optimizer under it."""
    given = dict(options)
    base = "AdamW" if "AdamW" in name else "GPC"
    problem = Problem(seed, base, {"lr": given.pop("lr", 1e-3 if base == "AdamW" else 0.1)})
    callback = GPCMetaOpt(given.pop("history", 32), episode_steps=steps, init=problem.begin, log=False, **given)
    record = Record(steps, callback, add)
    trainer = Trainer(
        max_steps=episodes * steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, record],
    )
    trainer.fit(problem, DataLoader([problem.batch] * steps, batch_size=None))
    return record


def summary(losses: list[float]) -> tuple[float, float]:
    """Mean loss of the last steps, and of all."""
    return statistics.mean(losses[-LAST:]), statistics.mean(losses)


class Table:
    """Rows that are on the disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.write_text("method,options,seed,episode,final,mean,sum_of_m,cpu_s\n")

    def add(self, *row: Any) -> None:
        """One more row."""
        cells = [f"{cell:.5g}" if isinstance(cell, float) else cell for cell in row]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(cells)
        print(*cells, flush=True)


def command(
    arguments: list[str] | None,
    text: str,
    folder: str,
    study: Callable[..., None],
    tables: Callable[[Path], None],
    seeds: Sequence[int],
    numbers: dict[str, tuple[int, str]],
    small: bool = True,
) -> None:
    """A script: ``study(folder, seeds, **numbers)``, unless only ``tables(folder)`` are asked for.

    ``numbers`` are defaults and their help; ``small``: episodes are the small ones, without being asked.
    """
    parser = argparse.ArgumentParser(description=text.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(folder))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    for name, (default, words) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=words)
    parser.add_argument("--small", action="store_true", default=small, help="a fifth of the work")
    parser.add_argument("--tables", action="store_true", help="only from what is there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    Problem.small = options.small
    if not options.tables:
        study(options.folder, options.seeds, **{name: getattr(options, name) for name in numbers})
    tables(options.folder)
