"""What a training step changes beside parameters and buffers, put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["undisturbed"]

# Attributes of every module that hold hooks and other parts of its machinery.
_MACHINERY = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
# Larger tensors, and those in longer containers, are watched instead of copied: they are usually data.
_COPIED_UP_TO = 2**20
_ENTERED_UP_TO = 1000


class _Silent:
    """Takes every call and gives nothing: in the place of loggers."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None:
        return None


def _nothing(*args: Any, **options: Any) -> None:
    return None


class _Snapshot:
    # Attributes of all submodules with what is in their containers, and copies of tensors that are no parameters.
    def __init__(self, module: nn.Module) -> None:
        self.attributes: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.containers: list[tuple[Any, list[Any]]] = []
        self.tensors: list[tuple[str, Tensor, int, Tensor | None]] = []
        substituted = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.seen: set[int] = set(substituted)
        for name, part in module.named_modules():
            self._enter(name or type(module).__name__, part)

    def _enter(self, name: str, part: nn.Module, *, always: bool = False) -> None:
        if id(part) in self.seen:
            return
        self.seen.add(id(part))
        values = vars(part)
        self.attributes.append((name, values, dict(values)))
        for key, value in values.items():
            if key not in _MACHINERY:
                self._visit(f"{name}.{key}", value, copies=True, always=always)

    def _visit(self, name: str, value: Any, *, copies: bool, always: bool) -> None:
        if isinstance(value, nn.Module):
            self._enter(name, value, always=True)  # one that hides in a list
            return
        if id(value) in self.seen or not isinstance(value, (Tensor, list, dict, set, deque, tuple)):
            return
        self.seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_inference():
                small = copies and value.numel() <= _COPIED_UP_TO
                version = -1 if always and small else value._version  # kernels move running statistics without a new version
                self.tensors.append((name, value, version, value.detach().clone() if small else None))
            return
        inside = list(value.items()) if isinstance(value, dict) else list(value)
        if not isinstance(value, tuple):
            self.containers.append((value, inside))
        copies = copies and len(inside) <= _ENTERED_UP_TO
        for leaf in value.values() if isinstance(value, dict) else inside:
            self._visit(name, leaf, copies=copies, always=always)

    @torch.no_grad()
    def restore(self) -> None:
        for _, values, kept in self.attributes:
            if values.keys() != kept.keys() or any(values[key] is not kept[key] for key in kept):
                values.clear()
                values.update(kept)
        for container, inside in self.containers:
            _refill(container, inside)
        lost = []
        for name, tensor, version, copied in self.tensors:
            if tensor._version == version:
                continue
            if copied is None:
                lost.append(name)
            else:
                tensor.detach().copy_(copied)
        if lost:
            raise RuntimeError(
                f"the training step changes the large tensor {lost[0]!r} in place, which is neither a parameter nor a buffer, so "
                "that repeating the step has changed it once more; make it a buffer with register_buffer(..., persistent=False)"
            )


def _refill(container: Any, inside: list[Any]) -> None:
    now = list(container.items()) if isinstance(container, dict) else list(container)
    pairs = isinstance(container, dict)
    if len(now) == len(inside) and all(
        (a[0] is b[0] and a[1] is b[1]) if pairs else a is b for a, b in zip(now, inside, strict=True)
    ):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(inside)
    else:
        container.extend(inside)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` may do what its training step does; afterwards it is as before, also after an exception.

    Put back are the attributes of all its submodules (counters, states and caches of metrics, hidden states), what is in their
    lists, dictionaries and sets, and tensors in them that were changed in place. ``self.log``, ``log_dict`` and ``print`` do
    nothing, and ``self.logger`` takes everything. Not put back is what lies in other objects (a class of one's own, a file).

    Raises:
        RuntimeError: afterwards, if a tensor of more than a million elements that is neither parameter nor buffer was changed in
            place: such tensors are not copied each time.
    """
    snapshot = _Snapshot(module)
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # a LightningModule without one
        trainer = None
    loggers = list(getattr(trainer, "loggers", None) or [])
    try:
        for part in module.modules():
            if callable(getattr(type(part), "log_dict", None)):
                vars(part).update(log=_nothing, log_dict=_nothing, print=_nothing)
        if trainer is not None and loggers:
            trainer.loggers = [_Silent() for _ in loggers]
        yield
    finally:
        if trainer is not None and loggers:
            trainer.loggers = loggers
        snapshot.restore()
