"""GPC on minibatches of real digits: learning on them (Figure 4), the cure, and learning before, on one batch, to be used on them.

    python recipes/gpc/stochastic.py [FOLDER] [--seeds 0 1 2]     # 20 minutes on one core
    python recipes/gpc/stochastic.py FOLDER --tables              # tables and figure of a finished run

The network is the small one of ``on_digits.py`` (196-64-64-10), the training set has 2,000 digits, the test set 1,000.
*Unfrozen*: 8 episodes of 400 steps on minibatches of 128, M learned all the while, with each step's own batch in rollouts
(Algorithm 7) and with one common batch. *Frozen*: M is learned in 8 episodes on one fixed batch of 128, 512 or all digits,
saved as a rule file, and used unchanged for 1,200 steps on minibatches, on SGD with the same learning rate. SGD, momentum and
AdamW have four options each, chosen on seed 1000 by the mean loss over those 1,200 steps.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from on_digits import TUNING, Problem, command
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_metaopt.callbacks import GPCMetaOpt
from lightning_metaopt.data import Digits

BATCH = 128
SIZES = (128, 512, 2000)  # of the fixed batch
META: dict[str, Any] = {"history": 32, "meta_lr": 1e-3, "log": False}
UNFROZEN: dict[str, dict[str, Any]] = {
    "own batches (Algorithm 7)": {},
    "one common batch": {"common_batch": True},
    "gram": {"mode": "gram"},
}
BASELINES: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": lr} for lr in (0.1, 0.3, 0.6, 1.0)],
    "momentum": [{"lr": lr, "momentum": 0.9} for lr in (0.06, 0.1, 0.2, 0.4)],
    "AdamW": [{"lr": lr} for lr in (0.003, 0.01, 0.02, 0.04)],
}


class Losses(Callback):
    """The loss of each step, and the sum of M at the end of each episode."""

    def __init__(self, control: GPCMetaOpt | None = None, steps: int = 0) -> None:
        self.control, self.steps = control, steps
        self.losses: list[float] = []
        self.sums: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """After a step."""
        self.losses.append(float(outputs["loss"]))
        if self.control is not None and self.steps and len(self.losses) % self.steps == 0:
            rule = self.control.rule()
            self.sums.append(sum(rule.profile().tolist()) - rule.lr)


def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A quarter of the resolution, as fractions of white."""
    digits = Digits(split)
    return nn.functional.avg_pool2d(digits.images.float() / 255, 2), digits.labels


def fit(problem: Problem, callbacks: Sequence[Callback], steps: int, loader: Any, seed: int) -> None:
    """Training, in an order of batches that belongs to the seed."""
    torch.manual_seed(seed)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), **options)
    trainer.fit(problem, loader)


def minibatches() -> DataLoader[Any]:
    """Shuffled batches of the training digits."""
    return DataLoader(TensorDataset(*images("train")), BATCH, shuffle=True, drop_last=True)


def used(name: str, options: dict[str, Any], seed: int, steps: int, coefficients: Path | None = None) -> tuple[float, float, float]:
    """Mean loss, mean of the last hundred, and test accuracy after training on minibatches."""
    problem = Problem(seed, name, options)
    losses = Losses()
    frozen = [] if coefficients is None else [GPCMetaOpt(**META, mode="gram", freeze_after=0, coefficients=coefficients)]
    fit(problem, [*frozen, losses], steps, minibatches(), seed)
    inputs, labels = images("test")
    with torch.no_grad():
        accuracy = float((problem.model(inputs).argmax(1) == labels).double().mean())
    return statistics.mean(losses.losses), statistics.mean(losses.losses[-100:]), 100 * accuracy


def learned(size: int, seed: int, episodes: int, steps: int, path: Path) -> Path:
    """Coefficients from episodes on one batch."""
    inputs, labels = images("train")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    problem = Problem(seed, "GPC", {"lr": 0.1})
    control = GPCMetaOpt(**META, episode_steps=steps, init=problem.begin)
    fit(problem, [control], episodes * steps, DataLoader([(inputs[rows], labels[rows])] * steps, batch_size=None), seed)
    control.save(path)
    return path


