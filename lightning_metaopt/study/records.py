"""What is measured: runs, searches, costs, as plain values that can be stored as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Cost", "MethodResult", "Result", "Results", "Trial", "failures"]

Curve = list[tuple[int, float]]
"""``[(inner step, value), ...]``."""


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        curves: metric to ``[(inner step, value), ...]``.
        scores: single figures by name.
        gradient_evaluations: inner gradients that the run took for each problem.
        seconds: wall clock of the run.
        clock: ``[(inner step, seconds since the first step began), ...]``, not counting validation, at the steps of the first
            curve.
        peak_mb: peak memory of the run above what was held before it, in MB: device memory on an accelerator, the resident
            set elsewhere; not-a-number where the system does not tell.
    """

    curves: dict[str, Curve]
    scores: dict[str, float]
    gradient_evaluations: int
    seconds: float
    clock: Curve = field(default_factory=list)
    peak_mb: float = math.nan

    @property
    def diverged(self) -> bool:
        """Whether the run left the finite numbers."""
        values = [*self.scores.values(), *(value for curve in self.curves.values() for _, value in curve)]
        return not all(map(math.isfinite, values))

    def to_json(self) -> dict[str, Any]:
        """Plain containers, with the numbers that JSON does not have as text."""
        stored: dict[str, Any] = _plain(asdict(self))
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Result:
        """The inverse of :meth:`to_json`.

        >>> result = Result({"loss": [(0, 1.5), (1, math.inf)]}, {"loss@1": math.nan}, 1, 0.5, [(0, 0.0)])
        >>> str(Result.from_json(result.to_json())) == str(result)
        True
        """
        known = {item.name for item in fields(cls)}
        values = {key: value for key, value in stored.items() if key in known}
        values["curves"] = {name: _curve(curve) for name, curve in stored["curves"].items()}
        values["scores"] = {name: float(value) for name, value in stored["scores"].items()}
        values["clock"] = _curve(stored.get("clock", []))
        values["seconds"], values["peak_mb"] = float(stored["seconds"]), float(stored.get("peak_mb", math.nan))
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _curve(stored: Any) -> Curve:
    return [(int(step), float(value)) for step, value in stored]


@dataclass
class Cost:
    """What was spent: inner gradient evaluations (over all problems) and seconds of wall clock."""

    gradient_evaluations: float = 0.0
    seconds: float = 0.0

    def add(self, other: Cost) -> None:
        """Add another cost to this one."""
        self.gradient_evaluations += other.gradient_evaluations
        self.seconds += other.seconds


@dataclass(frozen=True)
class Trial:
    """One setting of a search and its score, the mean over the tuning seeds (infinite if a run diverged)."""

    options: dict[str, Any]
    score: float


@dataclass
class MethodResult:
    """Everything that was measured of one method on one problem.

    Attributes:
        trials: the search, in the order of the trials.
        chosen: the best trial's options.
        at_edge: searched options whose best value is the first or last tried.
        runs: one result for each seed.
        rules: file of the (meta-trained) rule of each seed.
        training: cost of one meta-training, the mean over seeds.
        search: cost of the search, meta-training included.
        learned: what the rule of each seed describes of itself.
        made_with: how many finished trials and runs were made with which versions; "" where that was not recorded.
        failed: the error that stopped the method; nothing else is given then. A run that diverged is none: it has a result.
    """

    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)
    at_edge: list[str] = field(default_factory=list)
    runs: dict[int, Result] = field(default_factory=dict)
    rules: dict[int, Path] = field(default_factory=dict)
    training: Cost = field(default_factory=Cost)
    search: Cost = field(default_factory=Cost)
    learned: dict[int, dict[str, float]] = field(default_factory=dict)
    made_with: dict[str, int] = field(default_factory=dict)
    failed: str = ""

    def scores(self) -> dict[str, list[float]]:
        """The figures of all seeds by metric; not-a-number where a run has none because its meta-training diverged."""
        metrics = dict.fromkeys(metric for run in self.runs.values() for metric in run.scores)
        return {metric: [run.scores.get(metric, math.nan) for run in self.runs.values()] for metric in metrics}


Results = dict[str, dict[str, MethodResult]]
"""Problem to method to what was measured."""


def failures(results: Results) -> dict[tuple[str, str], str]:
    """The errors of the methods that failed, by problem and method."""
    return {
        (problem, name): result.failed for problem, methods in results.items() for name, result in methods.items() if result.failed
    }
