"""One picture with one pair of axes, as all analyses draw it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["axes_into"]


@contextmanager
def axes_into(path: str | Path, *, legend: bool = True, fontsize: float = 8) -> Iterator[Any]:
    """Axes to draw on; what was drawn is in the file ``path``, whose suffix says the format, when the block ends without error.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    axes.grid(alpha=0.2)
    if legend:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=fontsize)  # clear of the curves
    figure.savefig(path, dpi=150)
