"""The programs that :class:`~lightning_metaopt.rules.ConvexProgram` has ready: DCO's Eqs. 13 to 16, and a polytope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_metaopt.rules.constraints import Constraint, resolve_constraint

__all__ = ["Inputs", "Program", "ready_made"]


@dataclass(frozen=True)
class Inputs:
    """What a program's computed parameters and state are functions of, for ``B`` problems of ``n`` coordinates.

    Attributes:
        gradient: :math:`G_t`, shape ``(B, n)``.
        current: :math:`\\theta_t`, shape ``(B, n)``.
        phi: the meta-parameters by name, each in its own shape, without an axis of problems.
        state: the slots by name, each ``(B, n)``: of the step before while the state is computed, then the new ones.
        fresh: ``(B, 1)``, 1 before the first step and 0 afterwards.
    """

    gradient: Tensor
    current: Tensor
    phi: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    fresh: Tensor


@dataclass(frozen=True)
class Program:
    """A cvxpy problem and what it means as an update rule; see the arguments of ``ConvexProgram``."""

    problem: Any
    variable: Any
    phi: Mapping[str, Tensor]
    inputs: Mapping[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)
    state: Mapping[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)
    returns: Literal["iterate", "step"] = "step"


def _over(constraint: Constraint | None, objective: Any, step: Any) -> Any:
    # The step is the variable and theta = current + step an expression, because products of parameters are not DPP.
    import cvxpy as cp

    if constraint is None:
        return cp.Problem(cp.Minimize(objective))
    constraints, penalty = constraint.express(cp.Parameter(step.size, name="current") + step, step)
    return cp.Problem(cp.Minimize(objective + penalty), constraints)


def _gradient(n: int, *, scale: float = 1.0, constraint: Any = None) -> Program:
    import cvxpy as cp

    step, metric = cp.Variable(n), cp.Parameter(n, name="scale", pos=True)
    objective = cp.Parameter(n, name="gradient") @ step + cp.sum_squares(cp.multiply(metric, step)) / 2
    return Program(_over(resolve_constraint(constraint), objective, step), step, {"scale": torch.full((n,), float(scale))})


def _from_gradient(x: Inputs) -> Tensor:
    before = torch.where(x.fresh > 0, x.gradient, x.state["average"])
    return torch.lerp(before, x.gradient, x.phi["averaging"].expand_as(before))


def _from_zero(x: Inputs) -> Tensor:
    return torch.lerp(x.state["average"], x.gradient, x.phi["averaging"].expand_as(x.gradient))


def _momentum(n: int, *, scale: float = 1.0, averaging: float = 0.1, first: str = "gradient", constraint: Any = None) -> Program:
    import cvxpy as cp

    if first not in ("gradient", "zero"):
        raise ValueError(f"first must be 'gradient' or 'zero', got {first!r}")
    step, metric = cp.Variable(n), cp.Parameter(n, name="scale", pos=True)
    objective = cp.Parameter(n, name="average") @ step + cp.sum_squares(cp.multiply(metric, step)) / 2
    return Program(
        _over(resolve_constraint(constraint), objective, step),
        step,
        {"scale": torch.full((n,), float(scale)), "averaging": torch.full((n,), float(averaging))},
        state={"average": _from_gradient if first == "gradient" else _from_zero},
    )


def _mapped_gradient(x: Inputs) -> Tensor:
    return x.gradient @ x.phi["matrix"].mT


def _general_descent(n: int, *, matrix_scale: float = 1.0, constraint: Any = None) -> Program:
    import cvxpy as cp

    step = cp.Variable(n)
    objective = cp.Parameter(n, name="direction") @ step + cp.sum_squares(step) / 2
    problem = _over(resolve_constraint(constraint), objective, step)
    return Program(problem, step, {"matrix": matrix_scale * torch.eye(n)}, inputs={"direction": _mapped_gradient})


def _polytope(n: int, *, scale: float = 1.0, inequality: Any = None, equality: Any = None) -> Program:
    import cvxpy as cp

    step, factor, constraints = cp.Variable(n), cp.Parameter((n, n), name="factor"), []
    theta = cp.Parameter(n, name="current") + step
    for pair, name in ((inequality, "inequality"), (equality, "equality")):
        if pair is None:
            continue
        matrix, bound = (torch.as_tensor(part, dtype=torch.float64) for part in pair)
        if matrix.dim() != 2 or matrix.shape[1] != n or bound.shape != matrix.shape[:1]:
            raise ValueError(
                f"{name} must be a matrix (m, {n}) and a vector (m,), got shapes {tuple(matrix.shape)}, {tuple(bound.shape)}"
            )
        value = matrix.numpy() @ theta
        constraints.append(value <= bound.numpy() if name == "inequality" else value == bound.numpy())
    if not constraints:
        raise ValueError("a polytope needs inequality=(A, b), equality=(C, d), or both")
    objective = cp.Parameter(n, name="gradient") @ step + cp.sum_squares(factor @ step) / 2
    return Program(cp.Problem(cp.Minimize(objective), constraints), step, {"factor": scale * torch.eye(n)})


_KNOWN: dict[str, Callable[..., Program]] = {
    "gradient": _gradient,
    "momentum": _momentum,
    "general_descent": _general_descent,
    "polytope": _polytope,
}


def ready_made(spec: Mapping[str, Any], n: int) -> Program:
    """A program of ``n`` coordinates from its JSON form ``{"class": name, "init": arguments}``."""
    if spec.get("class") not in _KNOWN:
        raise ValueError(f"unknown program {spec.get('class')!r}; choose one of {', '.join(_KNOWN)}, or pass a cvxpy problem")
    return _KNOWN[spec["class"]](n, **spec.get("init", {}))
