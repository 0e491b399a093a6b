"""Many seeds at once on quadratics, as plain loops: the tables and figures of ``results/episodes``.

    python recipes/gpc/quadratic_episodes.py [FOLDER] [EPISODES]

Algorithm 1 with scalar, diagonal and full M, and Algorithm 6 with scalar M in a box. The loops are those that the tests hold
``Counterfactual`` and ``ZerothOrder`` to; here all seeds are rows of one array, so that hundreds of episodes are quick.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STEPS, ETA = 50, 0.1


def spectrum(dim: int, condition: float) -> Array:
    """Eigenvalues, the largest 1."""
    return np.geomspace(1 / condition, 1.0, dim)


def frozen(m: Array, eigen: Array, starts: Array) -> Array:
    """Mean loss of an episode with fixed scalar M (seeds, H) or one step size; one value for each seed."""
    x = np.repeat(starts[None], len(m), 0)
    met = np.zeros((m.shape[1], *x.shape))
    total = np.zeros(len(m))
    for _ in range(STEPS):
        g = eigen * x
        total += (x * g).sum(-1).mean(1) / 2
        met = np.concatenate([g[None], met[:-1]])
        x = x - ETA * g - np.einsum("sh,hsbd->sbd", m, met)
    return total / STEPS


def bandit(dim: int, rates: Array, baselines: Array, snapshots: list[int], history: int = 3) -> tuple[dict[int, Array], Array]:
    """Algorithm 6, a row for each rate and baseline (NaN for none): M after so many episodes, and losses (episodes, rows)."""
    random = np.random.default_rng(0)
    eigen, radius, box, memory, count = spectrum(dim, 10.0), 0.1, 0.5, 3, len(rates)
    m, means = np.zeros((count, history)), np.full((STEPS, count), np.nan)
    waiting: list[Array] = []
    paid, k, found = np.zeros((snapshots[-1], count)), 0, {}
    for episode in range(snapshots[-1]):
        x, met, us = np.ones((count, dim)), np.zeros((count, history, dim)), []
        loss = (eigen * x * x).sum(1) / 2
        for t in range(STEPS):
            u = random.standard_normal((count, history))
            u /= np.sqrt((u * u).sum(1, keepdims=True))
            us = [u, *us][:memory]
            met[:, 1:], met[:, 0] = met[:, :-1].copy(), eigen * x
            paid[episode] += loss / STEPS
            x = x - ETA * met[:, 0] - ((m + radius * u)[:, None] @ met)[:, 0]
            loss = (eigen * x * x).sum(1) / 2
            mean = np.where(np.isnan(means[t]), loss, means[t])
            means[t] = baselines * mean + (1 - baselines) * loss  # NaN without
            known = np.where(np.isnan(baselines), 0.0, mean)
            waiting.append(history / radius * (loss - known)[:, None] * sum(us) * (len(us) == memory))
            k += 1
            if len(waiting) > memory - 1:
                m = (m - rates[:, None] * k**-0.75 * waiting.pop(0)).clip(-box, box)
        if episode + 1 in snapshots:
            found[episode + 1] = m
    return found, paid


def control(kind: str, rates: Array, starts: Array, history: int = 4) -> Array:
    """Algorithm 1, L = 2, from starts (episodes, rows, d), a meta rate for each row: mean losses, (episodes, rows)."""
    episodes, count, dim = starts.shape
    eigen = spectrum(dim, 100.0)
    m, paid = np.zeros((count, history, dim, dim)), np.zeros((episodes, count))
    for episode in range(episodes):
        x = starts[episode]
        path, met = [x], [np.zeros_like(x)] * (history + 1)  # the newest first
        for t in range(STEPS):
            g = eigen * x
            paid[episode] += (x * g).sum(1) / 2 / STEPS
            met = [g, *met][: history + 1]
            old, older = np.stack(met[:-1], 1), np.stack(met[1:], 1)
            x = x - ETA * g - (m @ old[..., None])[..., 0].sum(1)
            path.append(x)
            if t + 1 >= history + 1:
                y = path[t - 1]
                for lags in (older, old):
                    y = y - ETA * eigen * y - (m @ lags[..., None])[..., 0].sum(1)
                late = eigen * y
                first = late - ETA * eigen * late
                grad = -late[:, None, :, None] * old[:, :, None] - first[:, None, :, None] * older[:, :, None]
                if kind != "full":
                    parts = np.einsum("shii->shi", grad)
                    parts = parts.sum(-1, keepdims=True) * np.ones(dim) if kind == "scalar" else parts
                    grad = parts[..., None] * np.eye(dim)
                m = m - rates[:, None, None, None] * grad
    return paid


def first_order(lr: float, momentum: float, starts: Array, eigen: Array) -> float:
    """Mean loss of an episode of gradient descent or heavy ball."""
    x, v, total = starts, np.zeros_like(starts), 0.0
    for _ in range(STEPS):
        g = eigen * x
        total += float((x * g).sum(1).mean()) / 2 / STEPS
        v = momentum * v + g
        x = x - lr * v
    return total


def of_kinds(folder: Path) -> None:
    """The three forms of M, each with its best of 12 meta rates, beside gradient descent and momentum with the best of 12."""
    rows: list[list[object]] = []
    curves, eigen, lines = {}, spectrum(6, 100.0), {}
    starts = np.random.default_rng(1).standard_normal((30, 10, 6))  # the same for all: seeds 0-4 to choose, 5-9 to report
    chosen, reported = starts[-10:, :5].reshape(-1, 6), starts[-10:, 5:].reshape(-1, 6)
    for name, rates, momenta in (
        ("GD", np.linspace(0.5, 1.95, 12), [0.0]),
        ("momentum", np.linspace(0.5, 1.95, 4), [0.3, 0.5, 0.8]),
    ):
        best = min((first_order(rate, b, chosen, eigen), rate, b) for rate in rates for b in momenta)
        lines[f"{name}, tuned"] = first_order(*best[1:], reported, eigen)
        spread = np.std([first_order(*best[1:], starts[-10:, seed], eigen) for seed in range(5, 10)], ddof=1)
        rows.append([f"{name}, tuned (lr {best[1]:.3g}, momentum {best[2]:g})", lines[f"{name}, tuned"], spread, ""])
    lines["GD, lr 0.1"] = first_order(ETA, 0.0, reported, eigen)
    rows.append(["GD, lr 0.1", lines["GD, lr 0.1"], "", ""])
    rates = np.geomspace(0.003, 3.0, 12)
    for kind in ("scalar", "diagonal", "full"):
        with np.errstate(all="ignore"):
            paid = control(kind, np.repeat(rates, 10), np.tile(starts, (1, 12, 1))).reshape(30, 12, 10)
        last = np.where(np.isfinite(paid).all(0), paid[-10:].mean(0), np.inf)
        which = int(last[:, :5].mean(1).argmin())  # chosen on five seeds, reported on five others
        curves[f"GPC, {kind} M (meta rate {rates[which]:.2g})"] = paid[:, which, 5:]
        spread = last[which, 5:].std(ddof=1)
        rows.append([f"GPC, {kind} M (meta rate {rates[which]:.2g})", last[which, 5:].mean(), spread, paid[0, which, 5:].mean()])
    _write(folder / "kinds.csv", ["method", "mean loss, episodes 21-30", "sd over 5 seeds", "episode 1"], rows)
    _draw(folder / "kinds.png", curves, lines, "Algorithm 1: condition 100, d = 6")


def of_bandits(folder: Path, episodes: int) -> None:
    """Algorithm 6 beside no controller and the best one of a grid."""
    rows: list[list[object]] = []
    settings = [(0.1, np.nan), (0.01, np.nan), (0.1, 0.9), (1.0, 0.9)]
    snapshots = sorted({10, min(300, episodes), episodes})
    for dim in (5, 2):
        eigen, one = spectrum(dim, 10.0), np.ones((1, dim))
        grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 21)] * 3, indexing="ij"), -1).reshape(-1, 3)
        values = frozen(grid, eigen, one)
        best = int(np.nanargmin(values))
        nothing = float(frozen(np.zeros((1, 3)), eigen, one)[0])
        rows.append([dim, "M = 0", "", "", nothing, "", 1.0])
        label = f"best of a grid in the box, M = {grid[best].round(2).tolist()}"
        rows.append([dim, label, "", "", values[best], "", values[best] / nothing])
        rates, baselines = (np.repeat([setting[i] for setting in settings], 8) for i in (0, 1))
        found, paid = bandit(dim, rates, baselines, snapshots)
        curves = {}
        for index, (rate, baseline) in enumerate(settings):
            own = slice(8 * index, 8 * index + 8)
            label = "one point" if np.isnan(baseline) else "one point, baseline 0.9"
            if np.isfinite(paid[:, own]).all() and paid[:, own].max() < 1e3:  # what diverged is in the table
                curves[f"{label}, c = {rate}"] = paid[:300, own]
            for count, m in found.items():
                value = frozen(m[own], eigen, one)
                rows.append([dim, label, rate, count, value.mean(), value.std(ddof=1), value.mean() / nothing])
    lines = {"M = 0": nothing, "best in the box": float(values[best])}
    _draw(folder / "bandit.png", curves, lines, "Algorithm 6: condition 10, d = 2")
    header = ["d", "method", "c", "episodes", "loss/step, frozen M", "sd over 8 seeds", "over M = 0"]
    _write(folder / "bandit.csv", header, rows)


def _write(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([[f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    print(path.read_text())


def _draw(path: Path, curves: dict[str, Array], lines: dict[str, float], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, paid in curves.items():
        smooth = np.stack([np.convolve(row, np.ones(5) / 5, "valid") for row in paid.T])
        mean, spread = smooth.mean(0), smooth.std(0, ddof=1)
        axes.plot(np.arange(5, len(mean) + 5), mean, label=label)
        axes.fill_between(np.arange(5, len(mean) + 5), mean - spread, mean + spread, alpha=0.2)
    for index, (label, value) in enumerate(lines.items()):
        axes.axhline(value, color="0.3", linestyle=["--", ":", "-."][index], label=label)
    axes.set_xlabel("episode (running mean of 5)")
    axes.set_ylabel("mean loss of the episode")
    axes.set_yscale("log")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/gpc_episodes")
    target.mkdir(parents=True, exist_ok=True)
    of_kinds(target)
    of_bandits(target, int(sys.argv[2]) if len(sys.argv) > 2 else 300)
