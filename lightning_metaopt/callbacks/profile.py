"""The picture of learned coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_metaopt.callbacks.drawing import History

__all__ = ["draw_profile"]

SHOWN = 6  # moments at which the profile is drawn


def draw_profile(histories: list[History], path: Path, title: str = "") -> None:
    """Draw one column for each optimizer: the profile :math:`\\eta e_1 + M` over lags, at a few moments and at the end, and below
    it its sum and its first entry over steps.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(histories), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(histories), squeeze=False, height_ratios=(2.2, 1))
    for number, history in enumerate(histories):
        _profiles(axes[0, number], history)
        _sums(axes[1, number], history)
        axes[0, number].set_title(title + (f", optimizer {number}" if len(histories) > 1 else ""))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _profiles(axis: Any, history: History) -> None:
    import matplotlib

    names = sorted(name for name in history.names() if name.startswith("profile/"))
    curves = [history.curve(name) for name in names]
    if curves:
        steps = curves[0][0]
        places = sorted({round(part * (len(steps) - 1) / (SHOWN - 1)) for part in range(SHOWN)})
        for order, place in enumerate(places):
            color = matplotlib.colormaps["viridis"](0.9 * (1 - (order + 1) / len(places)))
            last = place == len(steps) - 1
            values = [values[place] for _, values in curves]
            lags = range(1, len(names) + 1)
            axis.plot(lags, values, "o-" if last else "-", color=color, ms=3, lw=1.2, label=f"step {steps[place]}")
        axis.legend(fontsize=7, loc="best")
    axis.axhline(0, color="0.5", lw=0.8, ls=":")
    axis.set_xlabel("lag (1: the newest gradient)")
    axis.set_ylabel("coefficient, base step included")
    axis.grid(alpha=0.25)


def _sums(axis: Any, history: History) -> None:
    for name, label in (("total", "sum over lags"), ("newest", "of the newest gradient")):
        if name in history.names():
            axis.plot(*history.curve(name), lw=1.2, label=label)
    axis.set_xlabel("optimizer steps")
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="best")
