"""Translation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_metaopt.tasks.supervised import FromSupervised, Supervised

__all__ = ["TokenSet", "Translation"]


class TokenSet:
    """Sentences and their translations as token numbers in memory.

    Args:
        inputs: the sentences, ``(N, length)``, padded on the right.
        targets: their translations, ``(N, length)``, padded on the right; each starts with the begin mark and ends with the
            end mark.
        pad: the token that fills sentences up.
        vocabulary_size: number of tokens.
        source: where they come from, for the record of a result.

    Raises:
        ValueError: for shapes or tokens that do not fit.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, pad: int, vocabulary_size: int, source: str = "tensors") -> None:
        if inputs.dim() != 2 or targets.dim() != 2 or len(inputs) != len(targets) or targets.shape[1] < 2:
            raise ValueError(
                f"inputs and targets must have shape (N, length), got {tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        if len(inputs) and max(int(inputs.max()), int(targets.max())) >= vocabulary_size:
            raise ValueError(f"the sentences have tokens beyond the vocabulary of {vocabulary_size}")
        self.inputs, self.targets, self.pad, self.vocabulary_size, self.source = inputs, targets, pad, vocabulary_size, source

    def __len__(self) -> int:
        return len(self.inputs)


@final
class Translation(FromSupervised):
    """Training a translator: each problem has a fresh network and its own order of minibatches.

    At every place the network is given the true tokens so far (teacher forcing); the loss is the mean cross-entropy over all
    tokens of a minibatch that are no padding. ``val_loss`` is the loss on a minibatch of pairs that no problem trains on.

    Args:
        data: the sentence pairs, for example ``lightning_metaopt.data.tokenize(load_pairs("ding_en_de"))``.
        model: maps both sentences in one tensor of tokens, ``(n, 2, length)``, to logits ``(n, length, vocabulary)``, like
            :class:`~lightning_metaopt.models.Transformer`: a module, or a function that builds one. One with dropout takes its
            problems one after the other.
        batch_size: pairs of one inner step.
        held_out: fraction of the pairs for validation.
        val_batch_size: pairs of the validation minibatch; default: as ``batch_size``.
        label_smoothing: share of the target that is spread evenly over the vocabulary, in validation as well.
        shared_init: all networks start at one point instead of each at its own.

    Raises:
        ValueError: as :class:`Supervised` does.

    >>> from lightning_metaopt.models import Transformer
    >>> tokens = torch.randint(1, 30, (40, 7), generator=torch.Generator().manual_seed(0))
    >>> model = Transformer(vocabulary=30, width=8, heads=2, layers=1, hidden=16, dropout=0.0)
    >>> task = Translation(TokenSet(tokens, tokens, pad=0, vocabulary_size=30), model, batch_size=4).draw(seed=0, size=2)
    >>> task.batch(0)["inputs"].shape, task.batch(0)["targets"].shape
    (torch.Size([2, 4, 2, 7]), torch.Size([2, 4, 7]))
    """

    def __init__(
        self,
        data: TokenSet,
        model: nn.Module | Callable[[], nn.Module],
        *,
        batch_size: int = 32,
        held_out: float = 0.1,
        val_batch_size: int | None = None,
        label_smoothing: float = 0.0,
        shared_init: bool = False,
    ) -> None:
        known, following = data.targets[:, :-1], data.targets[:, 1:]
        length = max(data.inputs.shape[1], known.shape[1])
        inputs = torch.stack([_padded(data.inputs, length, data.pad), _padded(known, length, data.pad)], 1)
        super().__init__(
            Supervised(
                model,
                inputs,
                _padded(following, length, data.pad),
                loss=partial(token_loss, pad=data.pad, label_smoothing=label_smoothing),
                batch_size=batch_size,
                held_out=held_out,
                val_batch_size=val_batch_size,
                shared_init=shared_init,
            ),
            data.source,
        )


def token_loss(logits: Tensor, tokens: Tensor, *, pad: int, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits ``(n, length, vocabulary)`` over all ``tokens`` ``(n, length)`` that are not ``pad``."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=pad, label_smoothing=label_smoothing)


def _padded(tokens: Tensor, length: int, pad: int) -> Tensor:
    return F.pad(tokens, (0, length - tokens.shape[1]), value=pad)
