"""Every method of M-L2O beside ordinary optimizers, on the same problems: what lasso.py and quadratic.py have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import ml2o
import torch
from ml2o import Interval, Problems, adapted, curve, curves, load, problems
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.rule import Rule
from lightning_metaopt.rules import Adam, GradientDescent, HeavyBall, RNNprop
from lightning_metaopt.task import TaskFamily

TUNING_SEED, TRIALS = 1000, 12
Make = Callable[[float], Rule]
Kept = TypeVar("Kept")
# How an optimizer is made of its learning rate, and the smallest and largest of the twelve that are tried.
CLASSICAL: dict[str, tuple[Make, tuple[float, float]]] = {
    "SGD": (GradientDescent, (2e-4, 0.1)),  # over sigma^2
    "momentum (0.9)": (HeavyBall, (2e-4, 0.1)),  # over sigma^2
    "Adam (0.9, 0.999)": (Adam, (1e-4, 0.3)),
    "Adam (0.95, 0.95)": (partial(Adam, beta1=0.95, beta2=0.95), (1e-4, 0.3)),
}
ORDINARY = ("ISTA", "FISTA", *CLASSICAL)


def best_rate(make: Make, family: TaskFamily, rates: Sequence[float], steps: int = ml2o.STEPS) -> float:
    """The learning rate with the lowest figure on problems of the tuning seed, which are those of no run."""
    drawn = problems(family, TUNING_SEED)
    return min(rates, key=lambda rate: float(curve(make(rate), drawn, steps).min()))


def grid(low: float, high: float) -> list[float]:
    """Twelve learning rates, evenly spaced in their logarithm."""
    return [low * (high / low) ** (index / (TRIALS - 1)) for index in range(TRIALS)]


def tuned(family: TaskFamily, sigma: float | None, steps: int = ml2o.STEPS) -> dict[str, Rule]:
    """All ordinary optimizers with their best rates of twelve; the gradients of SGD and momentum grow with sigma^2."""
    found = {}
    for name, (make, (low, high)) in CLASSICAL.items():
        scale = sigma**2 if sigma and not name.startswith("Adam") else 1.0
        found[name] = make(best_rate(make, family, grid(low / scale, high / scale), steps))
    return found


def proximal(drawn: Problems, steps: int, fast: bool, step_size: float | None = None) -> Tensor:
    """ISTA or FISTA (Beck, Teboulle 2009): logarithm of the mean loss after every step; where it is not finite, infinite.

    With one step size for all problems, or with each problem's own 1/L, which is more than the other methods know.
    """
    task, params, _ = drawn
    matrix, target, penalty = task.data["matrix"], task.data["target"], task.data["penalty"].unsqueeze(1)
    rate = torch.linalg.matrix_norm(matrix, ord=2).pow(-2).unsqueeze(1) if step_size is None else torch.tensor(step_size)
    x = ahead = params["theta"]
    momentum, losses = 1.0, []
    for _ in range(steps):
        residual = torch.einsum("bij,bj->bi", matrix, ahead) - target
        moved = ahead - rate * torch.einsum("bij,bi->bj", matrix, residual)
        new = moved.sign() * (moved.abs() - rate * penalty).clamp(min=0)
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / after * (new - x) if fast else new
        x, momentum = new, after
        losses.append(task.loss({"theta": x}, {}, task.batch(0)).mean())
    return torch.stack(losses).log().nan_to_num(nan=math.inf)


def kept_if_better(rule: Rule, family: TaskFamily, run: int, **options: Any) -> Rule:
    """Self-adaptation as users have it: other problems of the family decide whether the adapted rule is kept."""
    options = {"metagrad": ml2o.FIRST(), "tasks": ml2o.TEST, "held_out": 32, "held_out_steps": 300, "seed": run} | options
    return lmo.adapt(rule, family, figure=min, **options).rule


Adapt = Callable[[Rule, TaskFamily, int], Rule]
# Label, meta-trained rule (or none), how it is adapted (or not at all).
LEARNED: dict[str, tuple[str | None, Adapt | None]] = {
    "Vanilla": (None, adapted),
    "Direct Transfer": ("transfer", None),
    "Transfer Learning": ("transfer", adapted),
    "Transfer Learning, kept if better": ("transfer", kept_if_better),
    "M-L2O, first order (as released), not adapted": ("first-order", None),
    "M-L2O, first order (as released)": ("first-order", adapted),
    "M-L2O, second order (Eq. 5)": ("second-order", adapted),
    "M-L2O, aligned, not adapted": ("aligned", None),
    "M-L2O, aligned": ("aligned", adapted),
    "random scaling, log of means, not adapted": ("scaled", None),
    "random scaling, log of means, adapted": ("scaled", partial(adapted, objective="log-mean")),
    "M-L2O, aligned, random scaling, log of means, not adapted": ("aligned-scaled", None),
    "M-L2O, aligned, random scaling, log of means": ("aligned-scaled", partial(adapted, objective="log-mean")),
    "random scaling, mean of logs, not adapted": ("scaled-logs", None),
    "random scaling, mean of logs, adapted": ("scaled-logs", partial(adapted, objective="log")),
}


def learned(options: Any, family: TaskFamily, label: str, steps: int = ml2o.STEPS) -> Tensor:
    """Curves ``(meta-seeds, runs, steps)`` of a learned method; adaptation is to ``family``, on problems of the run's own.

    Meta-seeds whose rule is not in the folder are left out; without any the method has no curves, ``(0, runs, steps)``.
    """
    name, adapt = LEARNED[label]
    rows = [torch.empty(0, len(options.runs), steps)]
    for seed in options.seeds:
        if name is not None and not ml2o.rule_file(options.rules, name, seed).exists():
            continue
        rule = RNNprop(seed=seed) if name is None else load(name, seed, options.rules)
        drawn = [problems(family, run) for run in options.runs]
        if adapt is None:
            rows.append(curves(rule, drawn, steps)[None])
        else:
            found = [curve(adapt(rule, family, run), one, steps) for run, one in zip(options.runs, drawn, strict=True)]
            rows.append(torch.stack(found)[None])
    return torch.cat(rows)


def remembered(path: Path, make: Callable[[], Kept]) -> Kept:
    """What ``make`` returns, from a file if it has been made before: a run that was stopped goes on where it was."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    found: Kept = torch.load(path, weights_only=True)
    return found


