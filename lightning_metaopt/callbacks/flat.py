"""All parameters of an optimizer as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import final

import torch
from torch import Tensor

__all__ = ["Flat"]


@final
class Flat:
    """Where each parameter lies in one vector of ``n`` numbers, of at least single precision.

    Args:
        params: the parameters.

    Raises:
        ValueError: for parameters on several devices.

    >>> flat = Flat([torch.zeros(2, 2), torch.ones(1)])
    >>> flat.join(flat.params), [part.shape for part in flat.split(torch.zeros(5))]
    (tensor([0., 0., 0., 0., 1.]), [torch.Size([2, 2]), torch.Size([1])])
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sizes = [param.numel() for param in self.params]
        devices = {param.device for param in self.params}
        if len(devices) > 1:
            raise ValueError(f"the parameters of one optimizer lie on several devices ({', '.join(map(str, devices))}); use one")
        self.device = devices.pop()
        self.dtype = reduce(torch.promote_types, {param.dtype for param in self.params}, torch.float32)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(self.sizes)

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the same parameters, of the same sizes."""
        return (
            len(params) == len(self.params)
            and all(one is two for one, two in zip(params, self.params, strict=True))
            and self.sizes == [param.numel() for param in params]
        )

    def join(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """One tensor for each parameter as one vector; ``None`` for zeros. ``out`` takes it, instead of new memory."""
        if out is None:
            out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for place, tensor in zip(out.split(self.sizes), tensors, strict=True):
            place.zero_() if tensor is None else place.copy_(tensor.detach().reshape(-1))
        return out

    def split(self, vector: Tensor) -> list[Tensor]:
        """The inverse of :meth:`join` (views, in the type of the vector)."""
        return [part.view_as(param) for part, param in zip(vector.split(self.sizes), self.params, strict=True)]

    def spread(self, numbers: Sequence[float]) -> float | Tensor:
        """One number for each parameter, as one for each coordinate; a plain number if all are the same."""
        if len(set(numbers)) == 1:
            return numbers[0]
        return torch.cat(
            [self.params[0].new_full((size,), x, dtype=self.dtype) for x, size in zip(numbers, self.sizes, strict=True)]
        )
