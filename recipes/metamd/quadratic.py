"""Figure 1 of MetaMD: a diagonal metric learned on two families of quadratics in the plane, beside tuned optimizers.

    python recipes/metamd/quadratic.py [FOLDER]      # about a minute of CPU time; writes quadratic.csv and quadratic.png

Problems are theta' Q theta - b' theta with independent Gaussian entries of a diagonal Q (means 0.3 and 14, or 0.02 and 14; standard
deviations a tenth of that), b ~ N((1, 1), I) and a start ~ N(0, 9 I); standard deviations and start are ours, the paper gives none.
The metric is that of ``DiagonalMirror``, its meta-gradient that of ``ForwardMode`` (Eqs. 51 to 53) for the mean divergence. The
loops here hold all problems and all settings of an optimizer in one array; a test holds them to the package.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Step = Callable[[Array, Array, int], Array]
FAMILIES = {"means 0.3 and 14": (0.3, 14.0), "means 0.02 and 14": (0.02, 14.0)}
INNER, META, TASKS, LIMIT, ENOUGH = 1500, 400, 20, 30_000, 1e-5
META_SEEDS, TEST_SEEDS = range(3), range(100, 105)


def sample(means: tuple[float, float], count: int, seed: int) -> tuple[Array, Array, Array]:
    """Second derivatives h = 2 diag(Q), b and starting points, each (count, 2)."""
    random = np.random.default_rng(seed)
    h = 2 * np.array(means) * (1 + 0.1 * random.standard_normal((count, 2)))
    return h, 1 + random.standard_normal((count, 2)), 3 * random.standard_normal((count, 2))


def meta_gradient(logs: Array, tasks: tuple[Array, Array, Array], steps: int = INNER) -> tuple[float, Array]:
    """Mean divergence B(theta_T, theta_1) and its whole derivative by the logarithms of the metric, in forward mode (eta = 1)."""
    h, b, start = tasks
    metric, theta, tangent = np.exp(logs), start, np.zeros_like(start)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            g = h * theta - b
            tangent = tangent - (h * tangent - g) / metric
            theta = theta - g / metric
        away = theta - start
        value = (metric * away**2).sum(1) / 2
        return float(value.mean()), (metric * away**2 / 2 + metric * away * tangent).mean(0)


def meta_train(means: tuple[float, float], seed: int) -> Array:
    """The learned metric: Adam (0.05) on its logarithms from 40, 20 new problems a meta-step, gradients clipped to norm 10.

    A coordinate in which inner loops diverge so far that its derivative overflows counts as one of large negative slope.
    """
    logs, first, second = np.full(2, np.log(40.0)), np.zeros(2), np.zeros(2)
    for step in range(1, META + 1):
        _, grad = meta_gradient(logs, sample(means, TASKS, 10_000 * (seed + 1) + step))
        grad = np.where(np.isfinite(grad), grad, -1e100).clip(-1e100, 1e100)
        grad = grad * min(1.0, 10 / float(np.linalg.norm(grad)))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        logs = logs - 0.05 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return np.exp(logs)


def iterations(step: Step, tasks: tuple[Array, Array, Array], settings: int) -> Array:
    """Steps until the gradient is shorter than 1e-5, at most 30,000; (settings, problems)."""
    h, b, start = tasks
    theta, found = np.repeat(start[None], settings, 0), np.full((settings, len(h)), float(LIMIT))
    with np.errstate(over="ignore", invalid="ignore"):  # settings that diverge
        for count in range(LIMIT):
            g = h * theta - b
            met = np.linalg.norm(g, axis=2) < ENOUGH
            found = np.where(met & (found == LIMIT), count, found)
            running = ~met & np.isfinite(g).all(2)
            if not (running & (found == LIMIT)).any():
                break
            theta = theta + step(np.where(np.isfinite(g), g, 0.0), theta, count + 1)
    return found


def descent(metric: Array) -> Step:
    """Mirror descent, g / metric, with metrics (settings, 2)."""
    return lambda g, _theta, _count: -g / metric[:, None]


def momentum(lr: Array, mu: Array) -> Step:
    """Heavy ball in PyTorch's convention."""
    memory: list[Array] = []

    def step(g: Array, _theta: Array, _count: int) -> Array:
        memory[:] = [mu[:, None, None] * memory[0] + g if memory else g]
        return -lr[:, None, None] * memory[0]

    return step


def adam(lr: Array, beta1: Array, beta2: Array) -> Step:
    """Adam, eps = 1e-8."""
    memory: list[Array] = []
    one, two = beta1[:, None, None], beta2[:, None, None]

    def step(g: Array, _theta: Array, count: int) -> Array:
        m, v = memory or [np.zeros_like(g), np.zeros_like(g)]
        memory[:] = [one * m + (1 - one) * g, two * v + (1 - two) * g**2]
        return -lr[:, None, None] * memory[0] / (1 - one**count) / (np.sqrt(memory[1] / (1 - two**count)) + 1e-8)

    return step


