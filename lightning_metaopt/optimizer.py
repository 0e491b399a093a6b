"""A rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_metaopt.deployment import check_group, check_same, frozen, identity, with_labels
from lightning_metaopt.inplace import Slot, advance
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import align

__all__ = ["LearnedOptimizer"]


@final
class LearnedOptimizer(Optimizer):
    """Runs any rule in place, as a drop-in for the optimizers of ``torch.optim``.

    One step is

    .. math:: \\theta \\leftarrow (1 - \\mathrm{lr}\\,\\lambda)\\,\\theta, \\qquad
              \\theta \\leftarrow \\theta + \\frac{\\mathrm{lr}}{\\mathrm{lr\\_unit}}\\, u(g, s, \\theta; \\phi) .

    Args:
        params: parameters, named parameters, or param groups with their own ``lr``, ``lr_unit`` and ``weight_decay``.
        rule: a rule (it is copied), or the name or file of a saved one (see :func:`~lightning_metaopt.load_rule`).
        lr: how much of the rule's update to apply: 1 is the update as it was trained, 0.5 half of it. LR schedulers
            change it as usual. The entry ``lr_unit`` of a param group, 1 by default, is the learning rate at which the
            update is applied as it was trained; :class:`~lightning_metaopt.SwapOptimizer` sets it to the learning rate
            of the optimizer that it replaces.
        weight_decay: :math:`\\lambda \\ge 0`, decoupled, in the units of ``torch.optim.AdamW``: each step takes the
            fraction ``lr * weight_decay`` off the parameter, before the rule is applied.
        max_update_norm: longest step, as the Euclidean norm of all updates together (without weight decay); longer ones
            are shortened. ``None`` for no limit.

    A rule that is sized per parameter is matched by name if ``params`` are named, else by order. State lies in
    ``optimizer.state[parameter][slot]``. Parameters in half precision are handed to the rule as float32: its state is
    float32, and each step is rounded once. The meta-parameters are cast to the precision in which the rule computes;
    they are part of ``state_dict`` and get no gradients here.

    Parameters without gradient, and their state, are left alone. A step whose gradients are not finite, or whose updates
    are not, changes neither parameters nor state; :attr:`skipped_steps` counts it. (The updates are checked where they
    are computed before they are applied, which is everywhere but in the rules' own in-place forms.)

    Raises:
        ValueError: for an empty list, a rule sized for other parameters, or a value out of range.
        TypeError: for complex or integer parameters, or a ``rule`` that is none.

    >>> import lightning_metaopt as lmo
    >>> net = torch.nn.Linear(3, 1)
    >>> optimizer = LearnedOptimizer(net.named_parameters(), rule=lmo.rules.HeavyBall(lr=0.1))
    >>> net(torch.ones(2, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> list(optimizer.state[net.weight]), optimizer.skipped_steps
    (['momentum'], 0)
    """

    def __init__(
        self,
        params: ParamsT,
        rule: Rule | str | os.PathLike[str],
        lr: float = 1.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
    ) -> None:
        if max_update_norm is not None and not max_update_norm > 0:
            raise ValueError(f"max_update_norm must be positive or None, got {max_update_norm}")
        self.rule = frozen(rule)
        self.max_update_norm = max_update_norm
        self._names: dict[Tensor, str] = {}
        self._partners: dict[str, str] | None = None  # name of a parameter: name that the rule has for it
        self._warned = False
        super().__init__(params, {"lr": lr, "lr_unit": 1.0, "weight_decay": weight_decay, "skipped_steps": 0})
        self._match()

    @classmethod
    def replacing(
        cls,
        optimizer: Optimizer,
        rule: Rule | str | os.PathLike[str],
        *,
        lr_unit: float | None = None,
        weight_decay: float | None = None,
        max_update_norm: float | None = None,
        names: Mapping[Tensor, str] | None = None,
    ) -> Self:
        """A learned optimizer with the very param groups of ``optimizer``, so that its LR schedulers act on this one.

        Raises ``ValueError`` if ``optimizer`` maximises, or has no positive learning rate.

        Args:
            optimizer: what to replace; it must not be stepped any more.
            rule: see :class:`LearnedOptimizer`.
            lr_unit: the learning rate at which the update is applied as it was trained; ``None`` for the one that each
                group is built for: ``max_lr`` or ``initial_lr`` where a scheduler has recorded it, else ``lr``.
            weight_decay: ``None`` to keep that of each group (decoupled from now on, whatever it was).
            max_update_norm: see :class:`LearnedOptimizer`.
            names: names of the parameters, for groups that have none.
        """
        groups, names = optimizer.param_groups, names or {}
        for group in groups:
            if group.get("maximize"):
                raise ValueError("an optimizer with maximize=True cannot be replaced: rules minimise; negate the loss instead")
            if "lr" not in group:
                raise ValueError(f"{type(optimizer).__name__} has no learning rate; let configure_optimizers return one that has")
            group["lr_unit"] = float(group.get("max_lr", group.get("initial_lr", group["lr"])) if lr_unit is None else lr_unit)
            if weight_decay is not None:
                group["weight_decay"] = weight_decay
        unnamed = [group for group in groups if "param_names" not in group]
        for index, group in enumerate(unnamed):
            group["param_names"] = [names.get(p, f"group{index}.param{i}") for i, p in enumerate(group["params"])]
        try:
            new = cls(groups, rule, max_update_norm=max_update_norm)
        finally:
            for group in unnamed:  # as their owner made them, so that he can add further groups without names
                group.pop("param_names", None)
        new.param_groups = groups
        new.defaults.update({key: optimizer.defaults.get(key, groups[0][key]) for key in ("lr", "weight_decay", "lr_unit")})
        new._names = {**names, **new._names}
        return new

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because gradients or updates were not finite; part of ``state_dict``."""
        return int(self.param_groups[0]["skipped_steps"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; a group that is refused leaves the optimizer as it was."""
        super().add_param_group(param_group)
        names = self._names
        try:
            check_group(param_group, len(self.param_groups) - 1)
            self._names = with_labels(names, param_group, len(self.param_groups) - 1)
            if self._partners is not None:
                self._match()
        except (TypeError, ValueError):
            self.param_groups.pop()
            self._names = names
            raise

    def _match(self) -> None:
        # Which entry of the rule belongs to which parameter.
        shapes, params = self.rule.shapes, [p for group in self.param_groups for p in group["params"]]
        if shapes is None:
            self._partners = {self._names[p]: self._names[p] for p in params}
            return
        if any(is_lazy(p) for p in params):
            return
        trained = {self._names[p]: tuple(p.shape) for p in params if p.requires_grad}
        try:
            partners = align(shapes, {self._names[p]: tuple(p.shape) for p in params})
        except ValueError:
            if len(trained) == len(params):
                raise
            partners = align(shapes, trained)  # a rule may be sized for the trained parameters alone
        missing = shapes.keys() - set(partners.values())
        if self.rule.joint and missing:
            raise ValueError(
                f"{type(self.rule).__name__} couples all the parameters that it was made for, but {min(missing)!r} is not among "
                "those given; pass all of them to one optimizer"
            )
        self._partners = partners

    def rule_name(self, param: Tensor) -> str:
        """The name under which the rule knows a parameter."""
        if self._names[param] not in (self._partners or {}):
            self._match()  # a lazy parameter has got its shape, or a frozen one has thawed
        if self._partners is None:
            raise RuntimeError(
                "a parameter is still lazy: let all of them get their shapes in a forward pass before the first step"
            )
        return self._partners[self._names[param]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what ``closure`` returned.

        Args:
            closure: computes the loss and its gradients; a number that it returns is handed to the rule.

        Raises:
            RuntimeError: for sparse gradients, or parameters on several devices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = self._collect()
        if slots:
            device, dtype = self._place()
            known = isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1)
            value = torch.as_tensor(loss, device=device, dtype=dtype).detach().reshape(1) if known else None
            with torch.autocast(device.type, enabled=False):  # manual optimisation steps inside autocast
                trouble = advance(self.rule, slots, self.state, dtype, loss=value, limit=self.max_update_norm)
            if trouble is not None:
                self._skipped(trouble[0], self._names[slots[trouble[1]].param])
        return loss

    def _collect(self) -> dict[str, Slot]:
        # The parameters that take part, under the rule's names.
        slots, some = {}, False
        for group in self.param_groups:
            factor = float(group["lr"]) / group["lr_unit"]
            shrink = 1 - float(group["lr"]) * float(group["weight_decay"])
            for param in group["params"]:
                grad = param.grad if param.requires_grad else None
                if grad is None and not self.rule.joint:
                    continue
                name = self._names[param]
                if grad is None:
                    grad = torch.zeros_like(param)
                elif grad.layout != torch.strided:
                    raise RuntimeError(f"the gradient of parameter {name!r} is sparse, rules need dense ones: use sparse=False")
                else:
                    some = True
                if param.requires_grad or name in (self._partners or {}):
                    slots[self.rule_name(param)] = Slot(param, grad.detach(), factor, shrink)
        return slots if some else {}

    def _place(self) -> tuple[torch.device, torch.dtype]:
        # Bring phi to the parameters' device, and to the precision in which the rule computes.
        params = [p for group in self.param_groups for p in group["params"]]
        device = params[0].device
        for param in params:
            if param.device != device:
                raise RuntimeError(
                    f"parameter {self._names[param]!r} is on {param.device}, {self._names[params[0]]!r} on {device}: "
                    "make one LearnedOptimizer for each device"
                )
        dtype = reduce(torch.promote_types, {p.dtype for p in params}, torch.float32)
        phi = next(self.rule.parameters(), None)
        if phi is None or phi.device != device or phi.dtype != dtype:
            self.rule.to(device, dtype)
        return device, dtype

    def _skipped(self, what: str, name: str) -> None:
        self.param_groups[0]["skipped_steps"] += 1
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the {what} of parameter {name!r} is not finite, so this step was left out: parameters and state stay as they "
                "were. Clip the gradients, lower lr, or look for the first bad value with "
                "torch.autograd.set_detect_anomaly(True). Further such steps are only counted, in `skipped_steps`.",
                UserWarning,
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim.Optimizer``, with the rule (class, configuration and phi) under the key ``"rule"``."""
        return {**super().state_dict(), "rule": identity(self.rule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit by bit. The param groups stay the same objects: schedulers hold them.

        Raises:
            ValueError: if it was saved by another optimizer, with another rule, or for other parameters.
        """
        groups, found = self.param_groups, state_dict

        def before(_: Optimizer, given: dict[str, Any]) -> None:
            nonlocal found
            check_same(given.get("rule"), identity(self.rule))
            found = given

        def after(_: Optimizer) -> None:
            # torch casts state to the parameters' precision and leaves "step" on the CPU; take it as it was saved.
            numbers = [number for group in found["param_groups"] for number in group["params"]]
            for param, number in zip((p for group in groups for p in group["params"]), numbers, strict=True):
                if number in found["state"]:
                    self.state[param] = {key: leaf.to(param.device, copy=True) for key, leaf in found["state"][number].items()}
            for group, loaded in zip(groups, self.param_groups, strict=True):
                group.update(loaded)
            self.param_groups = groups
            self._place()
            self.rule.load_state_dict(found["rule"]["phi"])

        handles = [self.register_load_state_dict_pre_hook(before), self.register_load_state_dict_post_hook(after, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps state and groups only.
        own = {key: self.__dict__[key] for key in ("rule", "max_update_norm", "_names", "_partners", "_warned")}
        return {**super().__getstate__(), **own}
