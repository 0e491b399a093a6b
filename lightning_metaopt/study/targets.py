"""Metrics that depend on a number to reach, which a study can take from its other runs."""

from __future__ import annotations

import copy
import math
from abc import ABC
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Self, final

from lightning_metaopt.study.records import MethodResult, Result
from lightning_metaopt.study.run_metric import Mode, Point, RunMetric, Smoothed, mean, points_of, running_mean

__all__ = ["Regret", "StepsToTarget", "TimeToTarget"]


class _ToTarget(Smoothed, ABC):
    censored: ClassVar[bool] = True

    def __init__(
        self,
        metric: str | None = None,
        target: float | Literal["best baseline"] = "best baseline",
        smooth: int = 1,
        mode: Mode | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(f"{self.unit} to target" if name is None else name, metric, mode, smooth)
        if isinstance(target, str) and target != "best baseline":
            raise ValueError(f"target must be a number or 'best baseline', got {target!r}")
        self.target = target

    @property
    def larger_is_better(self) -> bool:
        return False

    def reached(self, points: Sequence[Point]) -> Point | None:
        """The first point at or beyond the target."""
        if isinstance(self.target, str):
            raise ValueError("what the best baseline reaches is known only in a study; give the target as a number")
        sign = -1.0 if self.mode == "max" else 1.0
        smooth = running_mean(points, self.smooth)
        return next((point for point, value in zip(points, smooth, strict=True) if sign * value <= sign * self.target), None)

    def of(self, result: Result) -> float:
        # A run without a curve, or without a target to reach, has no figure; a test score is no point in time.
        points = points_of(result, self.metric)
        undefined = not points or (isinstance(self.target, float) and math.isnan(self.target))
        return math.nan if undefined else self.figure(points)

    def resolved(self, methods: Mapping[str, MethodResult], ordinary: Collection[str]) -> Self:
        if self.target != "best baseline":
            return self
        tails = {}
        for name in ordinary:
            curves = [points_of(run, self.metric) for run in methods[name].runs.values()]
            values = [running_mean(points, self.smooth)[-1] if points else math.nan for points in curves]
            tails[name] = mean(values) if values else math.nan
        finite = [value for value in tails.values() if math.isfinite(value)]
        fixed = copy.deepcopy(self)
        fixed.target = (max if self.mode == "max" else min)(finite, default=math.nan)
        return fixed


@final
class StepsToTarget(_ToTarget):
    """Inner steps until the metric is first at its target (at most, or at least with ``mode="max"``); infinite if it never is.

    Args:
        metric: the curve to read; by default the run's first.
        target: a number, or ``"best baseline"``: the mean final value of the best ordinary optimizer on the same problem.
        smooth: running means over so many points are compared; a noisy curve touches any target early.
        mode: whether small or large is good.
        name: how tables call it; two targets need two names.

    >>> metric = StepsToTarget(target=0.5)
    >>> for step, loss in [(10, 0.9), (20, 0.4), (30, 0.6)]:
    ...     metric.update(step, loss)
    >>> metric.compute().item()
    20.0
    """

    unit: ClassVar[str] = "steps"

    def figure(self, points: Sequence[Point]) -> float:
        found = self.reached(points)
        return math.inf if found is None else float(found.step)


@final
class TimeToTarget(_ToTarget):
    """Seconds until the target, validation not counted; as :class:`StepsToTarget`."""

    unit: ClassVar[str] = "seconds"

    def figure(self, points: Sequence[Point]) -> float:
        found = self.reached(points)
        return math.inf if found is None else found.seconds


@final
class Regret(RunMetric):
    r"""Regret :math:`\sum_t (f_t - f^*)` over steps; where only every k-th step was recorded, its value stands for all k.

    Args:
        metric: the curve to read; by default the run's first.
        optimum: f*, or ``"best known"``: the best value of any run on the same problem.
        mode: with ``"max"``, :math:`f^* - f_t`.
        name: how tables call it.

    >>> metric = Regret(optimum=1.0)
    >>> metric.update(0, 9.0); metric.update(1, 3.0); metric.update(3, 1.5)  # 1 * 2 + 2 * 0.5
    >>> metric.compute().item()
    3.0
    """

    def __init__(
        self,
        metric: str | None = None,
        optimum: float | Literal["best known"] = "best known",
        mode: Mode | None = None,
        name: str = "regret",
    ) -> None:
        super().__init__(name, metric, mode)
        if isinstance(optimum, str) and optimum != "best known":
            raise ValueError(f"optimum must be a number or 'best known', got {optimum!r}")
        self.optimum = optimum

    @property
    def larger_is_better(self) -> bool:
        return False

    def figure(self, points: Sequence[Point]) -> float:
        if isinstance(self.optimum, str):
            raise ValueError("the best known value is found only in a study; give the optimum as a number")
        sign = -1.0 if self.mode == "max" else 1.0
        steps = [0, *(point.step for point in points)]
        gaps = [after - before for before, after in pairwise(steps)]
        return sum(gap * sign * (point.value - self.optimum) for gap, point in zip(gaps, points, strict=True) if gap)

    def resolved(self, methods: Mapping[str, MethodResult], ordinary: Collection[str]) -> Self:
        if self.optimum != "best known":
            return self
        runs = [run for method in methods.values() for run in method.runs.values()]
        values = [point.value for run in runs for point in points_of(run, self.metric) if math.isfinite(point.value)]
        fixed = copy.deepcopy(self)
        fixed.optimum = (max if self.mode == "max" else min)(values, default=math.nan)
        return fixed
