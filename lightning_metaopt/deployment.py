"""What happens to a rule before it is put to work: a frozen copy, its identity, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.rule import Rule

__all__ = ["check_group", "check_same", "frozen", "identity", "with_labels"]


def frozen(rule: object) -> Rule:
    """A copy of the rule (or of the saved one of that name) that takes no gradients; the caller may still be training his.

    Raises:
        TypeError: if it is no rule.
        ValueError: if its meta-parameters are not finite.
    """
    if isinstance(rule, (str, os.PathLike)):
        from lightning_metaopt.storage import load_rule

        rule = load_rule(rule)
    if not isinstance(rule, Rule):
        hint = "; make an instance of it first" if isinstance(rule, type) else ""
        raise TypeError(f"rule must be a Rule, or the name or file of a saved one, got {rule!r}{hint}")
    for name, value in rule.named_parameters():
        if not torch.isfinite(value).all():
            raise ValueError(f"the meta-parameter {name!r} of {type(rule).__name__} is not finite: its meta-training has diverged")
    return copy.deepcopy(rule).requires_grad_(False)


def identity(rule: Rule) -> dict[str, Any]:
    """What tells one rule from another, and the values of phi, in containers that ``weights_only`` loading admits."""
    return {"class": type(rule).__qualname__, "config": json.dumps(rule.config, sort_keys=True), "phi": rule.state_dict()}


def check_same(saved: Mapping[str, Any] | None, mine: Mapping[str, Any]) -> None:
    """Refuse a saved :func:`identity` that differs in more than the values of phi, with a ``ValueError``."""
    if saved is None:
        raise ValueError(
            "this state was saved by another optimizer: it has no entry 'rule'. Load the weights only and start the optimizer "
            "afresh, or go on with the optimizer that saved it"
        )
    for part in ("class", "config"):
        if saved[part] != mine[part]:
            raise ValueError(
                f"this state was saved with a rule of {part} {saved[part]}, this optimizer's is {mine[part]}; "
                "make the optimizer with the rule that saved the state"
            )
    for name in sorted(saved["phi"].keys() | mine["phi"].keys()):
        shapes = [tuple(phi[name].shape) if name in phi else None for phi in (saved["phi"], mine["phi"])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the saved meta-parameter {name!r} has shape {shapes[0]}, this rule's has {shapes[1]}; "
                "make the optimizer with the rule that saved the state"
            )


def check_group(group: dict[str, Any], index: int) -> None:
    """Refuse options out of range (``ValueError``) and parameters that are not real numbers (``TypeError``)."""
    for key in ("lr", "weight_decay", "lr_unit"):
        value = float(group[key])
        if not math.isfinite(value) or value < 0 or (key == "lr_unit" and value == 0):
            raise ValueError(
                f"{key} of param group {index} must be {'positive' if key == 'lr_unit' else 'at least 0'}, got {value}"
            )
    names = group.get("param_names") or [f"{i} of group {index}" for i in range(len(group["params"]))]
    for param, name in zip(group["params"], names, strict=True):
        if not param.is_floating_point():
            remedy = "optimise torch.view_as_real of it" if param.is_complex() else "leave it out"
            raise TypeError(f"rules need real floating-point parameters, but parameter {name!r} is of type {param.dtype}: {remedy}")


def with_labels(known: Mapping[Tensor, str], group: Mapping[str, Any], index: int) -> dict[Tensor, str]:
    """``known`` names of parameters and those of a group, by position where it has none, all of them different."""
    names, taken = dict(known), set(known.values())
    given = group.get("param_names") or [None] * len(group["params"])
    for param, name in zip(group["params"], given, strict=True):
        if param in names and name in (None, names[param]):
            continue
        label = f"param{len(names)}" if name is None else name
        while label in taken:  # two modules in two groups may both have a "weight"
            label = f"group{index}.{label}"
        taken.add(label)
        names[param] = label
    return names
