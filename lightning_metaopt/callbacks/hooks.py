"""The steps of an optimizer, followed and changed from outside, whatever optimizer it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_metaopt.callbacks.families import has_momentum

__all__ = ["Move", "StepEngine"]


class Move(NamedTuple):
    """What one step of the base optimizer did to one parameter.

    Attributes:
        param: the parameter, at its new value.
        old: its value before the step.
        grad: the gradient that the optimizer used: unscaled, clipped, of the accumulated batches, averaged over processes;
            its sign is turned for optimizers that maximise.
        lr: the learning rate of its param group in this step.
        base_lr: the one that its schedule starts from: the peak of ``OneCycleLR``, else ``initial_lr``, else the first ``lr``.
        momentum: whether the optimizer averages over steps, as far as its param group tells; if it does not tell, ``True``.
    """

    param: Tensor
    old: Tensor
    grad: Tensor
    lr: float
    base_lr: float
    momentum: bool = True


class StepEngine(ABC):
    """Follows the steps of one optimizer, through its public hooks: the parameters are copied before each step and
    handed to :meth:`adjust` after it, together with the gradients. The optimizer and its ``state_dict`` stay as they are.

    Raises:
        TypeError: for something that is no ``torch.optim.Optimizer``, and for complex parameters.
        ValueError: for ``LBFGS``, which takes several steps in one, and for an optimizer without parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check(optimizer)
        self.optimizer = optimizer
        self.active, self.watched, self._stepping, self.steps = True, False, False, 0
        self._old: dict[Tensor, Tensor] = {}
        self._base: dict[int, float] = {}  # learning rates that groups without scheduler began with
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Follow the optimizer from now on."""
        if not self._handles:
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before),
                self.optimizer.register_step_post_hook(self._after),
            ]

    def detach(self) -> None:
        """Leave the optimizer alone from now on; what was learned stays here."""
        while self._handles:
            self._handles.pop().remove()
        self._old.clear()

    @property
    def compares(self) -> bool:
        """Whether :meth:`adjust` looks at ``Move.old``; if not, that is the parameter itself."""
        return True

    def snapshot(self) -> bool:
        """Copy the parameters in a quicker way than one by one, where nothing has changed since the last step; else ``False``."""
        return False

    @abstractmethod
    def adjust(self, moves: list[Move]) -> None:
        """Change the parameters after a step (without gradients being recorded, outside of autocast)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was learned, in plain containers and tensors, in the order of the optimizer's param groups."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ``ValueError`` if it belongs to other options or parameters."""

    def metrics(self, names: dict[Tensor, str]) -> dict[str, float]:
        """What to log; by default nothing."""
        return {}

    def watch(self, now: bool) -> None:
        """Whether the next step will be logged, for what is costly to measure."""
        self.watched = now

    def params(self) -> list[Tensor]:
        """The optimizer's parameters in the order of its groups."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self.active:
            self._stepping = True
            if not self.snapshot():
                self._copy_each()

    @torch.no_grad()
    def _copy_each(self) -> None:
        compares = self.compares
        for param in self.params():
            old = self._old.get(param)
            if is_lazy(param) or not param.requires_grad:
                self._old.pop(param, None)
            elif not compares:
                self._old[param] = param
            elif old is None or old is param or old.shape != param.shape or old.dtype != param.dtype or old.device != param.device:
                self._old[param] = param.detach().clone()
            else:
                old.copy_(param)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if not (self.active and self._stepping):  # torch calls the hooks twice where a step calls super().step()
            return
        self._stepping = False
        moves = []
        for number, group in enumerate(optimizer.param_groups):
            lr, momentum = float(group.get("lr", 1.0)), has_momentum(group)
            base = float(group.get("max_lr", group.get("initial_lr", self._base.setdefault(number, lr))))
            for param in group["params"]:
                grad, old = param.grad, self._old.get(param)
                # A lazy parameter has got its shape in this very step: its first update stays as it is.
                if grad is None or old is None:
                    continue
                if grad.layout != torch.strided:
                    raise RuntimeError(f"{type(self).__name__} needs dense gradients: use sparse=False in embeddings")
                grad = -grad.detach() if group.get("maximize") else grad.detach()
                moves.append(Move(param, old, grad, lr, base, momentum))
        if moves:
            self.steps += 1
            device = moves[0].param.device.type
            # Manual optimisation steps inside autocast; entering another context costs what a whole tensor operation does.
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                self.adjust(moves)


def check(optimizer: Any) -> None:
    """Raise for optimizers whose updates cannot be followed."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is not a torch.optim.Optimizer, whose steps could be followed")
    if any(cls.__name__ == "LBFGS" for cls in type(optimizer).__mro__):
        raise ValueError("LBFGS searches along a line within one step; use an optimizer with one update a step (SGD, Adam, ...)")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not params:
        raise ValueError(f"{name} has no parameters: let configure_optimizers return an optimizer that trains some")
    if any(hasattr(param, "device_mesh") for param in params):
        raise ValueError("parameters that are sharded over devices are not supported; use strategy='ddp' or a single device")
    if any(param.is_complex() for param in params):
        raise TypeError("complex parameters are not supported; train torch.view_as_real of them")
