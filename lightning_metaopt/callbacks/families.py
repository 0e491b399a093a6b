"""What kind of optimizer a param group belongs to, as far as its options tell."""

from __future__ import annotations

from typing import Any

__all__ = ["has_momentum", "normalizes"]


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether a param group averages over steps, as far as it tells; if it does not tell, ``True``."""
    found = [group[key] for key in ("momentum", "betas", "beta1", "beta") if key in group]
    return not found or any(bool(value[0] if isinstance(value, (tuple, list)) else value) for value in found)


def normalizes(group: dict[str, Any]) -> bool:
    """Whether the steps of a param group have a length of their own, whatever that of the gradients: Adam's family, RMSprop."""
    return "betas" in group or "eps" in group
