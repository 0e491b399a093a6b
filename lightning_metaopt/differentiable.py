"""For users of ``higher``: differentiating through a :class:`~lightning_metaopt.LearnedOptimizer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.optimizer import LearnedOptimizer
from lightning_metaopt.rule import State, under
from lightning_metaopt.tree import Tree

__all__ = ["register_higher"]


def register_higher() -> None:
    """Make ``higher`` (``innerloop_ctx``, ``get_diff_optim``) accept a :class:`~lightning_metaopt.LearnedOptimizer`.

    The differentiable steps are those of the rule's pure form, so they equal :func:`~lightning_metaopt.episode.unroll`.
    Meta-parameters to differentiate with respect to go in as ``override={"phi": [dict(rule.named_parameters())]}``;
    learning rates as usual, ``override={"lr": [tensor]}``.

    Raises:
        ModuleNotFoundError: if ``higher`` is not installed.
        ValueError: on use, for an optimizer with ``max_update_norm``.

    >>> import higher, lightning_metaopt as lmo
    >>> register_higher()
    >>> net, rule = torch.nn.Linear(2, 1), lmo.rules.GradientDescent(lr=0.1)
    >>> optimizer = lmo.LearnedOptimizer(net.parameters(), rule)
    >>> with higher.innerloop_ctx(net, optimizer, override={"phi": [dict(rule.named_parameters())]}) as (inner, steps):
    ...     _ = steps.step(inner(torch.ones(4, 2)).square().mean())
    ...     found = torch.autograd.grad(inner(torch.ones(4, 2)).square().mean(), rule.log_lr)
    >>> found[0].shape
    torch.Size([])
    """
    try:
        import higher
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("register_higher needs the package 'higher': pip install higher") from error

    class DifferentiableLearned(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]  # higher has no types
        """One step of the rule's pure form on the fast weights."""

        def __init__(self, other: LearnedOptimizer, *args: Any, **options: Any) -> None:
            if other.max_update_norm is not None:
                raise ValueError("max_update_norm is a guard for deployment; make the optimizer without it to differentiate")
            super().__init__(other, *args, **options)
            self.rule = other.rule
            self.names = [[other.rule_name(p) for p in group["params"]] for group in other.param_groups]

        def _update(self, grouped_grads: list[list[Tensor | None]], **options: Any) -> None:
            grads: Tree = {}
            params: Tree = {}
            state: State = {}
            places: dict[str, tuple[int, int]] = {}
            for g, (group, found) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
                for i, (param, grad) in enumerate(zip(group["params"], found, strict=True)):
                    if grad is None and not self.rule.joint:
                        continue
                    name = self.names[g][i]
                    places[name] = (g, i)
                    grads[name] = (torch.zeros_like(param) if grad is None else grad).unsqueeze(0)
                    decayed = param if group["weight_decay"] == 0 else param * (1 - group["lr"] * group["weight_decay"])
                    params[name] = decayed.unsqueeze(0)
            phi = self.param_groups[0].get("phi")
            fresh = {name: leaf for name, leaf in params.items() if not self.state[places[name][0]][places[name][1]]}
            for name in params.keys() - fresh.keys():
                g, i = places[name]
                for slot, leaf in self.state[g][i].items():
                    state.setdefault(slot, {})[name] = leaf.unsqueeze(0)
            for slot, tree in under(self.rule, phi, lambda rule: rule.init(fresh)).items():
                state.setdefault(slot, {}).update(tree)
            updates, state = under(self.rule, phi, lambda rule: rule(grads, state, params))
            for slot, tree in state.items():
                for name, leaf in tree.items():
                    g, i = places[name]
                    self.state[g][i][slot] = leaf.squeeze(0)
            for name, update in updates.items():
                g, i = places[name]
                group = self.param_groups[g]
                if group["params"][i].requires_grad:
                    factor = group["lr"] / group["lr_unit"]
                    group["params"][i] = (params[name] + (update if factor == 1 else factor * update)).squeeze(0)

    higher.register_optim(LearnedOptimizer, DifferentiableLearned)
