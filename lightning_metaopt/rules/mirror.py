"""Mirror descent with a learned quadratic potential: what all its forms share, and the diagonal and the dense one.

*MetaMD: Principled Optimiser Meta-Learning for Deep Learning*, 2022 (arXiv:2203.02711).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State, per_parameter
from lightning_metaopt.tree import Layout, Tree, escape, expand_like, safe_sqrt, shapes_of, tree_map

__all__ = ["DenseMirror", "DiagonalMirror", "QuadraticMirror"]


class QuadraticMirror(Rule, ABC):
    """Mirror descent with the potential :math:`\\phi(\\theta) = \\tfrac12\\theta^\\top M\\theta` of a learned positive definite
    :math:`M` (Eq. 15; in closed form Eq. 24).

    .. math:: \\theta_{t+1} = \\arg\\min_\\theta\\; \\eta\\langle g_t, \\theta\\rangle + B(\\theta, \\theta_t)
              = \\theta_t - \\eta M^{-1} g_t, \\qquad B(x, y) = \\tfrac12 (x-y)^\\top M (x-y) .

    (The paper's Eqs. 1, 6 and 14 have :math:`B/(2\\eta)`, which would double the step.) :math:`\\eta` is a constant: :math:`M`
    learns its scale. With momentum, :math:`g_t` is replaced by :math:`v_t = \\mu v_{t-1} + g_t`; the paper has none.

    Beside the step, a rule of this kind gives what the paper's bounds and its meta-objective (Eq. 8) are made of, in closed form
    and differentiable: :meth:`divergence`, :meth:`smallest_eigenvalue`, :meth:`distance_from_identity` and :meth:`trace`.

    Args:
        shapes: names and shapes of the parameters.
        lr: :math:`\\eta > 0`, in units of parameter / gradient; not learned.
        momentum: initial :math:`\\mu`, strictly between 0 and 1 (learned as its logit); ``None`` for none.

    Raises:
        ValueError: for numbers outside these ranges, or without parameters; by :meth:`init`, for parameters of other shapes.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], lr: float, momentum: float | None) -> None:
        super().__init__()
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if momentum is not None and not 0 < momentum < 1:
            raise ValueError(f"momentum must lie strictly between 0 and 1, or be None, got {momentum}")
        if not shapes:
            raise ValueError("a rule that is sized per parameter needs at least one parameter; pass shapes={name: shape}")
        self.lr, self.momentum = lr, momentum
        self.layout = Layout.of(shapes)
        self.momentum_logit = None if momentum is None else nn.Parameter(torch.tensor(math.log(momentum / (1 - momentum))))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        return {"shapes": dict(self.layout.shapes), "lr": self.lr, "momentum": self.momentum}

    def init(self, params: Tree) -> State:
        recorded = self.shapes
        for name, shape in shapes_of(params).items():
            if recorded.get(name) != shape:
                known = f"was made for shape {recorded[name]}" if name in recorded else "does not know it"
                raise ValueError(
                    f"parameter {name!r} has shape {shape}, but this {type(self).__name__} {known}. Make and meta-train a rule for "
                    "this network (for_module), or carry a KroneckerMirror over with transferred_to(network)"
                )
        return {} if self.momentum_logit is None else {"momentum": tree_map(torch.zeros_like, params)}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        if self.momentum_logit is None:
            return self.steps(grads), state
        mu = self.momentum_logit.sigmoid()
        velocity = {name: mu * state["momentum"][name] + grad for name, grad in grads.items()}
        return self.steps(velocity), {"momentum": velocity}

    @abstractmethod
    def steps(self, directions: Tree) -> Tree:
        """:math:`-\\eta M^{-1} d` for every problem's :math:`d`, leaves ``(B, *shape)``."""

    @abstractmethod
    def squared_length(self, difference: Tree) -> Tensor:
        """:math:`d^\\top M d` for every problem's :math:`d`, shape ``(B,)``."""

    @abstractmethod
    def smallest_eigenvalue(self) -> Tensor:
        """:math:`\\lambda` of Theorem 3.1: the potential is :math:`\\lambda`-strongly convex. A number."""

    @abstractmethod
    def trace(self) -> Tensor:
        """:math:`\\mathrm{tr}\\, M`, a number."""

    @abstractmethod
    def squared_distance_from_identity(self) -> Tensor:
        """:math:`\\|M - I\\|_F^2`, a number."""

    def distance_from_identity(self) -> Tensor:
        """:math:`\\|M - I\\|_F`, the regulariser of Eq. 8; its derivative at :math:`M = I` is taken to be 0."""
        return safe_sqrt(self.squared_distance_from_identity())

    def divergence(self, x: Tree, y: Tree | None = None) -> Tensor:
        """The Bregman divergence :math:`B(x, y) = \\tfrac12 (x-y)^\\top M (x-y)` of every problem (Eq. 2), shape ``(B,)``.

        Args:
            x: leaves ``(B, *shape)``; may hold some of the parameters only, if :math:`M` has no entries between them.
            y: the same; ``None`` for the origin, so that one may pass the difference.
        """
        return self.squared_length(x if y is None else {name: leaf - y[name] for name, leaf in x.items()}) / 2

    def describe(self) -> dict[str, float]:
        with torch.no_grad():
            found = {
                "distance_from_identity": float(self.distance_from_identity()),
                "smallest_eigenvalue": float(self.smallest_eigenvalue()),
                "mean_eigenvalue": float(self.trace()) / self.layout.size,
            }
            return found if self.momentum_logit is None else {**found, "momentum": float(self.momentum_logit.sigmoid())}


