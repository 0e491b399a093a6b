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

__all__ = ["Moment", "Randomness", "cloned", "placed", "plain"]


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

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers and tensors."""
        numpy = None if self.numpy is None else [self.numpy[0], torch.from_numpy(self.numpy[1].astype("int64")), *self.numpy[2:]]
        return {
            "own": [state for _, state in self.own],
            "devices": [(str(device), state) for device, state in zip(self.devices, self.states, strict=True)],
            "cpu": self.cpu,
            "python": self.python,
            "numpy": numpy,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], module: nn.Module) -> Randomness:
        """The same for the generators that are there now, of ``module`` and of all devices."""
        found = cls(module, [])
        found.own = [(generator, kept) for (generator, _), kept in zip(found.own, state["own"], strict=True)]
        found.devices = [torch.device(name) for name, _ in state["devices"]]
        found.states = [kept.cpu() for _, kept in state["devices"]]
        found.cpu, found.python, found.numpy = state["cpu"].cpu(), state["python"], None
        if state["numpy"] is not None:
            found.numpy = (state["numpy"][0], state["numpy"][1].numpy().astype("uint32"), *state["numpy"][2:])
        return found

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

    def state_dict(self) -> dict[str, Any] | None:
        """All of it in plain containers and tensors; ``None`` for a batch that is more than those."""
        if not plain(self.batch):
            return None
        randomness = self.randomness.state_dict()
        return {"batch": self.batch, "index": self.batch_idx, "weight": self.weight, "buffers": self.buffers, "random": randomness}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], module: nn.Module) -> Moment:
        """The same moment, on the device of ``module``."""
        device = next((value.device for value in module.parameters()), torch.device("cpu"))
        randomness = Randomness.from_state_dict(state["random"], module)
        buffers = None if state["buffers"] is None else {name: value.to(device) for name, value in state["buffers"].items()}
        return cls(placed(state["batch"], device), state["index"], randomness, state["weight"], buffers)


def plain(value: Any) -> bool:
    """Whether something consists of plain containers and tensors, which a checkpoint can hold."""
    if type(value) is dict:
        return all(plain(key) and plain(leaf) for key, leaf in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return type(value) in (Tensor, str, bytes, int, float, bool, type(None))


def placed(value: Any, device: torch.device) -> Any:
    """The tensors of plain containers on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: placed(leaf, device) for key, leaf in value.items()}
    return type(value)(placed(leaf, device) for leaf in value) if isinstance(value, (list, tuple)) else value
