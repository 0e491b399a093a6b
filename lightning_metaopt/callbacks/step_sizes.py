"""The engine of the online callbacks: factors on a base optimizer's updates, learned while it trains."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_metaopt.callbacks.bootstrapped import Bootstrap
from lightning_metaopt.callbacks.fused import Compile, Passes, length, numbers, squares
from lightning_metaopt.callbacks.hooks import Move, StepEngine
from lightning_metaopt.callbacks.logs import cosine, quantiles
from lightning_metaopt.callbacks.parts import Part, Parts, copied
from lightning_metaopt.callbacks.pieces import Factors, Piece, precise
from lightning_metaopt.metastep import Hint, StepSizeUpdate
from lightning_metaopt.recording import Moment

__all__ = ["Scope", "StepSizes"]

Scope = Literal["element", "tensor", "optimizer"]

_SMALLEST = 1e-3  # root mean square that weights are taken to have at least, when a step is compared with them (as in Adafactor)


@final
class StepSizes(StepEngine):
    """Multiplies the updates of an optimizer by factors :math:`w` that follow their meta-gradients.

    Args:
        optimizer: any optimizer that is not ``LBFGS``.
        update: how the factors move.
        scope: one factor for each ``"element"``, for each ``"tensor"``, or for the whole ``"optimizer"``.
        hint: what is added to the meta-gradient; ``None`` for nothing.
        trust: longest step, as a fraction of the norm of all parameters that take part; a longer one is shortened by ``c < 1``,
            and the factors by :math:`\\sqrt c`. ``None`` for no limit.
        bootstrap: what takes the place of gradients in meta-gradients.
        compile: whether ``torch.compile`` makes the passes over memory, see :class:`~lightning_metaopt.callbacks.fused.Passes`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: StepSizeUpdate,
        scope: Scope = "element",
        hint: Hint | None = None,
        trust: float | None = None,
        bootstrap: Bootstrap | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(optimizer)
        self.update, self.scope, self.hint, self.trust, self.bootstrap = update, scope, hint, trust, bootstrap
        self.clipped, self.skipped = 0, 0
        self.cosine: float | None = None
        self._passes = Passes(update, hint, compile, sum(0 if is_lazy(param) else param.numel() for param in self.params()))
        self._parts = Parts(scope)
        self._shared = Factors()  # of scope "optimizer"
        self._warned, self._logged = False, (0, 0)  # steps and clipped steps when last logged

    def snapshot(self) -> bool:
        """See :class:`StepEngine`."""
        return self._parts.snapshot(self.optimizer.param_groups)

    def detach(self) -> None:
        """See :class:`StepEngine`."""
        super().detach()
        self._parts.release()

    def adjust(self, moves: list[Move]) -> None:
        """One meta-step, and the base optimizer's step with the new factors."""
        moments = [] if self.bootstrap is None else self.bootstrap.take()
        parts = self._parts.arrange(moves, self.optimizer.param_groups, self._old)
        if self.update.rate == 0 and self.trust is None:
            return
        lengths = None
        if (self.scope != "element" and self.bootstrap is None) or self._finite(parts):
            learn = self.update.rate > 0 and self._pull(parts, moments)
            lengths = self._by_element(parts, learn) if self.scope == "element" else self._in_common(parts, learn)
        if lengths is None:  # what the base optimizer did stays
            self._skip(parts)
            return
        shorten = self._shorten(*lengths, sum(part.piece.size for part in parts))
        if shorten < 1:
            self.clipped += 1
            for part in parts:
                self._begin(self._holder(part.piece), part)
        if self.scope != "element":
            self._move(parts, shorten)
        elif shorten < 1:
            for part in parts:
                self._passes.clip(part, shorten)

    def _finite(self, parts: list[Part]) -> bool:
        if not all(math.isfinite(value) for row in numbers([self._passes.check(part) for part in parts]) for value in row):
            return False
        if self.watched:
            self.cosine = cosine(numbers([self._passes.angle(part) for part in parts if part.piece.past is not None]))
        return True

    def _pull(self, parts: list[Part], moments: list[Moment]) -> bool:
        """Put what the target says in the place of the gradients; whether there is something to learn from."""
        if self.bootstrap is None or all(part.piece.past is None for part in parts):
            return True
        moves, known = [move for part in parts for move in part.moves], self.factors()
        factors = [known.get(move.param) for move in moves]
        learning = [part.piece.past is not None and bool(part.lr) for part in parts for _ in part.moves]
        pulls = self.bootstrap.pull(self.optimizer, moves, factors, moments, self._share, learning)
        if pulls is None:
            self.skipped += 1
            return False
        for part in parts:
            part.grad = part.piece.row([pulls.pop(0) for _ in part.moves])
        return True

    # A factor for each number ---------------------------------------------------------------------------------------------
    def _by_element(self, parts: list[Part], learn: bool) -> tuple[float, float]:
        """All but the limit. Lengths of parameters and step."""
        found = []
        for part in parts:
            learned = learn and part.piece.past is not None and bool(part.lr)
            if learned:
                self._begin(part.piece, part)
                part.piece.count += 1
            found.append(self._passes.element(part, learned, self.trust is not None))
        rows = [] if self.trust is None else numbers(found)
        return length([row[1] for row in rows]), length([part.lr**2 * row[0] for part, row in zip(parts, rows, strict=False)])

    # A factor for a tensor or for all ---------------------------------------------------------------------------------------
    def _in_common(self, parts: list[Part], learn: bool) -> tuple[float, float] | None:
        """The same for factors of tensors or of the whole optimizer, before the parameters are changed."""
        sums, learned = [], []
        for part in parts:
            learned.append(part.piece.past is not None and bool(part.lr))
            sums.append(self._passes.products(part))
        rows = numbers(sums)
        if not all(math.isfinite(value) for row in rows for value in row):
            return None
        which = [number for number, yes in enumerate(learned) if yes]
        if self.watched and self.bootstrap is None:
            self.cosine = cosine([rows[number] for number in which])
        if which and learn:
            self._learn([parts[number] for number in which], [sums[number] for number in which])
        for part in parts:
            if not part.lr:
                part.piece.forget()
        factors = self._factors(parts)
        steps = [(part.lr * factor) ** 2 * row[4] for part, factor, row in zip(parts, factors, rows, strict=True)]
        return length([row[5] for row in rows]), length(steps)

    def _learn(self, parts: list[Part], sums: list[Tensor]) -> None:
        first = next((part.base_lr for part in parts if part.base_lr), 1.0)
        whole: Tensor | None = None  # sums over tensors, for one factor in all
        for part, products in zip(parts, sums, strict=True):
            own = part.base_lr or part.lr
            weight = self.update.weight(own, first if self.scope == "optimizer" else own)
            row = products[:4] * products.new_tensor([1.0, weight**2, weight, weight])
            if self.scope == "tensor":
                self._advance(part.piece, part, row[2], row[3])
            else:
                whole = row if whole is None else whole + row.to(whole)
        if whole is not None:
            if self.update.relative:  # no change where one of both is zero
                whole[2] = (whole[2] / whole[0].sqrt() / whole[1].sqrt()).nan_to_num_(0.0).clamp_(-1, 1)
            most = max(parts, key=lambda part: part.momentum)
            self._advance(self._shared, most, whole[2], whole[3])

    def _advance(self, factors: Factors, part: Part, meta: Tensor, current: Tensor) -> None:
        self._begin(factors, part)
        factors.count += 1
        if self.hint is not None:
            pair = (current, torch.ones_like(current)) if self.hint.of == "current" else None
            meta = self.hint.add_(meta.clone(), pair, factors.slots.get("hint"), self.hint.strength(factors.count))
        self.update.advance_(factors.slots, meta.clone(), self.update.scales(factors.count))

    def _factors(self, parts: list[Part]) -> list[float]:
        """As numbers."""
        held = [self._holder(part.piece).slots for part in parts]
        known = {id(slots): self.update.factor(slots).reshape(1) for slots in held if slots}
        values = dict(zip(known, numbers(list(known.values())), strict=True))
        return [values[id(slots)][0] if slots else 1.0 for slots in held]

    def _move(self, parts: list[Part], shorten: float) -> None:
        factors = self._factors(parts)
        for part, factor in zip(parts, factors, strict=True):
            if part.lr and self._holder(part.piece).slots:
                self._passes.move(part, part.lr * factor * shorten if shorten else 0.0)
        for holder in {id(holder): holder for holder in (self._holder(part.piece) for part in parts)}.values():
            if shorten < 1:
                self.update.shorten_(holder.slots, self.update.shift(math.sqrt(shorten)))

    # For both -----------------------------------------------------------------------------------------------------------------
    def _begin(self, factors: Factors, part: Part) -> None:
        """State of the factors, if there is none yet, and a place for the hint."""
        corrects = self.hint is not None and self.hint.corrects(part.momentum)
        if factors.slots and corrects == ("hint" in factors.slots):
            return
        like = precise(part.piece.old) if self.scope == "element" else precise(part.piece.old).new_ones(())
        if not factors.slots:
            factors.slots.update(self.update.start(like))
        if corrects:
            factors.slots["hint"] = torch.zeros_like(like)
        else:
            factors.slots.pop("hint", None)

    def _holder(self, piece: Piece) -> Factors:
        return self._shared if self.scope == "optimizer" else piece

    def _shorten(self, size: float, step: float, count: int) -> float:
        if self.trust is None:
            return 1.0
        longest = self.trust * max(size, _SMALLEST * math.sqrt(count))
        if math.isfinite(step):
            return min(1.0, longest / step) if step else 1.0
        # The factors have taken a finite direction out of range; only a step of nothing is safe.
        return 0.0

    def _share(self, points: list[Tensor], changes: list[Tensor]) -> float:
        """The share of a step that is taken: for steps that are only tried."""
        size, step = (length(squares(tensors)) for tensors in (points, changes))
        return self._shorten(size, step, sum(point.numel() for point in points))

    def _skip(self, parts: list[Part]) -> None:
        for part in parts:
            part.piece.forget()
        self._shared.slots.pop("hint", None)
        if self.bootstrap is not None:
            self.bootstrap.hints.clear()
        self.skipped, self.cosine = self.skipped + 1, None
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a gradient or an update is not finite, so the step sizes were not changed in this step, and the optimizer's "
                "update is applied as it is. Clip the gradients or lower lr. Further such steps are only counted, in `skipped`.",
                UserWarning,
                stacklevel=2,
            )

    def factors(self) -> dict[Tensor, Tensor]:
        """The factors by parameter: of its shape, or a number for the other scopes. Left out while still 1."""
        found: dict[Tensor, Tensor] = {}
        for piece in dict.fromkeys(self._parts.pieces.values()):
            slots = self._holder(piece).slots
            if slots:
                found.update(zip(piece.params, piece.shaped(self.update.factor(slots)), strict=True))
        return {param: found[param] for param in self.params() if param in found}

    def metrics(self, names: dict[Tensor, str]) -> dict[str, float]:
        """Quantiles of the factors, the cosine of gradient and last direction, shares of shortened and skipped steps."""
        steps, clipped = self.steps - self._logged[0], self.clipped - self._logged[1]
        self._logged = self.steps, self.clipped
        found = {"skipped": float(self.skipped)}
        if self.trust is not None and steps:
            found["clip_rate"] = clipped / steps
        if self.cosine is not None:
            found["cosine"] = self.cosine
        order = {param: f"param{number}" for number, param in enumerate(self.params())}
        for param, factor in self.factors().items():
            if self.scope == "optimizer":
                return found | {"factor": float(factor)}
            name = names.get(param, order.get(param, "removed"))
            if self.scope == "tensor":
                found[f"factor/{name}"] = float(factor)
                continue
            found |= {f"factor/{name}/{level}": value for level, value in quantiles(factor).items()}
        return found

    def _identity(self) -> dict[str, Any]:
        hint, target = self.hint and [self.hint.of, self.hint.corrected], self.bootstrap and self.bootstrap.identity
        return {"update": type(self.update).__name__, "scope": self.scope, "hint": hint, "target": target}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`StepEngine`."""
        counts = {"steps": self.steps, "clipped": self.clipped, "skipped": self.skipped, "logged": list(self._logged)}
        shared = copied({"slots": self._shared.slots, "count": self._shared.count})
        state = {"base": dict(self._base), "shared": shared, "tensors": self._parts.states(self.params())}
        if self.bootstrap is not None:
            state["hints"] = self.bootstrap.state(self.params())
        return {"format": 1, **self._identity(), **counts, **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :class:`StepEngine`."""
        own = self._identity()
        if any(state_dict[key] != own[key] for key in own):
            saved = {key: state_dict[key] for key in own}
            raise ValueError(
                f"the step sizes were saved with other options, {saved} instead of {own}; give the same ones to continue"
            )
        self.steps, self.clipped, self.skipped = (state_dict[key] for key in ("steps", "clipped", "skipped"))
        self._logged = (state_dict["logged"][0], state_dict["logged"][1])
        self._base = dict(state_dict["base"])
        shared, first = state_dict["shared"], self.params()[0]
        slots = {name: value.to(first.device) for name, value in copied(shared.get("slots", {})).items()}
        self._shared = Factors(slots, shared.get("count", 0))
        self._parts.load(state_dict["tensors"], self.optimizer.param_groups, self._old)
        if self.bootstrap is not None:
            self.bootstrap.load(state_dict["hints"], self.params())