def study(folder: Path, seeds: list[int], episodes: int, steps: int, long: int) -> None:
    """Everything, written as it comes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "unfrozen.csv").open("w", newline="") as first, (folder / "frozen.csv").open("w", newline="") as second:
        unfrozen, frozen = csv.writer(first), csv.writer(second)
        unfrozen.writerow(["method", "seed", "episode", "mean", "sum_of_m"])
        frozen.writerow(["method", "options", "seed", "mean", "last", "accuracy"])

        def use(label: str, name: str, options: dict[str, Any], seed: int, coefficients: Path | None = None) -> float:
            found = used(name, options, seed, long, coefficients)
            frozen.writerow([label, str(options), seed, *(f"{x:.5g}" for x in found)])
            second.flush()
            print(label, options, seed, *(f"{x:.4g}" for x in found), flush=True)
            return found[0] if math.isfinite(found[0]) else math.inf

        chosen = {name: min(grid, key=lambda o, name=name: use(name, name, o, TUNING)) for name, grid in BASELINES.items()}
        for seed in seeds:
            for name, options in chosen.items():
                use(name, name, options, seed)
            use("SGD, the same learning rate", "SGD", {"lr": 0.1}, seed)
            for size in SIZES:
                path = learned(size, seed, episodes, steps, folder / f"coefficients_{size}_{seed}.safetensors")
                use(f"GPC, learned on {size:,}", "GPC", {"lr": 0.1}, seed, path)
            for name, options in UNFROZEN.items():
                problem = Problem(seed, "GPC", {"lr": 0.1})
                control = GPCMetaOpt(**META, episode_steps=steps, init=problem.begin, **options)
                losses = Losses(control, steps)
                fit(problem, [control, losses], episodes * steps, minibatches(), seed)
                for number, total in enumerate(losses.sums):
                    mean = statistics.mean(losses.losses[number * steps : (number + 1) * steps])
                    unfrozen.writerow([name, seed, number + 1, f"{mean:.5g}", f"{total:.5g}"])
                    print(name, seed, number + 1, f"{mean:.4g} {total:.4g}", flush=True)
                first.flush()


def tables(folder: Path) -> None:
    """Means over seeds, and the figure."""
    with (folder / "frozen.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["seed"]) != TUNING]
    groups: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        label = row["method"] + ("" if row["method"].startswith(("GPC", "SGD, ")) else f", {row['options'].strip('{}')}")
        groups.setdefault(label, []).append(tuple(float(row[key]) for key in ("mean", "last", "accuracy")))
    print("| 1,200 steps on minibatches | mean loss | last 100 losses | test accuracy, % |\n|---|---|---|---|")
    for label, values in groups.items():
        print(f"| {label} | " + " | ".join(_cell(part) for part in zip(*values, strict=True)) + " |")
    with (folder / "unfrozen.csv").open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(int(row["episode"]), []).append((float(row["mean"]), float(row["sum_of_m"])))
    print("\n| M learned on minibatches | " + " | ".join(f"episode {k}" for k in next(iter(found.values()))) + " |")
    print("|---" * (1 + len(next(iter(found.values())))) + "|")
    for name, by_episode in found.items():
        for which, what in ((0, "mean loss"), (1, "sum of M")):
            print(f"| {name}: {what} | " + " | ".join(_cell([v[which] for v in vs]) for vs in by_episode.values()) + " |")
    _draw(folder, found)


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def _draw(folder: Path, found: dict[str, dict[int, list[tuple[float, float]]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for name, by_episode in found.items():
        for which, axis in enumerate(axes):
            episodes = list(by_episode)
            values = [[v[which] for v in vs] for vs in by_episode.values()]
            (line,) = axis.plot(episodes, [statistics.mean(v) for v in values], "o-", ms=3, lw=1.4, label=name)
            axis.fill_between(
                episodes, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.12, lw=0
            )
    for axis, title in zip(axes, ("mean loss over the episode", "sum of M at its end"), strict=True):
        axis.set_title(title + " (band: all seeds)", fontsize=10)
        axis.set_xlabel("episode, on minibatches")
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "unfrozen.png", dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """All of it."""
    numbers = {"episodes": (8, ""), "steps": (400, "of an episode"), "long": (1200, "steps on minibatches with what was learned")}
    command(arguments, __doc__, "outputs/gpc_stochastic", study, tables, range(3), numbers)


if __name__ == "__main__":
    main()