def baselines() -> dict[str, tuple[Callable[[Array], Step], Array]]:
    """How an optimizer is made of rows of options, and the rows that are tried: 60 for each."""
    momenta, betas = [0.7, 0.8, 0.9, 0.95], [(0.9, 0.999), (0.9, 0.99), (0.8, 0.99), (0.5, 0.99)]
    return {
        "SGD": (lambda o: descent(1 / np.repeat(o, 2, 1)), np.geomspace(0.01, 0.08, 60)[:, None]),
        "momentum": (
            lambda o: momentum(o[:, 0], o[:, 1]),
            np.array([(lr, mu) for lr in np.geomspace(0.005, 0.2, 15) for mu in momenta]),
        ),
        "Adam": (
            lambda o: adam(o[:, 0], o[:, 1], o[:, 2]),
            np.array([(lr, *pair) for lr in np.geomspace(0.01, 3.0, 15) for pair in betas]),
        ),
    }


def compare(name: str, means: tuple[float, float]) -> tuple[list[list[object]], dict[str, Step]]:
    """Rows of the table, and the optimizers with their best options for the picture."""
    tests = [sample(means, 30, seed) for seed in TEST_SEEDS]
    chosen: dict[str, list[tuple[str, Callable[[], Step]]]] = {}
    for method, (make, options) in baselines().items():
        tuned = []
        for seed in META_SEEDS:  # tuned on other problems, as often as MetaMD is meta-trained
            scores = iterations(make(options), sample(means, TASKS, 500 + seed), len(options)).mean(1)
            best = options[[int(scores.argmin())]]
            tuned.append((" ".join(f"{value:.3g}" for value in best[0]), lambda make=make, best=best: make(best)))
        chosen[method] = tuned
    learned = [meta_train(means, seed) for seed in META_SEEDS]
    for label, factor in (("MetaMD", 0.5), ("MetaMD, trained step size", 1.0)):
        chosen[label] = [(" ".join(f"{v:.3g}" for v in m), lambda m=m, factor=factor: descent(m[None] / factor)) for m in learned]
    mean = 2 * np.array([means])
    chosen["mean second derivatives, known"] = [(" ".join(f"{v:.3g}" for v in mean[0]), lambda: descent(mean))]
    rows: list[list[object]] = []
    for method, variants in chosen.items():
        counts = np.array([[iterations(make(), tasks, 1)[0] for tasks in tests] for _, make in variants])
        by_seed = counts.mean(2)  # meta-training (or tuning) seeds, test seeds
        figures = [float(by_seed.mean()), float(by_seed.std(ddof=1)), float(np.median(counts)), float((counts == LIMIT).mean())]
        rows.append([name, method, *figures, "; ".join(label for label, _ in variants)])
    return rows, {method: chosen[method][0][1]() for method in ("MetaMD", "SGD", "momentum", "Adam")}


def path_of(step: Step, task: tuple[Array, Array, Array]) -> Array:
    """Iterates of one problem until it is solved, (T, 2)."""
    h, b, theta = task[0][None], task[1][None], task[2][None]
    path = [theta[0, 0]]
    while len(path) <= LIMIT and np.linalg.norm(h * theta - b) >= ENOUGH:
        theta = theta + step(h * theta - b, theta, len(path))
        path.append(theta[0, 0])
    return np.array(path)


def main(folder: Path) -> list[str]:
    """Write table and figure; the lines of the table."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes, rows = figure.subplots(2, 4, squeeze=False), []
    for line, (name, means) in enumerate(FAMILIES.items()):
        found, steps = compare(name, means)
        rows += found
        h, b, start = task = sample(means, 1, 7)
        best, reach = b[0] / h[0], np.abs(start - b / h)[0].max() * 1.2
        for axis, (method, step) in zip(axes[line], steps.items(), strict=True):
            path = path_of(step, task)
            x, y = np.meshgrid(*(np.linspace(centre - reach, centre + reach, 200) for centre in best))
            axis.contour(x, y, h[0, 0] * (x - best[0]) ** 2 + h[0, 1] * (y - best[1]) ** 2, 12, colors="0.8", linewidths=0.6)
            axis.plot(path[:, 0], path[:, 1], "o-", ms=2, lw=0.8, color="C0")
            axis.plot(*start[0], "o", color="C2")
            axis.plot(*best, "o", color="C1")
            axis.set(title=f"{method}: {len(path) - 1} steps", xlim=(best[0] - reach, best[0] + reach))
            axis.set_ylim(best[1] - reach, best[1] + reach)
        axes[line, 0].set_ylabel(name)
    figure.savefig(folder / "quadratic.png", dpi=90)
    head = ["family", "method", "mean steps", "sd over seeds", "median", "unsolved", "options or metric, by seed"]
    with (folder / "quadratic.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return lines + [f"| {' | '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in row)} |" for row in rows]


if __name__ == "__main__":
    print("\n".join(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quadratic"))))