def compare(
    options: Any, make: Callable[[float], TaskFamily], sigmas: Sequence[float], steps: int = ml2o.STEPS
) -> dict[float, dict[str, Tensor]]:
    """Curves ``(meta-seeds or 1, runs, steps)`` by sigma and method; all are kept in the folder."""
    found: dict[float, dict[str, Tensor]] = {sigma: {} for sigma in sigmas}
    for label in LEARNED:
        for sigma in sigmas:
            path = options.folder / "curves" / f"{label}, {sigma:g}.pt"
            curves_of = remembered(path, partial(learned, options, make(sigma), label, steps))
            if not len(curves_of):
                path.unlink()
                continue
            found[sigma][label] = curves_of
            print(f"{label}, sigma {sigma:g}: {float(found[sigma][label].amin(2).mean()):.2f}", flush=True)
    for sigma in sigmas:
        path = options.folder / "curves" / f"ordinary, {sigma:g}.pt"
        found[sigma] |= remembered(path, partial(ordinary, options, make(sigma), sigma, steps))
    return found


def ordinary(options: Any, family: TaskFamily, sigma: float, steps: int) -> dict[str, Tensor]:
    """Curves ``(1, runs, steps)`` of ISTA, FISTA and the tuned optimizers."""
    drawn, rows = [problems(family, run) for run in options.runs], {}
    for name, fast in (("ISTA", False), ("FISTA", True)):
        rows[name] = torch.stack([proximal(one, steps, fast) for one in drawn])[None]
    for name, rule in tuned(family, sigma, steps).items():
        rows[f"{name}, lr {rule.describe()['lr']:.2g}"] = curves(rule, drawn, steps)[None]
    return rows


