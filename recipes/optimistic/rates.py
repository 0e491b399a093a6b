"""Rates of convergence beside what theory promises: the figure and the table of ``results/rates``.

    python recipes/optimistic/rates.py [FOLDER] [STEPS]

Nothing is random but the problems, whose seeds are fixed.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_metaopt.online import OptimisticFTRL, accelerated_bound, gap_bound, hint_accuracy, slow_bound

D = torch.float64


@dataclass(frozen=True)
class Problem:
    """A convex function with its minimum 0 and constant of smoothness L."""

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    start: Tensor
    optimum: Tensor
    smoothness: float

    @property
    def distance(self) -> float:
        """How far the minimum is from the start."""
        return float((self.start - self.optimum).norm())


def quadratic() -> Problem:
    """Eigenvalues i^-4: many scales, none of them small enough to be left out."""
    eigenvalues = torch.arange(1, 51, dtype=D) ** -4
    start = torch.ones(50, dtype=D)
    return Problem(
        "quadratic, eigenvalues i^-4",
        lambda x: (eigenvalues * x.square()).sum() / 2,
        lambda x: eigenvalues * x,
        start,
        torch.zeros_like(start),
        1.0,
    )


def chain(dim: int = 1000) -> Problem:
    """Nesterov's function, on which no first-order method is faster than 1/T^2 (Nesterov 2004, section 2.1.2), with L = 1."""
    optimum = 1 - torch.arange(1, dim + 1, dtype=D) / (dim + 1)

    def gradient(x: Tensor) -> Tensor:
        e = torch.cat([x.new_zeros(1), x - optimum, x.new_zeros(1)])
        return (2 * e[1:-1] - e[:-2] - e[2:]) / 4

    return Problem(
        f"Nesterov's chain of {dim}",
        lambda x: (x - optimum) @ gradient(x) / 2,
        gradient,
        torch.zeros(dim, dtype=D),
        optimum,
        1.0,
    )


def logistic(dim: int = 50, rows: int = 200, ridge: float = 1e-5) -> Problem:
    """Logistic regression on random data with columns of very different size, solved by Newton's method."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(rows, dim, generator=generator, dtype=D) * torch.arange(1, dim + 1, dtype=D) ** -1.0
    signs = torch.sign(
        data @ torch.randn(dim, generator=generator, dtype=D) + 0.5 * torch.randn(rows, generator=generator, dtype=D)
    )

    def value(x: Tensor) -> Tensor:
        return nn.functional.softplus(-signs * (data @ x)).mean() + ridge * x @ x / 2

    def gradient(x: Tensor) -> Tensor:
        return -data.T @ (signs * torch.sigmoid(-signs * (data @ x))) / rows + ridge * x

    optimum = torch.zeros(dim, dtype=D)
    for _ in range(100):
        p = torch.sigmoid(data @ optimum)
        hessian = data.T @ ((p * (1 - p) / rows).unsqueeze(1) * data) + ridge * torch.eye(dim, dtype=D)
        step = torch.linalg.solve(hessian, gradient(optimum))
        size = 1.0
        while value(optimum - size * step) > value(optimum) and size > 1e-10:
            size /= 2
        optimum = optimum - size * step
    smoothness = float(torch.linalg.eigvalsh(data.T @ data)[-1]) / (4 * rows) + ridge
    least = value(optimum)
    return Problem("logistic regression", lambda x: value(x) - least, gradient, torch.zeros(dim, dtype=D), optimum, smoothness)


def huber(cap: float = 1e-3, left: float = 0.3) -> Problem:
    """Curvature 1 and then slope ``cap`` on the right of the minimum, curvature ``left`` on its left."""

    def value(x: Tensor) -> Tensor:
        right = torch.where(x > cap, cap * x - cap**2 / 2, x**2 / 2)
        return torch.where(x > 0, right, left * x**2 / 2).sum()

    one = torch.ones(1, dtype=D)
    return Problem(
        "Huber type, one unknown", value, lambda x: torch.where(x > 0, x.clamp(max=cap), left * x), one, torch.zeros_like(one), 1.0
    )


def run(problem: Problem, steps: int, lr: float, extrapolate: bool = False, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps, gradients and hints of rounds 1 to ``steps``; ``lr`` is in units of 1 / L."""
    x = nn.Parameter(problem.start.clone())
    optimizer = OptimisticFTRL([x], lr / problem.smoothness, **options)
    gaps, gradients, hints = [], [], [torch.zeros_like(problem.start)]
    for _ in range(steps):
        gaps.append(problem.value(x.detach()))
        gradients.append(problem.gradient(x.detach()))
        x.grad = gradients[-1].clone()
        change = gradients[-1] - gradients[-2] if len(gradients) > 1 and extrapolate else 0
        hints.append(gradients[-1] + change)
        optimizer.step(hint={"param0": hints[-1]} if extrapolate else None)
    return torch.stack(gaps), torch.stack(gradients), torch.stack(hints[:-1])


ACCURACY = 6.0  # assumed of the extrapolated hints; the table has the measured one, which is larger on two of the problems
METHODS: dict[str, dict[str, Any]] = {
    "gradient descent": {"lr": 1.0, "weights": 0.0, "hint": "none", "averaging": False},
    "Alg. 2, a = 1 (Theorem 1)": {"lr": 1.0, "weights": 0.0, "hint": "none"},
    "Alg. 2, a = t (Heavy Ball)": {"lr": 0.5, "hint": "none"},
    "Alg. 4, a = 1": {"lr": 0.5, "weights": 0.0},
    "Alg. 4, a = t (Corollary 1)": {"lr": 0.5, "ramp": True},
    "Alg. 4, a = t (Corollary 2)": {"lr": 0.5 / ACCURACY, "ramp": True, "extrapolate": True},
    "FISTA": {"lr": 1.0, "weights": "fista", "hint": "coupling", "coupling": 1.0},
}


