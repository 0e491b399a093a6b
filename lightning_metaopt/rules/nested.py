"""Rules that are arguments of other rules, and how they stand in those rules' configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_metaopt.rule import Rule

__all__ = ["made", "spec"]


def spec(rule: Rule) -> dict[str, Any]:
    """The JSON form of a rule, without the values of phi: ``{"class": name, "init": arguments}``."""
    return {"class": type(rule).__qualname__, "init": rule.config}


def made(rule: Rule | Mapping[str, Any]) -> Rule:
    """The rule itself, or one of this package made from its :func:`spec`.

    Raises:
        ValueError: for a class that is not of this package.
    """
    if isinstance(rule, Rule):
        return rule
    from lightning_metaopt import rules

    name = rule.get("class", "")
    cls = getattr(rules, name) if name in rules.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, Rule)):
        raise ValueError(
            f"{name!r} is no rule of this package; pass the rule itself in place of its text (load_rule takes it by name)"
        )
    return cls(**rule.get("init", {}))