def plain(name: str) -> str:
    """A method without its learning rate, which differs from sigma to sigma."""
    return name.partition(", lr ")[0]


AGAINST = ("Transfer Learning", "Direct Transfer")


def difference(values: Mapping[str, Tensor], one: str, other: str) -> str:
    """Its interval on the same meta-seeds and runs; where one has fewer meta-seeds, on the first ones."""
    if one not in values or other not in values:
        return ""
    count = min(len(values[one]), len(values[other]))
    return str(Interval.of(values[one][:count] - values[other][:count]))


def report(
    folder: Path,
    found: Mapping[float, Mapping[str, Tensor]],
    drawn: Sequence[float],
    title: str,
    against: Sequence[str] = AGAINST,
) -> list[str]:
    """``runs.csv`` with every figure, ``table.csv``, ``differences.csv``, and a picture for each sigma of ``drawn``."""
    figures = {sigma: {plain(name): curves.amin(2) for name, curves in rows.items()} for sigma, rows in found.items()}
    ml2o.write(
        folder / "runs.csv",
        ["sigma", "method", "meta-seed number", "run number", "min ln loss"],
        [
            (sigma, name, seed, run, float(value))
            for sigma, rows in figures.items()
            for name, values in rows.items()
            for seed, line in enumerate(values)
            for run, value in enumerate(line)
        ],
    )
    names = list(dict.fromkeys(name for rows in figures.values() for name in rows))
    head = ["method", *(f"{sigma:g}" for sigma in figures)]
    table = [[name, *(str(Interval.of(rows[name])) if name in rows else "" for rows in figures.values())] for name in names]
    lines = ml2o.write(folder / "table.csv", head, table)
    pairs = [
        (one, other)
        for one in names
        for other in against
        if other in names and one != other and one.startswith(("M-L2O", "Transfer", "random"))
    ]
    rows = [[f"{one} minus {other}", *(difference(values, one, other) for values in figures.values())] for one, other in pairs]
    lines += ["", *ml2o.write(folder / "differences.csv", head, rows)]
    options = [(sigma, *name.split(", lr ")) for sigma, methods in found.items() for name in methods if ", lr " in name]
    ml2o.write(folder / "tuned.csv", ["sigma", "method", "learning rate"], options)
    for sigma in drawn:
        draw_curves(folder / f"sigma_{sigma:g}.png", found[sigma], f"{title}, sigma = {sigma:g}")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    return lines


def draw_curves(path: Path, rows: Mapping[str, Tensor], title: str) -> None:
    """Mean logarithm of the loss over steps, with its 95 % interval over meta-seeds and runs together."""
    with axes_into(path, legend=False) as axes:
        colors = cycle([*(f"C{number}" for number in range(10)), "k", "navy", "gold", "lime", "tan"])
        dashes = cycle(["--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))])
        for name, curves in rows.items():
            steps = curves.shape[2]
            at = sorted({round(10 ** (index / 20)) for index in range(200) if round(10 ** (index / 20)) <= steps})
            points = [Interval.of(curves[:, :, step - 1]) for step in at]
            mean, half = torch.tensor([(point.mean, point.both) for point in points]).T
            if plain(name) in ORDINARY:
                axes.plot(at, mean, ls=next(dashes), lw=1.2, color="0.25", label=name)
            else:
                color = next(colors)
                axes.plot(at, mean, lw=1.2, color=color, label=name)
                axes.fill_between(at, mean - half, mean + half, color=color, alpha=0.05)
        start = max(float(curves[:, :, 0].mean()) for curves in rows.values())
        axes.set(xscale="log", xlabel="step", ylabel="ln of the mean loss", title=title, ylim=(-6.5, min(start + 2, 12.0)))
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=6, frameon=False)
