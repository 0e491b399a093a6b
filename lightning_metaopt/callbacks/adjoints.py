"""Gradients of the present loss with respect to the points of a rollout that led there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_metaopt.callbacks.flat import Flat
from lightning_metaopt.callbacks.rollout import Gradients, Past
from lightning_metaopt.recording import Moment
from lightning_metaopt.rules.control import perturbed

__all__ = ["Adjoints", "of_decay", "of_path", "of_rollout"]

Pull = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Adjoints:
    """:math:`p_t, p_{t-1}, \\ldots, p_{t-L+1}`, as multiples of few vectors: what are multiples is multiplied with the ring once.

    Attributes:
        vectors: of ``n`` numbers each.
        uses: for each :math:`p` the number of its vector, and its factor.
    """

    vectors: list[Tensor]
    uses: list[tuple[int, float]]

    @classmethod
    def of(cls, vectors: list[Tensor], length: int) -> Adjoints:
        """Vectors that are no multiples of one another; the last one counts until there are ``length``."""
        return cls(vectors, [(min(ago, len(vectors) - 1), 1.0) for ago in range(length)])


def of_rollout(
    gradients: Gradients, past: Sequence[Past], now: Sequence[Moment], mixtures: Tensor, flat: Flat, *, plain: bool, common: bool
) -> Adjoints:
    """Roll out from the first step in ``past`` with ``mixtures``, and pull the gradient of the present loss back through it.

    .. math:: p_t = \\nabla f_t(\\hat x_t), \\qquad p_s = (1-\\delta_s)\\, p_{s+1} - \\nabla^2 f_s(\\hat x_s)\\,(\\eta_s p_{s+1}) .

    Args:
        gradients: of training.
        past: the last ``L`` steps, the oldest first.
        now: the present batches.
        mixtures: :math:`\\sum_h M^h d_{s+1-h}` of these steps, the newest first, shape ``(L, n)``.
        flat: the parameters.
        plain: whether the base optimizer makes steps :math:`-\\eta g`; else its recorded updates are constants.
        common: whether the present batches stand for those of all steps.
    """
    length = len(past)
    pulls: list[Pull] = []
    if plain and common:
        first = past[0]
        point = first.vectors["point"]
        given = gradients.at(now, point, flat)
        point = point + perturbed(point, given, mixtures[-1], flat.spread(first.lr), flat.spread(first.decay))
    else:
        point = past[0].vectors["reached"] - mixtures[-1]
    for number, step in enumerate(past[1:], start=1):
        mixture = mixtures[length - 1 - number]
        if plain:
            given, pull = gradients.linearised(now if common else step.moments, point, flat)
            pulls.append(pull)
            point = point + perturbed(point, given, mixture, flat.spread(step.lr), flat.spread(step.decay))
        else:
            point = point + step.vectors["update"] - mixture
    vectors = [gradients.of_loss(now, point, flat)]
    for step, pull in zip(reversed(past[1:]), reversed(pulls), strict=False):
        vectors.append(_back(vectors[-1], step, pull, flat))
    return Adjoints.of(vectors, length)


def of_path(gradients: Gradients, grad: Tensor, past: Sequence[Past], now: Sequence[Moment] | None, flat: Flat) -> Adjoints:
    """The same along the points where training was, instead of those of a rollout: no gradient of the loss is computed again.

    Args:
        gradients: of training.
        grad: :math:`p_t`, the gradient of the present step.
        past: the last ``L`` steps, the oldest first, of which the oldest is not needed.
        now: the present batches, if they stand for those of all steps.
        flat: the parameters.
    """
    vectors = [grad]
    for step in reversed(past[1:]):
        _, pull = gradients.linearised(step.moments if now is None else now, step.vectors["point"], flat)
        vectors.append(_back(vectors[-1], step, pull, flat))
    return Adjoints.of(vectors, len(past))


def of_decay(grad: Tensor, decay: float | Tensor, length: int) -> Adjoints:
    """The same without the Hessian: :math:`p_s = (1-\\delta)\\, p_{s+1}`."""
    if not isinstance(decay, Tensor):
        return Adjoints([grad], [(0, (1 - decay) ** ago) for ago in range(length)])
    vectors = [grad]
    for _ in range(length - 1):
        vectors.append(vectors[-1] * (1 - decay))
    return Adjoints.of(vectors, length)


def _back(vector: Tensor, step: Past, pull: Pull, flat: Flat) -> Tensor:
    lr, decay = flat.spread(step.lr), flat.spread(step.decay)
    if isinstance(lr, Tensor) or isinstance(decay, Tensor) or decay:
        return (1 - decay) * vector - pull(lr * vector)
    return pull(vector).mul_(-lr).add_(vector)  # one number for all: nothing new is needed beside the product
