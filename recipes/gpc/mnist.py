"""Figure 1 on real digits: a perceptron is trained on one batch again and again, and the steps learn from episode to episode.

    python recipes/gpc/mnist.py [FOLDER] [--episodes 7] [--long 16] [--seeds 0 1 2]     # about 15 minutes on one core
    python recipes/gpc/mnist.py FOLDER --tables                                         # tables and figure of a finished run

An episode is 500 steps on a fixed batch of 512 digits from new weights (784-100-100-10, Lecun-normal weights, biases zero; pixels
as fractions of white); with ``--small``, of 256 digits of half the width and height (196-64-64-10). All methods start the k-th
episode of a seed from the same weights. GPC is ``GPCMetaOpt`` in a ``Trainer``, on SGD (lr 0.1) and on AdamW (lr 0.001); options of
the baselines and of GPC on AdamW are chosen on seed 1000, by the mean loss over an episode.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from lightning_metaopt.callbacks import GPCMetaOpt
from lightning_metaopt.data import Digits
from lightning_metaopt.models import MLP

TUNING = 1000
LAST = 20  # steps whose mean loss is the final one
BASELINES: dict[str, list[dict[str, Any]]] = {
    "GD": [{"lr": lr} for lr in (0.2, 0.4, 0.6, 1.0)],
    "momentum": [{"lr": lr, "momentum": m} for lr in (0.1, 0.2) for m in (0.9, 0.95)],
    "AdamW": [{"lr": lr, "betas": (0.9, b)} for lr in (0.001, 0.003) for b in (0.9, 0.999)],
}
CONTROLLED: dict[str, list[dict[str, Any]]] = {
    "GPC": [{"meta_lr": 1e-4}, {"meta_lr": 1e-3}],
    "GPC on AdamW": [{"meta_lr": lr, "normalize": n} for lr in (1e-5, 1e-4) for n in (False, True)],
}


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
        return (AdamW if self.base == "AdamW" else SGD)(self.parameters(), **self.options)


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
        losses.append(float(loss))
    return losses


def controlled(
    name: str, options: dict[str, Any], seed: int, episodes: int, steps: int, add: Callable[..., None], history: int = 32
) -> Record:
    """GPC over all episodes, in one ``fit``."""
    on_adam = "AdamW" in name
    problem = Problem(seed, "AdamW" if on_adam else "GPC", {"lr": 1e-3 if on_adam else 0.1})
    callback = GPCMetaOpt(history, episode_steps=steps, init=problem.begin, log=False, **options)
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


def episodes_of(table: Table, name: str, options: dict[str, Any], seed: int, count: int, steps: int) -> Record:
    """A run of GPC, in the table."""
    return controlled(name, options, seed, count, steps, partial(table.add, name, str(options), seed))


def study(folder: Path, seeds: list[int], episodes: int, long: int, steps: int) -> None:
    """Choose options on the tuning seed, and run all methods on the others."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(folder / "mnist_episodes.csv")
    chosen: dict[str, dict[str, Any]] = {}
    for name, grid in BASELINES.items():
        scores = [_baseline(table, name, options, TUNING, 1, steps) for options in grid]
        chosen[name] = grid[scores.index(min(scores))]
    name, grid = "GPC on AdamW", CONTROLLED["GPC on AdamW"]
    scores = [statistics.mean(episodes_of(table, name, o, TUNING, min(2, episodes), steps).losses[-steps:]) for o in grid]
    chosen[name] = grid[scores.index(min(scores))]
    paper, faster = CONTROLLED["GPC"]  # both are shown
    for seed in seeds:
        for base in BASELINES:
            for episode in sorted({1, 4, 7} & set(range(1, episodes + 1))):
                _baseline(table, base, chosen[base], seed, episode, steps)
        first = seed == seeds[0]
        for method, options, count in (
            (name, chosen[name], min(5, episodes)),
            ("GPC", paper, episodes),
            ("GPC", faster, min(4, episodes)),
        ):
            record = episodes_of(table, method, options, seed, count, steps)
            if first:
                _keep(folder, method, options, record)
    if long > episodes:
        _keep(folder, "GPC", paper, episodes_of(table, "GPC, longer", paper, seeds[0], long, steps))


