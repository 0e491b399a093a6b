"""Several data sets of images as the domains of one family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import nn

from lightning_metaopt.tasks.images import ImageSet
from lightning_metaopt.tasks.supervised import FromSupervised, Supervised
from lightning_metaopt.tasks.variation import Subset

__all__ = ["ImageDomains"]


@final
class ImageDomains(FromSupervised):
    """Training classifiers on one of several data sets: each problem has its own domain, network and order of minibatches.

    The domains are drawn with equal probability, whatever their sizes. MetaMD (section 5.2) takes MNIST, QMNIST, KMNIST,
    FashionMNIST, USPS and SVHN, leaves out one and trains on it at the end.

    Args:
        domains: data sets by name, of one image shape.
        model: maps ``(n, channels, height, width)`` to ``(n, classes)``: a module, or a function that builds one.
        leave_out: names of domains that no problem draws, to be trained on at the end.
        batch_size: images of one inner step.
        held_out: fraction of the images for validation.
        val_batch_size: images of the validation minibatch; default: as ``batch_size``.
        classes: each problem has this many classes of its domain, drawn and numbered at random (20 for MetaMD's images of
            high resolution, whose domains differ in classes); default: all, as they are.
        shared_init: all networks start at one point instead of each at its own.

    Attributes:
        names: the domains that problems are drawn from; ``task.data["group"]`` counts them.
        source: where the images of these come from.

    Raises:
        ValueError: for domains that do not fit together, if none is left, or as :class:`Supervised` does.

    >>> one, two = (ImageSet(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50) % 10) for _ in range(2))
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> family = ImageDomains({"one": one, "two": two}, model, batch_size=16)
    >>> [family.names[group] for group in family.draw(seed=0, size=4).data["group"]]
    ['two', 'two', 'two', 'one']
    """

    def __init__(
        self,
        domains: dict[str, ImageSet],
        model: nn.Module | Callable[[], nn.Module],
        *,
        leave_out: Sequence[str] = (),
        batch_size: int = 128,
        held_out: float = 0.2,
        val_batch_size: int | None = None,
        classes: int | None = None,
        shared_init: bool = False,
    ) -> None:
        if unknown := sorted(set(leave_out) - set(domains)):
            raise ValueError(f"leave_out names no domain with {', '.join(unknown)}; there are: {', '.join(domains)}")
        kept = {name: data for name, data in domains.items() if name not in leave_out}
        if not kept:
            raise ValueError("no domain is left to draw problems from")
        _check(kept, classes)
        self.names = list(kept)
        labels = torch.cat([data.labels for data in kept.values()])
        groups = torch.cat([torch.full((len(data),), number) for number, data in enumerate(kept.values())])
        super().__init__(
            Supervised(
                model,
                torch.cat([data.images for data in kept.values()]),
                labels,
                batch_size=batch_size,
                held_out=held_out,
                val_batch_size=val_batch_size,
                variation=Subset(labels, groups, classes),
                shared_init=shared_init,
            ),
            "; ".join(f"{name}: {data.source}" for name, data in kept.items()),
        )


def _check(domains: Mapping[str, ImageSet], classes: int | None) -> None:
    shapes = {name: (*data.images.shape[1:], str(data.images.dtype)) for name, data in domains.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the domains differ in shape or type: {shapes}; load them with the same size= and channels=")
    counts = {name: int(data.labels.max()) + 1 for name, data in domains.items()}
    if classes is None and len(set(counts.values())) > 1:
        raise ValueError(f"the domains differ in classes: {counts}; give classes=, the number that each problem draws")
