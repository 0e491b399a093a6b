"""What the recipes of M-L2O share: methods, meta-training, adaptation, test, intervals.

    python recipes/m_l2o/ml2o.py [FOLDER] [--profile short|standard|paper] [--methods ...]    # meta-trains rules and saves them

The rules of ``results/rules`` were made by this command with ``--together`` (``short-budgets`` by ``short_budgets.py``); the
recipes load them, or those of a folder that is named with ``--rules``. The profile "short" takes a seventh of the time; "paper" is
the published schedule with its curriculum, and takes days.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.metagrads import Adapted, MetaGradient, Unrolled
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule
from lightning_metaopt.rules import Adam, GradientDescent, RNNprop, Stacked
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.task_loader import draw
from lightning_metaopt.tasks import Lasso
from lightning_metaopt.tree import Tree

HERE = Path(__file__).parent
META_SEEDS = RUNS = (10, 11, 12, 13, 14)
TEST, STEPS, WINDOW = 128, 1000, 20
FIRST = partial(Unrolled, WINDOW, first_order=True)
SCALED = partial(Lasso, log_scale=(0.0, math.log(200)))
Problems = tuple[Task, Tree, Tree]

# Inner steps of an episode, and how many windows of meta-training with them.
PROFILES = {
    "tiny": ((40, 4),),
    "short": ((100, 50), (200, 75), (500, 100), (1000, 125), (2000, 100)),
    "standard": ((100, 300), (200, 400), (500, 750), (1000, 1000), (2000, 800)),
}
CURRICULUM = (100, 200, 500, 1000, 1500, 2000, 2500, 3000)  # of the published code, for the profile "paper"


@dataclass(frozen=True)
class Method:
    """How a rule is meta-trained."""

    metagrad: Callable[[], MetaGradient] = FIRST
    family: Callable[[], TaskFamily] = Lasso
    objective: str = "sum"
    rule: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    annealed: bool = False


def aligned(family: Callable[[], TaskFamily]) -> Adapted:
    """Nested over what happens at test time: five steps of Adam on the first windows of other problems."""
    return Adapted(FIRST(), Adam(1e-3), 5, "start", True, family=family(), every=25, advance="adapted")


METHODS = {
    "transfer": Method(),
    "aligned": Method(partial(aligned, Lasso)),
    "scaled": Method(family=SCALED, objective="log-mean"),
    "scaled-logs": Method(family=SCALED, objective="log"),
    "aligned-scaled": Method(partial(aligned, SCALED), SCALED, "log-mean"),
    "first-order": Method(lambda: Adapted(FIRST(), GradientDescent(1e-3), 1, "next", True)),
    "second-order": Method(lambda: Adapted(Unrolled(WINDOW), GradientDescent(1e-3), 1, "same")),
}


class Stages(Callback):
    """Longer episodes after so many windows, without a look at validation: the same for all methods."""

    def __init__(self, stages: Iterable[tuple[int, int]]) -> None:
        self.stages = tuple(stages)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look up the length that belongs to this meta-step."""
        left = trainer.global_step
        for horizon, windows in self.stages:
            if left < windows:
                pl_module.episodes.horizon = horizon
                return
            left -= windows


class EveryTenEpisodes(Callback):
    """Validation after ten episodes, as in the published code, however long they are: 50 windows at 100 steps, 1,500 at 3,000."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An epoch is ten of the shortest episodes."""
        trainer.check_val_every_n_epoch = pl_module.episodes.horizon // CURRICULUM[0]


def meta_train(method: Method, seed: int, profile: str = "standard", tasks: int = 33) -> Rule:
    """A rule meta-trained with Adam, its seed that of the initial weights and of all problems."""
    return _fit(method, RNNprop(seed=seed, **method.rule), method.objective, seed, profile, tasks)


def meta_train_together(method: Method, seeds: Sequence[int], profile: str = "standard", tasks: int = 33) -> list[Rule]:
    """The same for several seeds at once, each with problems of its own, which depend on all seeds."""
    stacked = Stacked([RNNprop(seed=seed, **method.rule) for seed in seeds])
    objective = lmo.objectives.PerReplica(method.objective, len(seeds))
    _fit(method, stacked, objective, seeds[0], profile, tasks * len(seeds))
    return stacked.replicas()


def _fit(method: Method, rule: Rule, objective: Objective | str, seed: int, profile: str, tasks: int) -> Rule:
    paper = profile == "paper"
    stages = () if paper else PROFILES[profile]
    windows = sum(count for _, count in stages)
    anneal = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=max(windows, 1)) if method.annealed else None
    learner = lmo.MetaLearner(
        rule,
        method.family(),
        method.metagrad(),
        objective,
        partial(torch.optim.Adam, lr=method.lr),
        scheduler=anneal,
        tasks=tasks,
        horizon=CURRICULUM[0] if paper else stages[0][0],
        steps_per_epoch=50 if paper else windows,
        val_tasks=20 * tasks if paper else 0,
        seed=seed,
        guard_factor=None,
    )
    lengths = [lmo.Curriculum(CURRICULUM), EveryTenEpisodes()] if paper else [Stages(stages)]
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "log_every_n_steps": 50}
    return lmo.MetaLoop(max_epochs=10_000 if paper else 1, callbacks=lengths, **quiet).fit(learner)


def rule_file(folder: Path, name: str, seed: int) -> Path:
    """Where a meta-trained rule lies."""
    return folder / f"{name}-{seed}.safetensors"


