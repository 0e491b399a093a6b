"""Pictures of what the online callbacks have logged: step sizes, cosines, and how often steps were shortened."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer

from lightning_metaopt.callbacks.base import StepCallback

__all__ = ["DrawnStepCallback", "History", "draw"]

POINTS = 200
FEW = 8  # layers that can be told apart by colour, and have room in a legend


@final
class History:
    """Named figures over steps, of which at most ``POINTS`` are kept: whenever there are as many, every second one is left out,
    and from then on only every second one is taken. The last one is always there.

    >>> history = History()
    >>> for step in range(1, 1001):
    ...     history.add(step, {"factor": float(step)})
    >>> steps, values = history.curve("factor")
    >>> len(steps), steps[:3], steps[-1], values[-1]
    (126, [1, 9, 17], 1000, 1000.0)
    """

    def __init__(self) -> None:
        self.stride, self.count = 1, 0
        self.steps: list[int] = []
        self.values: dict[str, list[float]] = {}
        self.last: tuple[int, dict[str, float]] | None = None

    def add(self, step: int, figures: dict[str, float]) -> None:
        """The figures of one step; those that are missing are not a number."""
        self.last = (step, dict(figures))
        if self.count % self.stride == 0:
            for name in figures.keys() - self.values.keys():
                self.values[name] = [math.nan] * len(self.steps)
            self.steps.append(step)
            for name, column in self.values.items():
                column.append(figures.get(name, math.nan))
        self.count += 1
        if len(self.steps) >= POINTS:
            self.stride *= 2
            self.steps = self.steps[::2]
            self.values = {name: column[::2] for name, column in self.values.items()}

    def names(self) -> list[str]:
        """The names of all figures, in the order of the last step's."""
        last = {} if self.last is None else self.last[1]
        return list(dict.fromkeys([*last, *self.values]))

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure."""
        steps, values = list(self.steps), list(self.values.get(name, [math.nan] * len(self.steps)))
        if self.last is not None and (not steps or self.last[0] != steps[-1]):
            steps.append(self.last[0])
            values.append(self.last[1].get(name, math.nan))
        return steps, values

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain containers."""
        values = {name: list(column) for name, column in self.values.items()}
        return {"stride": self.stride, "count": self.count, "steps": list(self.steps), "values": values, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.stride, self.count, self.steps = state_dict["stride"], state_dict["count"], list(state_dict["steps"])
        self.values = {name: list(column) for name, column in state_dict["values"].items()}
        self.last = state_dict["last"] and (state_dict["last"][0], dict(state_dict["last"][1]))


class DrawnStepCallback(StepCallback, ABC):
    """A step callback that can draw what it has logged, when ``fit`` ends.

    Args:
        optimizer_index: see :class:`~lightning_metaopt.callbacks.base.StepCallback`.
        log: see there.
        draw: file for the picture, of any kind that matplotlib writes; a relative path is taken from the logger's folder, or
            without one from ``default_root_dir``. ``None`` for no picture. Process 0 writes it. What is drawn is what was
            logged, every ``log_every_n_steps`` steps of the ``Trainer``; it is part of the state, so that a resumed run draws
            the whole. It is at most 200 points of each figure.

    Raises:
        ValueError: for ``draw`` without ``log``.
    """

    def __init__(self, optimizer_index: int | None = None, log: bool = True, draw: str | os.PathLike[str] | None = None) -> None:
        super().__init__(optimizer_index, log)
        if draw is not None and not log:
            raise ValueError("what is drawn is what was logged; leave out log=False")
        self.draw = None if draw is None else Path(draw)
        self.histories: dict[int, History] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.histories = {}

    def report(self, pl_module: LightningModule, number: int, measured: dict[str, float]) -> None:
        super().report(pl_module, number, measured)
        if self.draw is not None:
            self.histories.setdefault(number, History()).add(self._batches, measured)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.draw is not None and self._trained:
            state["histories"] = {number: history.state_dict() for number, history in self.histories.items()}
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if self.draw is not None:
            self.histories = {}
            for number, saved in state.get("histories", {}).items():
                self.histories[number] = History()
                self.histories[number].load_state_dict(saved)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.draw is None or not trainer.is_global_zero:
            return
        if not self.histories:
            warnings.warn(
                f"{self.draw} was not drawn: training ended before anything was logged. Give the Trainer a smaller "
                "log_every_n_steps",
                UserWarning,
                stacklevel=2,
            )
            return
        folder = trainer.log_dir or trainer.default_root_dir
        self.picture([self.histories[number] for number in sorted(self.histories)], Path(folder) / self.draw)

    def picture(self, histories: list[History], path: Path) -> None:
        """Draw what each engine has logged into a file."""
        draw(histories, path, type(self).__name__)


def draw(histories: Iterable[History], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw one column for each optimizer: factors (the median of each layer, and the range from the 10 % to the 90 % quantile
    where there are few), and below them the cosine of gradient and last direction, and the share of shortened steps.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = list(histories)
    figure = Figure(figsize=(6.4 * len(found), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col", height_ratios=(2.2, 1))
    for number, history in enumerate(found):
        _factors(axes[0, number], history)
        _signs(axes[1, number], history)
        axes[0, number].set_title(title + (f", optimizer {number}" if len(found) > 1 else ""))
        axes[1, number].set_xlabel("optimizer steps")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _factors(axis: Any, history: History) -> None:
    import matplotlib

    layers = list(dict.fromkeys(name.split("/q")[0] for name in history.names() if name.split("/")[0] == "factor"))
    few = len(layers) <= FEW
    colors = matplotlib.colormaps["tab10" if few else "viridis"]
    shown = {round(place * (len(layers) - 1) / (FEW - 1)) for place in range(FEW)}  # with many: some of them
    lowest = math.inf
    for number, layer in enumerate(layers):
        color = colors(number if few else number / (len(layers) - 1))
        median = layer if layer in history.names() else f"{layer}/q50"
        label = layer.removeprefix("factor").removeprefix("/") or "all"
        axis.plot(*history.curve(median), color=color, lw=1.5, label=label if few or number in shown else None)
        if few and median != layer:
            steps, low = history.curve(f"{layer}/q10")
            axis.fill_between(steps, low, history.curve(f"{layer}/q90")[1], color=color, alpha=0.15, lw=0)
        ends = history.curve(f"{layer}/q10" if few and median != layer else median)[1]
        lowest = min([lowest, *(value for value in ends if not math.isnan(value))])
    if lowest > 0:
        axis.set_yscale("log")
    axis.axhline(1, color="0.5", lw=0.8, ls=":")
    axis.set_ylabel("factor on the step" if len(layers) == 1 else "factor on the step, by layer")
    axis.grid(alpha=0.25)
    if layers:
        axis.legend(fontsize=7, loc="best")


def _signs(axis: Any, history: History) -> None:
    for name, label, color in (("cosine", "cosine of gradient and last direction", "C0"), ("clip_rate", "shortened steps", "C3")):
        if name in history.names():
            axis.plot(*history.curve(name), color=color, lw=1.2, label=label)
    axis.set_ylim(-1.05, 1.05)
    axis.axhline(0, color="0.5", lw=0.8, ls=":")
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="best")
