"""What meta-training did and what it cost, in plain numbers that go into checkpoints and plots."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Cost", "Ledger"]


@dataclass
class Cost:
    """What meta-training has cost so far, validation included.

    Attributes:
        gradient_evaluations: evaluations of an inner gradient, summed over all problems and processes.
        seconds: wall-clock time of training.
    """

    gradient_evaluations: int = 0
    seconds: float = 0.0


class Ledger:
    """Keeps :class:`Cost`, one row of floats for each logged meta-step or validation, and the latest validation curve.

    >>> ledger = Ledger()
    >>> ledger.write(0, {"val_loss": 2.0})
    >>> ledger.write(0, {"meta_loss": 3.0})
    >>> ledger.history
    [{'step': 0, 'val_loss': 2.0, 'meta_loss': 3.0}]
    """

    def __init__(self) -> None:
        self.cost = Cost()
        self.history: list[dict[str, float]] = []
        self.val_curve: list[float] = []
        self._clock: float | None = None

    def start_clock(self) -> None:
        """Count seconds from now on."""
        self._clock = time.perf_counter()

    def tick(self) -> None:
        """Add the time since the last call to the cost."""
        now = time.perf_counter()
        if self._clock is not None:
            self.cost.seconds += now - self._clock
            self._clock = now

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures to the row of a meta-step."""
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1].update(figures)

    def has(self, figure: str, step: int) -> bool:
        """Whether the latest row is that of ``step`` and has this figure."""
        return bool(self.history) and self.history[-1]["step"] == step and figure in self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and numbers."""
        return {"cost": asdict(self.cost), "history": [dict(row) for row in self.history], "val_curve": list(self.val_curve)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.cost = Cost(**state["cost"])
        self.history = [dict(row) for row in state["history"]]
        self.val_curve = list(state["val_curve"])
