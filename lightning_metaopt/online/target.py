"""What a target of bootstrapped meta-gradients is (section 6 of *Optimistic Meta-Gradients*), once for all that use one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_metaopt.tree import Tree

__all__ = ["Mu", "check_target", "pull_of_target"]

Mu = Literal["euclidean", "loss"]


def check_target(lookahead: int, mu: str) -> None:
    """Raise ``ValueError`` for options that no target has."""
    if lookahead < 1:
        raise ValueError(f"lookahead must be at least 1, got {lookahead}")
    if mu not in ("euclidean", "loss"):
        raise ValueError(f"mu must be 'euclidean' or 'loss', got {mu!r}")


def pull_of_target(
    point: Tree,
    grads: Tree,
    advance: Callable[[Tree, Tree], Tree],
    gradient: Callable[[Tree], Tree],
    *,
    lookahead: int = 1,
    target_lr: float = 1.0,
    mu: Mu = "euclidean",
) -> tuple[Tree, Tree]:
    """The vector :math:`\\nabla\\mu(x_t) - \\nabla\\mu(z_t)` of Eq. 10, and the target :math:`z_t`.

    .. math:: z_t = y_K - \\eta\\nabla f(y_K), \\quad y_0 = x_t,\\; y_{k+1} = y_k + \\varphi(y_k, w_t) .

    Args:
        point: :math:`x_t`.
        grads: :math:`\\nabla f(x_t)`.
        advance: :math:`(y, \\nabla f(y)) \\mapsto y + \\varphi(y, w_t)`; called in the order of the steps.
        gradient: :math:`y \\mapsto \\nabla f(y)`, called ``lookahead`` times, and once more for ``mu="loss"``.
        lookahead: :math:`K`.
        target_lr: :math:`\\eta`.
        mu: ``"euclidean"`` for :math:`\\mu = \\tfrac12\\|\\cdot\\|^2`, ``"loss"`` for :math:`\\mu = f`.

    >>> import torch  # f(x) = x^2 / 2, phi(x, w) = -x / 2: from 1 to 1/2, and a whole step on to 0
    >>> pull_of_target({"x": torch.ones(1)}, {"x": torch.ones(1)}, lambda y, g: {"x": y["x"] - g["x"] / 2}, dict)
    ({'x': tensor([1.])}, {'x': tensor([0.])})
    """
    ahead, slopes = point, grads
    for _ in range(lookahead):
        ahead = advance(ahead, slopes)
        slopes = gradient(ahead)
    target = {name: leaf - target_lr * slopes[name] for name, leaf in ahead.items()}
    if mu == "loss":
        at_target = gradient(target)
        return {name: leaf - at_target[name] for name, leaf in grads.items()}, target
    return {name: leaf - target[name] for name, leaf in point.items()}, target
