"""The rule of OptimisticMetaGrad as one would write it down: whole tensors, new memory for everything, nothing shared."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.callbacks.hooks import Move, StepEngine


@final
class Plain(StepEngine):
    """``log`` or ``raw`` rule, any scope, hint of the current meta-gradient with or without correction, limit of the step."""

    def __init__(self, optimizer: Any, scope: str, log: bool, rate: float, kappa: float, corrected: bool, trust: float) -> None:
        super().__init__(optimizer)
        self.scope, self.log, self.rate, self.kappa, self.corrected, self.trust = scope, log, rate, kappa, corrected, trust
        self.past: dict[Any, Tensor] = {}
        self.state: dict[Any, dict[str, Any]] = {}
        self.clipped = 0

    def adjust(self, moves: list[Move]) -> None:
        wide = [torch.promote_types(move.param.dtype, torch.float32) for move in moves]
        grads = [move.grad.to(dtype) for move, dtype in zip(moves, wide, strict=True)]
        directions = [(move.old.to(dtype) - move.param.to(dtype)) / move.lr for move, dtype in zip(moves, wide, strict=True)]
        if not all(torch.isfinite(value).all() for value in grads + [move.param for move in moves]):
            self.past.clear()
            return
        sums: dict[Any, list[Any]] = {}
        for move, g, p in zip(moves, grads, directions, strict=True):
            if move.param in self.past:
                last = self.past[move.param]
                own = move.base_lr
                first = moves[0].base_lr if self.scope == "optimizer" else own
                weight = own / first if self.log else own / first**2
                both = [weight * g * last, weight * self.kappa * g * p]
                found = both if self.scope == "element" else [value.sum() for value in both]
                have = sums.get(self.key(move), [0.0, 0.0])
                sums[self.key(move)] = [one + other for one, other in zip(found, have, strict=True)]
            self.past[move.param] = p
        for key, (meta, hint) in sums.items():
            self.advance(self.state.setdefault(key, {}), meta, hint)
        changes = [m.lr * self.factor(self.state.get(self.key(m))) * p for m, p in zip(moves, directions, strict=True)]
        size = math.sqrt(sum(float(move.old.double().square().sum()) for move in moves))
        step = math.sqrt(sum(float(change.double().square().sum()) for change in changes))
        c = min(1.0, self.trust * max(size, 1e-3 * math.sqrt(sum(move.param.numel() for move in moves))) / step)
        for move, change, dtype in zip(moves, changes, wide, strict=True):
            if c < 1 or self.state.get(self.key(move)):
                move.param.copy_(move.old.to(dtype) - c * change)
        if c < 1:
            self.clipped += 1
            for move, p in {self.key(move): (move, p) for move, p in zip(moves, directions, strict=True)}.values():
                state = self.state.setdefault(self.key(move), {})
                zero = torch.zeros_like(p) if self.scope == "element" else p.new_zeros(())
                if self.log:
                    state["log"] = (state.get("log", zero) + 0.5 * math.log(c)).clamp(-math.log(1e4), math.log(1e4))
                else:
                    state["factor"] = state.get("factor", zero + 1) * math.sqrt(c)

    def key(self, move: Move) -> Any:
        return None if self.scope == "optimizer" else move.param

    def factor(self, state: dict[str, Any] | None) -> Any:
        if not state:
            return 1.0
        return state["log"].exp() if self.log else state["factor"]

    def advance(self, state: dict[str, Any], meta: Tensor, hint: Tensor) -> None:
        state["t"] = t = state.get("t", 0) + 1
        hint = hint / (1 + t / 80) ** 2 if self.log else hint  # the usual one of "log" fades, as the rate does
        d = meta + hint - (state.get("hint", 0.0) if self.corrected else 0.0)
        state["hint"] = hint
        if not self.log:
            state["factor"] = (state.get("factor", torch.ones_like(d)) + self.rate * d).clamp(min=0)
            return
        state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * d
        state["square"] = 0.999 * state.get("square", 0.0) + 0.001 * d * d
        root = (state["square"] / (1 - 0.999**t)).sqrt() + 1e-20
        change = self.rate / (1 + t / 80) ** 2 * state["mean"] / (1 - 0.9**t) / root
        state["log"] = (state.get("log", torch.zeros_like(d)) + change).clamp(-math.log(1e4), math.log(1e4))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        del state_dict
