"""Theorems 3.1 and 4.1 of MetaMD beside what happens, on convex problems whose constants are all known.

    python recipes/metamd/bounds.py [FOLDER]      # half a minute of CPU time; writes bounds.csv, theorem_3_1.png, theorem_4_1.png

Problems are f(x) = sum_i h_i x_i^2 / 2 in ten dimensions, with curvatures h_i around 10 values from 1/30 to 1 (L = 1) and a
start that is uniform in a ball of radius 2 around the solution. Theorem 3.1 bounds the gap of the averaged iterates of mirror
descent, here in metrics that are the identity, meta-trained, or known. Theorem 4.1 bounds the gap on new tasks by the mean
divergence of n seen ones plus terms for having chosen the metric on them: it is tried on the most hopeful choice, the metric in
its class whose mean divergence on the seen tasks is least compared with that on new ones.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.analysis import GapCurve, convergence_bound, follow_gap, largest_step, new_task_bound, plot_gaps
from lightning_metaopt.rules import DenseMirror, DiagonalMirror
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree

DIM, RADIUS, STEPS, DELTA = 10, 2.0, 300, 0.1
CURVATURES = torch.logspace(-1.5, 0, DIM, dtype=torch.float64)
SHAPES = {"x": (DIM,)}
META_SEEDS, META_STEPS = range(3), 100
TASKS, REPEATS, COUNTS = 200, 500, (5, 10, 20, 50, 100, 200, 500)


class Bowl(Task):
    """Separable quadratics with their minimum 0 at the origin."""

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        """The start."""
        return {"x": self.data["start"]}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        """The function."""
        return (self.data["curvature"] * params["x"].square()).sum(1) / 2


class Bowls(TaskFamily):
    """Curvatures with a spread of a tenth, none above 1; starts in a ball."""

    shapes = SHAPES

    def sample(self, generator: torch.Generator, size: int) -> Task:
        """New problems."""
        normal = torch.randn(2, size, DIM, generator=generator, dtype=torch.float64)
        curvature = (CURVATURES * (1 + 0.1 * normal[0])).clamp(0.02, 1.0)
        return Bowl({"curvature": curvature, "start": in_ball(normal[1], generator)})


def in_ball(directions: Tensor, generator: torch.Generator) -> Tensor:
    """Points uniform in the ball of radius 2, from normal ones."""
    far = torch.rand(*directions.shape[:-1], 1, generator=generator, dtype=torch.float64) ** (1 / DIM)
    return RADIUS * far * directions / directions.norm(dim=-1, keepdim=True)


def meta_train(seed: int) -> Tensor:
    """The diagonal of M: meta-steps on the divergence (k = gamma = 0), through 200 inner steps of eta = 1."""
    rule = DiagonalMirror(SHAPES, lr=1.0, metric=1.5).double()
    optimizer = partial(torch.optim.Adam, lr=0.05)
    learner = lmo.MetaLearner(
        rule,
        Bowls(),
        lmo.Unrolled(200),
        lmo.objectives.MirrorBound(),
        optimizer,
        tasks=20,
        steps_per_epoch=META_STEPS,
        val_tasks=0,
        seed=seed,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    lmo.MetaLoop(max_epochs=1, gradient_clip_val=10.0, **quiet).fit(learner)
    return rule.log_metric["x"].detach().exp()


def gaps(metric: Tensor, lr: float, task: Task, steps: int) -> GapCurve:
    """Mirror descent in the metric (a diagonal or a matrix) on every problem, and Theorem 3.1."""
    rule = DiagonalMirror(SHAPES, lr=lr).double() if metric.dim() == 1 else DenseMirror(SHAPES, lr=lr).double()
    with torch.no_grad():
        if isinstance(rule, DiagonalMirror):
            rule.log_metric["x"].copy_(metric.log())
        else:
            root = torch.linalg.cholesky(metric)
            rule.factor.copy_(root.tril(-1) + root.diagonal().log().diag())
    episode = lmo.episode.start(rule, task)
    divergence = rule.divergence(episode.params).detach()
    return follow_gap(rule, episode, steps, divergence=divergence, lr=lr, optimum=torch.zeros(task.size, dtype=torch.float64))


def theorem_3_1(folder: Path) -> list[list[object]]:
    """Gaps and bounds of several metrics on new problems."""
    task = Bowls().draw(seed=100, size=TASKS)
    worst = float(task.data["curvature"].max())
    one = torch.ones(DIM, dtype=torch.float64)
    metrics = {"identity": [one], "meta-trained": [meta_train(seed) for seed in META_SEEDS], "mean curvatures, known": [CURVATURES]}
    rows: list[list[object]] = []
    curves = {}
    for label, variants in metrics.items():
        for name, step in (
            ("step of the theorem", lambda m: largest_step(float(m.min()), worst)),
            ("step by relative smoothness", lambda m: 1 / (2 * float((task.data["curvature"] / m).max()))),
        ):
            found = [gaps(metric, step(metric), task, STEPS) for metric in variants]
            last = torch.stack([torch.stack([curve.averaged[-1].mean(), curve.bound[-1].mean()]) for curve in found])
            held = all(curve.holds() for curve in found)
            rows.append(["3.1", f"{label}, {name}", STEPS, *(float(value) for value in last.mean(0)), "yes" if held else "NO"])
            if label == "identity" and name != "step of the theorem":
                continue  # both steps are one
            if label != "mean curvatures, known":
                curves[f"{label}, {name}"] = found[0]
    plot_gaps(curves, folder / "theorem_3_1.png")
    return rows


def hopeful(away: Tensor, distance: float) -> Tensor:
    """The metric with ``|M - I|_F = distance`` whose mean divergence on the seen tasks is least compared with that on new ones."""
    second = away.mT @ away / away.shape[-2]
    deviation = second - RADIUS**2 / (DIM + 2) * torch.eye(DIM, dtype=torch.float64)
    return torch.eye(DIM, dtype=torch.float64) - distance * deviation / deviation.norm(dim=(-2, -1), keepdim=True)


def theorem_4_1(folder: Path, distances: Sequence[float] = (0.0, 0.9), steps: int = 100) -> list[list[object]]:
    """How often the bound fails, and how far it is from the gap, by the number of tasks."""
    from matplotlib.figure import Figure

    generator, new = torch.Generator().manual_seed(0), Bowls().draw(seed=101, size=2000)
    rows: list[list[object]] = []
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    for axes, distance in zip(figure.subplots(1, 2, sharey=True), distances, strict=True):
        lines: dict[str, list[float]] = {"bound, corrected": [], "bound, as printed": [], "without complexity terms": []}
        truth, gap = [], []
        for count in COUNTS:
            away = in_ball(torch.randn(REPEATS, count, DIM, generator=generator, dtype=torch.float64), generator)
            metrics = hopeful(away, distance)
            divergences = torch.einsum("rni,rij,rnj->rn", away, metrics, away) / 2
            smallest = torch.linalg.eigvalsh(metrics)[:, 0]
            rates = smallest / 2  # L = 1
            expected = convergence_bound(metrics.diagonal(dim1=1, dim2=2).sum(1) * RADIUS**2 / (DIM + 2) / 2, 1.0, steps) / rates
            plain = convergence_bound(divergences.mean(1), 1.0, steps) / rates
            whole = torch.stack(
                [new_task_bound(one, float(lr), steps, distance, RADIUS, DELTA) for one, lr in zip(divergences, rates, strict=True)]
            )
            printed = plain + printed_terms(count, distance)
            for values, (name, line) in zip((whole, printed, plain), lines.items(), strict=True):
                line.append(float(values.median()))
                rows.append(["4.1", f"C = {distance:g}, {name}", count, float((values < expected).double().mean()), line[-1], ""])
            truth.append(float(expected.median()))
            gap.append(float(gaps(metrics[0], float(rates[0]), new, steps).averaged[-1].mean()))
        for (name, line), look in zip(lines.items(), ("--", ":", "-."), strict=True):
            axes.plot(COUNTS, line, look, label=name)
        axes.plot(COUNTS, truth, label="Theorem 3.1, expected on new tasks")
        axes.plot(COUNTS, gap, "k-", label="gap on 2,000 new tasks")
        axes.set(xscale="log", yscale="log", xlabel="tasks seen, n", title=f"metrics with ||M - I|| = {distance:g}")
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel(f"loss above the optimum, T = {steps}")
    figure.axes[0].legend(fontsize=8, loc="upper right")
    figure.savefig(folder / "theorem_4_1.png", dpi=130)
    return rows


def printed_terms(count: int, distance: float) -> float:
    """The complexity terms of Eq. 9 as the paper has them."""
    deviation = 3 * float(torch.tensor(2 / DELTA).log() / (8 * count)) ** 0.5
    return distance * RADIUS**2 * (1 / (2 * count**0.5) + deviation)


def main(folder: Path) -> list[str]:
    """Write table and pictures; the lines of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*theorem_3_1(folder), *theorem_4_1(folder)]
    head = ["theorem", "what", "T or n", "measured: gap, or fraction of failures", "bound", "holds everywhere"]
    with (folder / "bounds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return lines + [f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row)} |" for row in rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bounds"))))