@final
class DiagonalMirror(QuadraticMirror):
    """:class:`QuadraticMirror` with :math:`M = \\mathrm{diag}(e^{\\phi})`: the family of the paper's Figure 1.

    Its steps are those of :class:`DCOGradient` with :math:`\\Lambda^2 = e^\\phi/\\eta`; the logarithm keeps :math:`M` positive and
    lets a meta-step change an entry by a factor, whatever its size.

    Where inner loops converge, meta-training on the divergence alone drives :math:`M` down to the edge of stability
    (:math:`\\eta h/2` for curvature :math:`h`): use the rule with half of its step size then (``lr=0.5`` of
    :class:`~lightning_metaopt.LearnedOptimizer`), and start it inside the stable region (``metric`` of at least :math:`\\eta h`).

    Args:
        shapes: names and shapes of the parameters.
        lr: :math:`\\eta`, in units of parameter / gradient; not learned.
        metric: initial diagonal of :math:`M`.
        momentum: see :class:`QuadraticMirror`.

    Raises:
        ValueError: for a ``metric`` that is not positive and finite, or as :class:`QuadraticMirror` does.

    >>> rule = DiagonalMirror({"w": (2,)}, lr=0.5, metric=2.0)
    >>> rule({"w": torch.tensor([[4.0, -8.0]])}, {}, {"w": torch.zeros(1, 2)})[0]["w"].tolist()
    [[-1.0, 2.0]]
    """

    elementwise = True

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], lr: float = 0.1, metric: float = 1.0, *, momentum: float | None = None
    ) -> None:
        super().__init__(shapes, lr, momentum)
        self.log_metric = per_parameter(shapes, _log(metric))

    def _flat(self) -> Tensor:
        return torch.cat([self.log_metric[escape(name)].flatten() for name, _ in self.layout.shapes])

    def steps(self, directions: Tree) -> Tree:
        def factors() -> Tree:
            return {name: expand_like(-self.lr * (-self.log_metric[escape(name)]).exp(), d) for name, d in directions.items()}

        held = self.once("factors", factors)
        return {name: held[name] * direction for name, direction in directions.items()}

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        mu = None if self.momentum_logit is None else float(self.momentum_logit.detach().sigmoid())
        for name, grad in grads.items():
            direction = grad
            if mu is not None:
                direction = state["momentum"][name]
                torch.add(grad, direction, alpha=mu, out=direction)
            factor = (-self.log_metric[escape(name)].detach()).exp()
            params[name].addcmul_(factor, direction, value=-self.lr * (scale[name] if scale else 1.0))

    def squared_length(self, difference: Tree) -> Tensor:
        terms = []
        for name, leaf in difference.items():
            metric: Tensor = self.log_metric[escape(name)].exp()
            terms.append((metric * leaf.square()).reshape(len(leaf), -1).sum(1))
        return torch.stack(terms).sum(0)

    def smallest_eigenvalue(self) -> Tensor:
        return self._flat().min().exp()

    def trace(self) -> Tensor:
        return self._flat().exp().sum()

    def squared_distance_from_identity(self) -> Tensor:
        return self._flat().expm1().square().sum()


@final
class DenseMirror(QuadraticMirror):
    """:class:`QuadraticMirror` with a full matrix :math:`M = LL^\\top` over all parameters together, for problems of few unknowns.

    :math:`L` is lower triangular with the exponentials of ``factor``'s diagonal on its diagonal, so that :math:`M` is positive
    definite whatever is learned; a step is two triangular solves. There are :math:`n(n+1)/2` meta-parameters in an
    :math:`n\\times n` tensor (what stands above its diagonal has no effect).

    Args:
        shapes: names and shapes of the parameters; fixes the order of the :math:`n` coordinates.
        lr: :math:`\\eta`, in units of parameter / gradient; not learned.
        metric: initial :math:`M` as a multiple of the identity.
        momentum: see :class:`QuadraticMirror`.

    Raises:
        ValueError: for a ``metric`` that is not positive and finite, or as :class:`QuadraticMirror` does.

    >>> rule = DenseMirror({"w": (2,)}, lr=0.5, metric=2.0)
    >>> rule({"w": torch.tensor([[4.0, -8.0]])}, {}, {"w": torch.zeros(1, 2)})[0]["w"].tolist()
    [[-1.0, 2.0]]
    """

    joint = True

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], lr: float = 0.1, metric: float = 1.0, *, momentum: float | None = None
    ) -> None:
        super().__init__(shapes, lr, momentum)
        self.factor = nn.Parameter(_log(metric) / 2 * torch.eye(self.layout.size))

    def _root(self) -> Tensor:
        return self.factor.tril(-1) + torch.diag(self.factor.diagonal().exp())

    def matrix(self) -> Tensor:
        """:math:`M`, shape ``(n, n)``."""
        root = self._root()
        return root @ root.mT

    def steps(self, directions: Tree) -> Tree:
        root = self.once("root", lambda: {"root": self._root()})["root"]
        return self.layout.unflatten(-self.lr * torch.cholesky_solve(self.layout.flatten(directions).mT, root).mT)

    def squared_length(self, difference: Tree) -> Tensor:
        return (self.layout.flatten(difference) @ self._root()).square().sum(1)

    def smallest_eigenvalue(self) -> Tensor:
        # From the singular values of L: the eigenvalues of L L^T have half as many right digits.
        values: Tensor = torch.linalg.svdvals(self._root())
        return values.min().square()

    def trace(self) -> Tensor:
        return self._root().square().sum()

    def squared_distance_from_identity(self) -> Tensor:
        return (self.matrix() - torch.eye(self.layout.size).to(self.factor)).square().sum()


def _log(metric: float) -> float:
    # Of the initial metric, which both rules learn as a logarithm.
    if not (metric > 0 and math.isfinite(metric)):
        raise ValueError(f"metric must be positive and finite, got {metric}")
    return math.log(metric)
