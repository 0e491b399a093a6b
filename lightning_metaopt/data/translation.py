"""Sentence pairs in memory as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self, final

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_metaopt.data.batches import Batches, held_out_rows, training_batches
from lightning_metaopt.data.pairs import PairSet
from lightning_metaopt.data.tokens import BytePairs
from lightning_metaopt.tasks.translation import TokenSet

__all__ = ["PairData", "encode_pairs", "tokenize"]


@final
class PairData(LightningDataModule):
    """Sentences and their translations as tokens, in batches of similar length.

    Batches are ``(source, target)``, token numbers ``(n, length)`` padded on the right with ``vocabulary.pad``. A source ends
    with the end mark; a target begins with the begin mark and ends with the end mark. One vocabulary of byte pairs serves
    both languages; it is made from the training sentences alone. The order of the training batches comes from torch's global
    generator, as in :class:`ImageData`.

    Args:
        train: pairs to train on.
        test: pairs to test on; ``None`` keeps the fraction ``held_out`` of the training pairs for that.
        validation: pairs to validate on; ``None``: the test pairs.
        batch_size: pairs in a training batch; the last incomplete one is dropped.
        held_out: see ``test``.
        vocabulary_size: tokens, at least 259; fewer if the sentences do not give so many.
        max_length: training pairs with a side of more tokens are left out; ``source`` says how many.

    Attributes:
        vocabulary: the tokens: ``len(vocabulary)``, ``vocabulary.pad``, ``.bos``, ``.eos``.
        source: where the pairs come from and how they were divided, for the record of a result.

    Raises:
        ValueError: if a batch is larger than the training set.

    >>> pairs = PairSet(["one", "two", "one two"] * 10, ["eins", "zwei", "eins zwei"] * 10)
    >>> data = PairData(pairs, pairs, batch_size=4, vocabulary_size=264)
    >>> source, target = next(iter(data.train_dataloader()))
    >>> len(source), data.decode(target)[0] in pairs.targets
    (4, True)
    """

    def __init__(
        self,
        train: PairSet,
        test: PairSet | None = None,
        validation: PairSet | None = None,
        batch_size: int = 32,
        held_out: float = 0.1,
        vocabulary_size: int = 4000,
        max_length: int = 64,
    ) -> None:
        super().__init__()
        notes = [train.source, *(part.source for part in (test, validation) if part is not None)]
        if test is None:
            kept, held = held_out_rows(len(train), held_out)
            notes.append(f"{len(held)} of the {len(train)} training pairs kept for the test")
            train, test = _chosen(train, kept), _chosen(train, held)
        self.vocabulary = _vocabulary((*train.inputs, *train.targets), vocabulary_size)
        encoded = encode_pairs(train, self.vocabulary)
        short = [pair for pair in encoded if max(map(len, pair)) <= max_length]
        if len(short) < len(encoded):
            notes.append(f"{len(encoded) - len(short)} training pairs of more than {max_length} tokens left out")
        if batch_size > len(short):
            raise ValueError(f"a batch of {batch_size} does not fit into {len(short)} training pairs of up to {max_length} tokens")
        notes.append(f"{len(self.vocabulary)} byte-pair tokens made from the training pairs")
        self.source = "; ".join(notes)
        self.batch_size = batch_size
        self.train = _Sentences(short, self.vocabulary.pad)
        self.test = _Sentences(encode_pairs(test, self.vocabulary), self.vocabulary.pad)
        self.validation = self.test
        if validation is not None:
            self.validation = _Sentences(encode_pairs(validation, self.vocabulary), self.vocabulary.pad)

    def train_dataloader(self) -> Batches:
        """Batches in random order."""
        return training_batches(self, self.train, self.batch_size, [max(len(one), len(other)) for one, other in self.train.pairs])

    def val_dataloader(self) -> Batches:
        """The validation pairs in order."""
        return self._in_order(self.validation)

    def test_dataloader(self) -> Batches:
        """The test pairs in order."""
        return self._in_order(self.test)

    def _in_order(self, data: _Sentences) -> Batches:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return Batches(data, self.batch_size, rank=rank, world_size=world_size)

    def decode(self, rows: Tensor) -> list[str]:
        """The sentences of rows of tokens, each up to its end mark: what BLEU compares."""
        return [self.vocabulary.decode(row) for row in rows.tolist()]


def encode_pairs(pairs: PairSet, vocabulary: BytePairs) -> list[tuple[list[int], list[int]]]:
    """Tokens of sources (with the end mark) and targets (with begin and end marks)."""
    encode, begin, end = vocabulary.encode, vocabulary.bos, vocabulary.eos
    return [
        ([*encode(source), end], [begin, *encode(target), end]) for source, target in zip(pairs.inputs, pairs.targets, strict=True)
    ]


def tokenize(pairs: PairSet, vocabulary_size: int = 4000, max_length: int = 64) -> TokenSet:
    """Pairs as tokens, for a :class:`~lightning_metaopt.tasks.Translation` family; the vocabulary is that of :class:`PairData`.

    In a recipe: ``class_path: lightning_metaopt.data.tokenize`` with ``init_args``.

    Args:
        pairs: the sentences.
        vocabulary_size: byte-pair tokens, at least 259, made from these sentences; fewer if they do not give so many.
        max_length: pairs with a side of more tokens are left out; ``source`` says how many.

    Raises:
        ValueError: if no pair is left.

    >>> tokens = tokenize(PairSet(["one", "one two"] * 10, ["eins", "eins zwei"] * 10), vocabulary_size=264)
    >>> tokens.inputs.shape, tokens.targets.shape, tokens.targets[0, 0].item()
    (torch.Size([20, 6]), torch.Size([20, 7]), 1)
    """
    vocabulary = _vocabulary((*pairs.inputs, *pairs.targets), vocabulary_size)
    encoded = encode_pairs(pairs, vocabulary)
    short = _Sentences([pair for pair in encoded if max(map(len, pair)) <= max_length], vocabulary.pad)
    if not len(short):
        raise ValueError(f"none of {len(encoded)} pairs has at most {max_length} tokens on both sides; increase max_length")
    inputs, targets = short.fetch(torch.arange(len(short)), None)
    left_out = f"; {len(encoded) - len(short)} pairs of more than {max_length} tokens left out" * (len(short) < len(encoded))
    source = f"{pairs.source}{left_out}; {len(vocabulary)} byte-pair tokens made from these pairs"
    return TokenSet(inputs, targets, vocabulary.pad, len(vocabulary), source)


# A study makes the same data module for each of its runs, and the vocabulary takes seconds.
@lru_cache(maxsize=4)
def _vocabulary(sentences: tuple[str, ...], size: int) -> BytePairs:
    return BytePairs.train(sentences, size)


def _chosen(pairs: PairSet, rows: Tensor) -> PairSet:
    return PairSet([pairs.inputs[row] for row in rows], [pairs.targets[row] for row in rows], pairs.source)


class _Sentences:
    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> None:
        self.pairs, self.pad = pairs, pad

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing here ever changes; a study copies its data for every run

    def __len__(self) -> int:
        return len(self.pairs)

    def fetch(self, rows: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        sources, targets = zip(*(self.pairs[row] for row in rows.tolist()), strict=True)
        return self._padded(sources), self._padded(targets)

    def _padded(self, sentences: Sequence[list[int]]) -> Tensor:
        length = max(map(len, sentences))
        return torch.tensor([[*sentence, *[self.pad] * (length - len(sentence))] for sentence in sentences])
