"""What a training step was given and what it draws, kept so that it can be repeated."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.tree import Tree

__all__ = ["Moment", "Randomness", "cloned"]


def cloned(value: Any) -> Any:
    """A deep copy in which a tensor takes no more memory than it has elements (a view does not bring its storage along).

    Raises:
        TypeError: for what cannot be copied, such as an iterator.

    >>> data = torch.zeros(1000)
    >>> cloned({"x": data[:2]})["x"].untyped_storage().nbytes()
    8
    """
    memo: dict[int, Any] = {}
    for leaf in _reachable([value]):
        if isinstance(leaf, Tensor):
            memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise TypeError(
            f"a batch of type {type(value).__name__} cannot be copied, so its training step cannot be repeated ({error}); let the "
            "data loader return tensors, or containers of tensors"
        ) from error


def _reachable(stack: list[Any]) -> Iterator[Any]:
    # What lies in containers and plain objects, each once.
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Tensor):
            continue
        if isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            stack.extend(value)
        if hasattr(value, "__dict__") and not callable(value):
            stack.extend(vars(value).values())


@final
class Randomness:
    """The state of everything that a training step usually draws from: torch's generators on the CPU and on ``devices``, those
    that are attributes of ``module``, and the global ones of Python and, if it is in use, numpy.
    """

    def __init__(self, module: nn.Module, devices: Iterable[torch.device]) -> None:
        self.own = [
            (generator, generator.get_state())
            for part in module.modules()
            for generator in vars(part).values()
            if isinstance(generator, torch.Generator)
        ]
        self.devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self.states = [_device_state(device) for device in self.devices]
        self.cpu = torch.get_rng_state()
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def put(self) -> None:
        """Set all generators to this state."""
        for generator, state in self.own:
            generator.set_state(state)
        for device, state in zip(self.devices, self.states, strict=True):
            _set_device_state(device, state)
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    @contextmanager
    def again(self, module: nn.Module) -> Iterator[None]:
        """Inside, the same numbers are drawn as after this state was taken; afterwards the generators are as before."""
        now = Randomness(module, self.devices)
        try:
            self.put()
            yield
        finally:
            now.put()


def _device_state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _set_device_state(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


@final
@dataclass(frozen=True)
class Moment:
    """What is needed to repeat one training step; it keeps a copy of the batch in memory, and of the buffers if there are some.

    Attributes:
        batch: a copy of the batch.
        batch_idx: its number, for training steps that take it.
        randomness: the generators' states before the step.
        weight: what the loss counts; ``1 / N`` where gradients of ``N`` batches are accumulated.
        buffers: the buffers before the step, or ``None`` to repeat it with those that the module has then.
    """

    batch: Any
    batch_idx: int
    randomness: Randomness
    weight: float = 1.0
    buffers: Tree | None = None