def _baseline(table: Table, name: str, options: dict[str, Any], seed: int, episode: int, steps: int) -> float:
    begin = time.process_time()
    found = summary(plain(name, options, seed, episode, steps))
    table.add(name, str(options), seed, episode, *found, 0.0, time.process_time() - begin)
    return found[1] if found[1] == found[1] else float("inf")


def _keep(folder: Path, name: str, options: dict[str, Any], record: Record) -> None:
    label = "adamw" if "AdamW" in name else f"{options['meta_lr']:g}"
    with (folder / f"mnist_profiles_{label}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"{x:.5g}" for x in profile] for profile in record.profiles])


def tables(folder: Path) -> None:
    """Means over seeds, by episode, and the figure."""
    with (folder / "mnist_episodes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["seed"]) != TUNING]
    groups: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["method"], row["options"]][int(row["episode"])].append((float(row["final"]), float(row["mean"])))
    print("| method | episode | last 20 losses | mean loss | seeds |\n|---|---|---|---|---|")
    for (name, options), found in groups.items():
        for episode, values in sorted(found.items()):
            cells = []
            for part in zip(*values, strict=True):
                spread = f" ± {statistics.stdev(part):.2g}" if len(part) > 1 else ""
                cells.append(f"{statistics.mean(part):.3g}{spread}")
            print(f"| {name} {options} | {episode} | {cells[0]} | {cells[1]} | {len(values)} |")
    _draw(folder, groups)


def _draw(folder: Path, groups: dict[tuple[str, str], dict[int, list[tuple[float, float]]]]) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    colors = iter(colormaps["tab10"].colors)
    for (name, options), found in groups.items():
        color, steady = next(colors), name in BASELINES
        label = f"{name}, tuned" if steady else f"{name}, {options.strip('{}').replace(chr(39), '')}"
        for axis, which in ((left, 0), (middle, 1)):
            means = {k: statistics.mean(value[which] for value in values) for k, values in sorted(found.items())}
            if steady:
                axis.axhline(statistics.geometric_mean(means.values()), color=color, linestyle="--", lw=1.2, label=label)
            else:
                axis.plot(list(means), list(means.values()), "o-", ms=3, lw=1.4, color=color, label=label)
    for axis, title in ((left, f"mean of the last {LAST} losses"), (middle, "mean loss over the episode")):
        axis.set_yscale("log")
        axis.set_xlabel("episode")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    left.legend(fontsize=7)
    with (folder / "mnist_profiles_0.0001.csv").open() as file:
        profiles = [[float(x) for x in row] for row in csv.reader(file)]
    for k in sorted({0, 1, 3, 7, len(profiles) - 1} & set(range(len(profiles)))):
        color = colormaps["viridis"](0.9 * (1 - k / max(1, len(profiles) - 1)))
        right.plot(range(2, len(profiles[k]) + 1), profiles[k][1:], "o-", ms=2.5, lw=1.1, color=color, label=f"episode {k + 1}")
    newest = ", ".join(f"{profiles[k][0]:.3f}" for k in (0, len(profiles) - 1))
    right.set_title(f"profile of GPC, meta_lr 0.0001 (lag 1, not drawn: {newest})", fontsize=9)
    right.set_xlabel("lag")
    right.axhline(0, color="0.5", lw=0.8, ls=":")
    right.grid(alpha=0.25)
    right.legend(fontsize=7)
    figure.savefig(folder / "mnist.png", dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/gpc_mnist"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=7)
    parser.add_argument("--long", type=int, default=16, help="episodes of GPC with the paper's options on the first seed")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--small", action="store_true", help="a fifth of the work")
    parser.add_argument("--tables", action="store_true", help="only from what is there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    Problem.small = options.small
    if not options.tables:
        study(options.folder, options.seeds, options.episodes, options.long, options.steps)
    tables(options.folder)


if __name__ == "__main__":
    main()
