"""Constraints on the next iterate of a convex program with a diagonal metric, solved exactly.

With :math:`w = \\Lambda^2` and :math:`z = \\theta_t - G/w`, the constrained form of DCO's programs (Eqs. 13 and 16),

.. math:: \\arg\\min_{\\theta\\in C}\\; G^\\top\\theta + \\tfrac12\\|\\Lambda\\odot(\\theta-\\theta_t)\\|_2^2
          = \\arg\\min_{\\theta\\in C}\\; \\tfrac12\\sum_i w_i(\\theta_i - z_i)^2 ,

is the projection of :math:`z` in the metric :math:`w`. For the sets below it is a formula once the active coordinates are
known (or, for :class:`TrustRegion`, one number). We find those without a graph and differentiate the formula: first and
second derivatives are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Box", "Constraint", "L1Ball", "NonNegative", "ProximalL1", "Simplex", "TrustRegion", "resolve_constraint"]

Bound = float | Sequence[float] | Tensor
"""One number for all coordinates, or one for each, in the order of the flat vector."""


class Constraint(ABC):
    """A convex set (or penalty) for the next iterate.

    It acts on **one problem's flat vector over all parameters**, in the order in which the rule lists their shapes.
    """

    coupled: bool = True  # whether the projection of one coordinate depends on the others

    arguments: tuple[str, ...] = ()  # names of the constructor's arguments, kept as attributes

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        values = {name: getattr(self, name) for name in self.arguments}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    @property
    def spec(self) -> dict[str, Any]:
        """The JSON form, which :func:`resolve_constraint` turns back into the object."""
        return {"class": type(self).__name__, "init": self.config}

    @abstractmethod
    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        """The element of the set nearest to ``point`` in the metric ``weight``.

        Args:
            point: :math:`z`, shape ``(B, n)``.
            weight: :math:`w > 0`, shape ``(B, n)`` or ``(n,)``.
            center: the current iterate :math:`\\theta_t`, shape ``(B, n)`` (used by :class:`TrustRegion`).

        Returns:
            The next iterate, shape ``(B, n)``; differentiable in ``point``, ``weight``, ``center`` and the bounds.
        """

    @abstractmethod
    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        """The same for a solver: cvxpy's ``(constraints, penalty)`` on the expressions ``theta`` and its ``step``."""


def _bound(value: Bound) -> float | Tensor:
    if isinstance(value, int | float):
        return float(value)
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _like(value: float | Tensor, point: Tensor) -> Tensor:
    found = torch.as_tensor(value, dtype=point.dtype, device=point.device)
    if found.dim() and found.shape[-1] not in (1, point.shape[1]):
        raise ValueError(
            f"a bound has {found.shape[-1]} entries, but each problem has {point.shape[1]} coordinates over all parameters; "
            "pass one number, or one for every coordinate"
        )
    return found


def _positive(value: Bound, name: str) -> float | Tensor:
    bound = _bound(value)
    if not bool((torch.as_tensor(bound) > 0).all()):
        raise ValueError(f"{name} must be positive, got {value}")
    return bound


def _numpy(value: float | Tensor) -> Any:
    return value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value


@final
class Box(Constraint):
    """:math:`l \\le \\theta \\le u`, elementwise: :math:`\\theta = \\min(\\max(z, l), u)`, whatever the metric.

    Args:
        lower: :math:`l`, in units of the parameters; ``None`` for no bound.
        upper: :math:`u`, likewise.

    >>> Box(-1, 1).project(torch.tensor([[-3.0, 0.5]]), torch.ones(2), torch.zeros(1, 2)).tolist()
    [[-1.0, 0.5]]
    """

    arguments = ("lower", "upper")
    coupled = False

    def __init__(self, lower: Bound | None = None, upper: Bound | None = None) -> None:
        self.lower = None if lower is None else _bound(lower)
        self.upper = None if upper is None else _bound(upper)
        both = self.lower is not None and self.upper is not None
        if both and not bool((torch.as_tensor(self.lower) <= torch.as_tensor(self.upper)).all()):
            raise ValueError(f"the box is empty: lower {lower} exceeds upper {upper}")

    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        if self.lower is not None:
            lower = _like(self.lower, point)
            point = torch.where(point < lower, lower, point)
        if self.upper is not None:
            upper = _like(self.upper, point)
            point = torch.where(point > upper, upper, point)
        return point

    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        below = [] if self.lower is None else [theta >= _numpy(self.lower)]
        above = [] if self.upper is None else [theta <= _numpy(self.upper)]
        return below + above, 0


@final
class NonNegative(Constraint):
    """:math:`\\theta \\ge 0`: :math:`\\theta = \\max(z, 0)`."""

    coupled = False

    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        return torch.where(point > 0, point, torch.zeros_like(point))

    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        return [theta >= 0], 0


def _waterfill(point: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    # max(z - nu / w, 0) with the nu that makes it sum to the total. Coordinate i is positive iff nu < w_i z_i, so the
    # positive ones are a prefix of the order of falling w_i z_i: the longest whose last member is above its own nu.
    with torch.no_grad():
        threshold, order = (weight * point).sort(dim=1, descending=True)
        values, inverse = point.gather(1, order), (1 / weight).gather(1, order)
        multiplier = (values.cumsum(1) - total) / inverse.cumsum(1)
        count = (threshold > multiplier).sum(1, keepdim=True).clamp(min=1)
        positive = (
            torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)) < count
        )
    zero = torch.zeros_like(point)
    nu = (torch.where(positive, point, zero).sum(1, keepdim=True) - total) / torch.where(positive, 1 / weight, zero).sum(
        1, keepdim=True
    )
    return torch.where(positive, point - nu / weight, zero)