def slope(gaps: Tensor, first: int, last: int) -> float:
    """Of log gap over log t, least squares over t = first ... last."""
    t, y = torch.arange(first, last + 1, dtype=D).log(), gaps[first - 1 : last].clamp(min=1e-300).log()
    return float(((t - t.mean()) * (y - y.mean())).sum() / (t - t.mean()).square().sum())


def bounds(problem: Problem, name: str, gradients: Tensor, hints: Tensor, counts: list[int]) -> dict[str, list[float]]:
    """The bounds that apply to a method, at the rounds ``counts``; they are for averages, and hints that are gradients."""
    options, smooth, distance = METHODS[name], problem.smoothness, problem.distance
    steps = len(gradients)
    t = torch.arange(1, steps + 1, dtype=D)
    alphas = t if "weights" not in options else torch.ones_like(t)
    betas = options["lr"] / smooth * ((t - 1) / t if options.get("ramp") else torch.ones_like(t))
    given = None if options.get("hint") == "none" else hints
    found: dict[str, list[float]] = {}
    if not options.get("averaging", True) or "coupling" in options:
        return found
    if not options.get("ramp"):  # rates that increase are outside of Eq. 5, and the first is 0
        found["Theorem 1" if given is None else "Theorem 2"] = [
            float(
                gap_bound(
                    alphas[:n], betas[:n], gradients[:n], gradients[:n], distance, smooth, None if given is None else given[:n]
                )
            )
            for n in counts
        ]
    if "Theorem 1" in name:
        found["Theorem 1, rate"] = [slow_bound(n, distance, smooth) for n in counts]
    if options.get("ramp"):
        accuracy = ACCURACY if options.get("extrapolate") else 1.0
        found["Corollary 2" if options.get("extrapolate") else "Corollary 1"] = [
            accelerated_bound(max(n, 2), distance, smooth, accuracy) for n in counts
        ]
    return found


def main(folder: Path, steps: int, dim: int = 1000) -> list[dict[str, Any]]:
    """Run everything, write ``rates.csv`` and ``rates.png``; the rows of the table."""
    from matplotlib.figure import Figure

    problems = [quadratic(), chain(dim), logistic(), huber()]
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplots(3, 2).flatten()
    rows = []
    t = torch.arange(1, steps + 1)
    counts = sorted({min(steps, round(1.25**k)) for k in range(1, 60)} - {1})
    for problem, axis in zip(problems, axes, strict=False):
        for number, (name, options) in enumerate(METHODS.items()):
            gaps, gradients, hints = run(problem, steps, **options)
            late = min(300, steps // 3)
            shape = [math.nan, math.nan] if "Huber" in problem.name else [slope(gaps, 10, 100), slope(gaps, late, steps)]
            accuracy = float(hint_accuracy(gradients, hints, gradients)) if options.get("extrapolate") else None
            row: dict[str, Any] = {"problem": problem.name, "method": name, "slope 10-100": shape[0], "slope late": shape[1]}
            row |= {"final gap": float(gaps[-1]), "sup t^2 gap / (L d^2)": worst(problem, gaps), "hint accuracy": accuracy}
            found = bounds(problem, name, gradients, hints, counts)
            row["largest gap / bound"] = "; ".join(
                f"{bound}: {max(float(gaps[n - 1]) / value for n, value in zip(counts, values, strict=True)):.3f}"
                for bound, values in found.items()
            )
            rows.append(row)
            color = f"C{number}"
            if problem.name.startswith("Huber"):
                curve = t**2 * gaps / (problem.smoothness * problem.distance**2)
                axis.plot(t, curve, color=color, lw=1.3, label=name)
            else:
                axis.plot(t, gaps.clamp(min=1e-18), color=color, lw=1.3, label=f"{name}: {shape[0]:.2f}, {shape[1]:.2f}")
            if problem is problems[1] and found:
                beside = axes[4] if options.get("ramp") else axes[5]
                beside.plot(t, gaps, color=color, lw=1.3, label=f"{name}, gap")
                for bound, values in found.items():
                    dashes = ":" if "rate" in bound else "--"
                    beside.plot(counts, values, color=color, lw=1.3, ls=dashes, label=f"{bound}, bound")
        axis.set_title(problem.name + ("" if problem is problems[3] else ": f - f*, with slopes early and late"))
    axes[3].set_ylim(1e-4, 1e4)  # the fast ones leave the frame
    axes[3].axhline(2, color="0.4", lw=0.8, ls=":")
    axes[3].set_title(f"{problems[3].name}: t² (f - f*) / (L d²), in theory at most 2")
    axes[4].set_title(f"{problems[1].name}: bounds of the corollaries")
    axes[5].set_title(f"{problems[1].name}: bounds of the theorems")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="round t")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "rates.png", dpi=110)
    with (folder / "rates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def worst(problem: Problem, gaps: Tensor) -> float:
    """The largest t^2 (f - f*) / (L d^2) of all rounds."""
    t = torch.arange(1, len(gaps) + 1, dtype=D)
    return float((t**2 * gaps).max()) / (problem.smoothness * problem.distance**2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "recipes/optimistic/results/rates"),
        int(sys.argv[2]) if len(sys.argv) > 2 else 2000,
    ):
        print(
            f"{row['problem']:28} {row['method']:28} {row['slope 10-100']:6.2f} {row['slope late']:6.2f} {row['final gap']:9.2e} "
            f"{row['sup t^2 gap / (L d^2)']:9.3g}  {row['largest gap / bound']}"
            + ("" if row["hint accuracy"] is None else f"; hint accuracy {row['hint accuracy']:.1f}")
        )