def load(name: str, seed: int, folder: Path = HERE / "results" / "rules") -> Rule:
    """A meta-trained rule."""
    return lmo.load_rule(rule_file(folder, name, seed))


def problems(family: TaskFamily, seed: int, size: int = TEST) -> Problems:
    """The test problems of a run: the same for all methods."""
    return draw(family, seed, "m-l2o test", 0, size)


def curve(rule: Rule, drawn: Problems, steps: int = STEPS) -> Tensor:
    """Logarithm of the mean loss after steps 1 to ``steps``; where it is not finite, infinite."""
    return curves(rule, [drawn], steps)[0]


def curves(rule: Rule, runs: Sequence[Problems], steps: int = STEPS) -> Tensor:
    """The curves of several runs, computed together: ``(runs, steps)``."""
    task = type(runs[0][0]).join([drawn[0] for drawn in runs])
    params = {name: torch.cat([drawn[1][name] for drawn in runs]) for name in runs[0][1]}
    with torch.no_grad():
        end, losses = unroll(rule, Episode(task, params, {}, rule.init(params)), steps)
        last = task.loss(end.params, {}, task.batch(end.step))
    means = [part.mean(1) for part in torch.cat([losses[1:], last[None]]).split([drawn[0].size for drawn in runs], 1)]
    return torch.stack(means).log().nan_to_num(nan=math.inf)


def adapted(rule: Rule, family: TaskFamily, run: int, steps: int = 5, **options: Any) -> Rule:
    """``rule`` after meta-steps of Adam (0.001) on the first windows of 128 problems, whether or not they made it better."""
    options = {"metagrad": FIRST(), "tasks": TEST, "held_out": 0, "seed": run} | options
    return lmo.adapt(rule, family, steps, **options).rule


@dataclass(frozen=True)
class Interval:
    """A mean over meta-seeds and runs, with half of its 95 % interval by the spread of either alone and of both together."""

    mean: float
    over_meta_seeds: float
    over_runs: float
    both: float

    @staticmethod
    def of(values: Tensor) -> Interval:
        """From figures ``(meta-seeds, runs)``: Student's t of the means of rows, and of those of columns.

        Both together: variances of the two means add up, where what is left beside rows and columns is counted in both and
        taken off once; degrees of freedom by Satterthwaite.
        """
        values = values.double()
        rows, columns = values.shape
        means = ((values.mean(1), rows), (values.mean(0), columns))
        parts = [(part.var() / size if size > 1 else part.new_zeros(()), max(size - 1, 1)) for part, size in means]
        rest = values - values.mean(1, keepdim=True) - values.mean(0, keepdim=True) + values.mean()
        left = rest.square().sum() / max((rows - 1) * (columns - 1), 1) / (rows * columns)
        total = (parts[0][0] + parts[1][0] - left).clamp(min=max(float(part) for part, _ in parts))
        freedom = float(total**2 / sum(part**2 / size for part, size in parts)) if total > 0 else 1.0
        halves = [student(size) * float(part.sqrt()) for part, size in parts]
        return Interval(float(values.mean()), *halves, student(freedom) * float(total.sqrt()))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.both:.2f} ({self.over_meta_seeds:.2f}; {self.over_runs:.2f})"


def draw_points(axes: Any, at: Sequence[float], figures: Sequence[Tensor], label: str) -> None:
    """Means over runs of figures ``(meta-seeds, runs)`` as a point for each meta-seed, around their 95 % interval."""
    intervals = [Interval.of(values) for values in figures]
    means, halves = [found.mean for found in intervals], [found.both for found in intervals]
    color = axes.errorbar(at, means, halves, fmt="_", capsize=3, lw=1.2, label=label)[0].get_color()
    for x, values in zip(at, figures, strict=True):
        axes.plot([x] * len(values), values.mean(1), ".", ms=5, alpha=0.6, color=color)


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def arguments(text: str, argv: Sequence[str] | None = None, **flags: str) -> argparse.Namespace:
    """What all recipes are called with, and further flags by name with their help."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/m_l2o"), help="where tables and pictures go")
    parser.add_argument("--rules", type=Path, default=HERE / "results" / "rules", help="folder with meta-trained rules")
    parser.add_argument("--runs", type=int, nargs="+", default=list(RUNS), help="seeds of test and adaptation problems")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(META_SEEDS), help="meta-seeds")
    for name, about in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=about)
    found = parser.parse_args(argv)
    found.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return found


def write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table as CSV, and the lines of it in Markdown."""
    import csv

    rows = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Meta-train and save."""
    parser = argparse.ArgumentParser(description="Meta-train the rules of M-L2O's recipes.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/m_l2o/rules"))
    parser.add_argument("--profile", choices=[*PROFILES, "paper"], default="standard")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(META_SEEDS))
    parser.add_argument("--tasks", type=int, default=33)
    parser.add_argument("--together", action="store_true", help="all seeds as one stacked rule, in two thirds of the time")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in options.methods:
        begin = time.perf_counter()
        if options.together:
            found = meta_train_together(METHODS[name], options.seeds, options.profile, options.tasks)
        else:
            found = [meta_train(METHODS[name], seed, options.profile, options.tasks) for seed in options.seeds]
        for seed, rule in zip(options.seeds, found, strict=True):
            facts = {"recipe": f"m_l2o/{name}", "seed": seed, "profile": options.profile, "together": options.together}
            lmo.save_rule(rule, rule_file(options.folder, name, seed), facts)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