@final
class Simplex(Constraint):
    """:math:`\\theta \\ge 0,\\; \\sum_i \\theta_i = s`: :math:`\\theta_i = \\max(z_i - \\nu/w_i, 0)`, :math:`\\nu` from one sort.

    Args:
        total: :math:`s > 0`.

    >>> Simplex().project(torch.tensor([[1.0, 0.5, -2.0]]), torch.ones(3), torch.zeros(1, 3)).tolist()
    [[0.75, 0.25, 0.0]]
    """

    arguments = ("total",)

    def __init__(self, total: float | Tensor = 1.0) -> None:
        self.total = _positive(total, "total")

    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        return _waterfill(point, weight.expand_as(point), _like(self.total, point))

    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        import cvxpy as cp

        return [theta >= 0, cp.sum(theta) == _numpy(self.total)], 0


@final
class L1Ball(Constraint):
    """:math:`\\|\\theta\\|_1 \\le r`: :math:`\\theta = z` inside, else
    :math:`\\theta_i = \\operatorname{sign}(z_i)\\max(|z_i| - \\nu/w_i, 0)` with :math:`\\|\\theta\\|_1 = r`.

    Args:
        radius: :math:`r > 0`, in units of the parameters.
    """

    arguments = ("radius",)

    def __init__(self, radius: float | Tensor) -> None:
        self.radius = _positive(radius, "radius")

    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        radius = _like(self.radius, point)
        inside = point.abs().sum(1, keepdim=True) <= radius
        return torch.where(inside, point, point.sign() * _waterfill(point.abs(), weight.expand_as(point), radius))

    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        import cvxpy as cp

        return [cp.norm1(theta) <= _numpy(self.radius)], 0


@final
class TrustRegion(Constraint):
    """:math:`\\|\\theta-\\theta_t\\|_2 \\le r`: :math:`\\theta-\\theta_t = -G/(w + \\mu)` with the smallest
    :math:`\\mu \\ge 0` that keeps to the radius (the secular equation :math:`1/\\|\\theta-\\theta_t\\| = 1/r`).

    :math:`1/\\|d(\\mu)\\|` is concave and increasing, so Newton's iteration from :math:`\\mu = 0` rises to the root without
    passing it; it runs without a graph. Two more Newton steps with a graph make first **and** second derivatives exact (one
    step would miss the curvature of the equation in :math:`\\mu`).

    Args:
        radius: :math:`r > 0`, in units of the parameters.
    """

    arguments = ("radius",)

    def __init__(self, radius: float | Tensor) -> None:
        self.radius = _positive(radius, "radius")

    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        radius, weight = _like(self.radius, point), weight.expand_as(point)
        step = point - center
        outside = step.detach().norm(dim=1, keepdim=True) > radius
        force = torch.where(outside, weight * step, torch.ones_like(step))  # -G; elsewhere anything that is not zero
        with torch.no_grad():
            mu = torch.zeros_like(force[:, :1])
            for _ in range(50):
                before, mu = mu, torch.where(outside, self._newton(mu, force, weight, radius), mu).clamp(min=0)
                if torch.equal(before, mu):
                    break
        for _ in range(2):
            mu = torch.where(outside, self._newton(mu, force, weight, radius), mu)
        return center + torch.where(outside, force / (weight + mu), step)

    @staticmethod
    def _newton(mu: Tensor, force: Tensor, weight: Tensor, radius: Tensor) -> Tensor:
        step = force / (weight + mu)
        square = step.square().sum(1, keepdim=True)
        slope = (step.square() / (weight + mu)).sum(1, keepdim=True)  # minus half the derivative of the square in mu
        return mu + (square.sqrt() / radius - 1) * square / slope

    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        import cvxpy as cp

        return [cp.norm2(step) <= _numpy(self.radius)], 0


@final
class ProximalL1(Constraint):
    """The penalty :math:`+\\lambda\\|\\theta\\|_1` in the program's objective (proximal gradient, ISTA):
    :math:`\\theta_i = \\operatorname{sign}(z_i)\\max(|z_i| - \\lambda/w_i, 0)`.

    Args:
        weight: :math:`\\lambda \\ge 0`, in units of the gradient.
    """

    arguments = ("weight",)
    coupled = False

    def __init__(self, weight: Bound) -> None:
        self.weight = _bound(weight)
        if not bool((torch.as_tensor(self.weight) >= 0).all()):
            raise ValueError(f"weight must not be negative, got {weight}")

    def project(self, point: Tensor, weight: Tensor, center: Tensor) -> Tensor:
        shrink = _like(self.weight, point) / weight
        return torch.where(point.abs() > shrink, point - point.sign() * shrink, torch.zeros_like(point))

    def express(self, theta: Any, step: Any) -> tuple[list[Any], Any]:
        import cvxpy as cp

        return [], cp.norm1(cp.multiply(_numpy(self.weight), theta))


_KNOWN: dict[str, type[Constraint]] = {kind.__name__: kind for kind in (Box, L1Ball, NonNegative, ProximalL1, Simplex, TrustRegion)}


def resolve_constraint(constraint: Constraint | Mapping[str, Any] | None) -> Constraint | None:
    """A constraint from its JSON form ``{"class": name, "init": arguments}``; objects and ``None`` pass through.

    >>> resolve_constraint({"class": "L1Ball", "init": {"radius": 2.0}}).radius
    2.0
    """
    if constraint is None or isinstance(constraint, Constraint):
        return constraint
    if not isinstance(constraint, Mapping) or constraint.get("class") not in _KNOWN:
        raise ValueError(
            f"unknown constraint {constraint!r}; pass a Constraint or {{'class': one of {', '.join(_KNOWN)}, 'init': {{...}}}}"
        )
    return _KNOWN[constraint["class"]](**constraint.get("init", {}))
