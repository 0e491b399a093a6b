"""What rules of mirror descent promise about their own speed."""

from __future__ import annotations

from typing import Protocol, final, runtime_checkable

from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.objectives.base import Objective, displacement
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["Mirror", "MirrorBound", "mirror_of"]


@runtime_checkable
class Mirror(Protocol):
    """What a rule offers whose steps are those of mirror descent with :math:`\\phi_M(\\theta) = \\frac12\\theta^\\top M\\theta`:
    the quantities of MetaMD's bounds, in closed form and differentiable with respect to its meta-parameters.
    """

    def divergence(self, difference: Tree) -> Tensor:
        """:math:`B_M = \\frac12\\Delta^\\top M\\Delta` of differences with leaves ``(B, *shape)``; shape ``(B,)``."""

    def distance_from_identity(self) -> Tensor:
        """:math:`\\|M - I\\|_F`, shape ``()``."""

    def smallest_eigenvalue(self) -> Tensor:
        """:math:`\\lambda`, over all blocks of :math:`M`; shape ``()``."""

    def trace(self) -> Tensor:
        """:math:`\\operatorname{tr} M`, shape ``()``."""


def mirror_of(rule: Rule, who: str) -> Mirror:
    """``rule`` as a mirror; ``TypeError`` in the name of ``who`` if it has no divergence."""
    if not isinstance(rule, Mirror):
        raise TypeError(
            f"{who} needs a rule with a Bregman divergence, such as KroneckerMirror or DiagonalMirror; {type(rule).__name__} has "
            "none"
        )
    return rule


@final
class MirrorBound(Objective):
    """What a rule of mirror descent promises about its own speed (MetaMD, Eq. 8), without validation data and without losses.

    .. math:: B_{\\phi_M}(\\theta_T, \\theta_0) + \\frac{k}{\\lambda} + \\gamma\\,\\|M - I\\|_F ,

    with :math:`\\theta_0` where the episode began, :math:`B = \\frac12(\\theta_T - \\theta_0)^\\top M(\\theta_T - \\theta_0)` and
    :math:`\\lambda` the smallest eigenvalue of :math:`M`. It bounds the excess loss after T steps up to factors without
    :math:`M` (Eq. 7, where the factor should be 4 instead of 2: :math:`\\eta = \\lambda/2L` in Theorem 3.1 gives
    :math:`4BL/\\lambda T`). The bound is for :math:`\\theta_*` in the place of :math:`\\theta_T`, thus for inner loops that run to
    convergence: after few steps "do not move at all" has the smallest divergence. What else to know:

    - Under the paper's Kronecker factors :math:`aa^\\top + I` the smallest eigenvalue is 1, so that :math:`k/\\lambda` has
      no gradient.
    - The three terms are all smallest at :math:`M = I`, up to a scale. Only what an unrolled :math:`\\theta_T` adds to the gradient
      leads away from it: :class:`~lightning_metaopt.Unrolled` and :class:`~lightning_metaopt.ForwardMode` have it,
      :class:`~lightning_metaopt.Implicit` has the paper's heuristic.

    Args:
        k: weight of :math:`1/\\lambda`, at least 0.
        gamma: weight of the distance from the identity, at least 0.
        squared: take :math:`\\|M - I\\|_F^2` instead, which is smooth at :math:`M = I`.

    Raises:
        ValueError: for a negative weight.
        TypeError: when it is called with a rule that has no divergence.
    """

    def __init__(self, k: float = 0.0, gamma: float = 0.0, squared: bool = False) -> None:
        if k < 0 or gamma < 0:
            raise ValueError(f"k and gamma must be at least 0, got k={k} and gamma={gamma}")
        self.k, self.gamma, self.squared = k, gamma, squared

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        mirror = mirror_of(rule, "MirrorBound")
        value = mirror.divergence(displacement(end))
        if self.k:
            value = value + self.k / mirror.smallest_eigenvalue()
        if self.gamma:
            distance = mirror.distance_from_identity()
            value = value + self.gamma * (distance.square() if self.squared else distance)
        return value
