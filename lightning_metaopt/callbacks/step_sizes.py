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
from lightning_metaopt.callbacks.hooks import Move, StepEngine
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
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: StepSizeUpdate,
        scope: Scope = "element",
        hint: Hint | None = None,
        trust: float | None = None,
        bootstrap: Bootstrap | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.update, self.scope, self.hint, self.trust, self.bootstrap = update, scope, hint, trust, bootstrap
        self.clipped = 0
        self.skipped = 0
        self.cosine: float | None = None
        self._records: dict[Tensor, dict[str, Any]] = {}  # "past": the last direction; "slots", "count" of the factor
        self._shared: dict[str, Any] = {}  # the factor of scope "optimizer"
        self._waiting: dict[int, dict[str, Any]] = {}  # loaded, for parameters that are lazy or not there yet
        self._logged = (0, 0)  # steps and clipped steps when last logged
        self._warned = False

    def adjust(self, moves: list[Move]) -> None:
        """One meta-step, and the base optimizer's step with the new factors."""
        records = [self._record(move.param) for move in moves]
        moments = [] if self.bootstrap is None else self.bootstrap.take()
        if self.update.rate == 0 and self.trust is None:
            return
        # The direction of the base optimizer; there is none where a schedule has set the learning rate to 0.
        directions = [_precise(move.old).sub(move.param).div_(move.lr) if move.lr else torch.zeros_like(move.old) for move in moves]
        grads = [_precise(move.grad) for move in moves]
        finite = bool(torch.isfinite(torch.stack([*_norms(directions), *_norms(grads)])).all())
        if finite:
            if self.watched:
                self._measure(grads, records)
            pulls = self._pulls(moves, records, directions, grads, moments)
            if pulls is not None:
                self._learn(moves, records, directions, pulls)
        else:
            self._skip()
        for move, record, direction in zip(moves, records, directions, strict=True):
            record.pop("past", None)
            if finite and move.lr:
                record["past"] = direction
            else:
                record.get("slots", {}).pop("hint", None)
        self._apply(moves, records, directions, finite)

    def _pulls(
        self, moves: list[Move], records: list[dict[str, Any]], directions: list[Tensor], grads: list[Tensor], moments: list[Moment]
    ) -> list[Tensor] | None:
        # What takes the place of gradients in meta-gradients; None where there is nothing to be learned.
        if self.bootstrap is None or self.update.rate == 0 or not any("past" in record for record in records):
            return grads if self.update.rate else None
        found = self.bootstrap.pull(self.optimizer, moves, directions, self._factors(records), grads, moments, self._shorten)
        self.skipped += found is None
        return found

    def _learn(self, moves: list[Move], records: list[dict[str, Any]], directions: list[Tensor], grads: list[Tensor]) -> None:
        whole: dict[str, Tensor] = {}  # sums over tensors, for one factor in all
        lengths: list[Tensor] = []  # of gradients and last directions
        first = next((move.base_lr for move in moves if move.base_lr), 1.0)
        for move, record, direction, grad in zip(moves, records, directions, grads, strict=True):
            if "past" not in record or not move.lr:
                continue
            own = move.base_lr or move.lr
            weight = self.update.weight(own, first if self.scope == "optimizer" else own)
            meta = self._product(grad, record["past"], weight)
            current = self._product(grad, direction, weight) if self.hint is not None and self.hint.of == "current" else None
            if self.scope == "optimizer":
                for key, value in (("meta", meta), ("current", current)):
                    if value is not None:
                        whole[key] = whole[key] + value.to(whole[key]) if key in whole else value
                if self.update.relative:
                    lengths.append(torch.stack(_norms([grad, record["past"] * weight])).to(whole["meta"]))
            else:
                self._advance(record, meta, current, move.momentum)
        if lengths:
            size, last = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
            whole["meta"] = (whole["meta"] / size / last).nan_to_num_(0.0).clamp_(-1, 1)  # no change where one of them is zero
        if whole:
            self._advance(self._shared, whole["meta"], whole.get("current"), any(move.momentum for move in moves))

    def _product(self, left: Tensor, right: Tensor, weight: float) -> Tensor:
        product = left * right if self.scope == "element" else (left * right).sum()
        return product if weight == 1 else product.mul_(weight)

    def _advance(self, holder: dict[str, Any], meta: Tensor, current: Tensor | None, momentum: bool) -> None:
        slots = self._slots(holder, meta)
        holder["count"] = holder.get("count", 0) + 1
        increase = meta if self.hint is None else self.hint.add_(meta, current, slots, momentum, holder["count"])
        self.update.advance_(slots, increase, holder["count"])

    def _slots(self, holder: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = holder.setdefault("slots", {})
        if not slots.keys() - {"hint"}:
            slots.update(self.update.start(like))
        return slots

    def _holder(self, record: dict[str, Any]) -> dict[str, Any]:
        return self._shared if self.scope == "optimizer" else record

    def _factors(self, records: list[dict[str, Any]]) -> list[Tensor | None]:
        holders = map(self._holder, records)
        return [self.update.factor(holder["slots"]) if holder.get("slots") else None for holder in holders]

    def _apply(self, moves: list[Move], records: list[dict[str, Any]], directions: list[Tensor], finite: bool) -> None:
        if not finite:  # 0 times a bad number would be bad too: what the base optimizer did stays
            return
        factors = self._factors(records)
        shorten = 1.0
        changes = [
            direction * -move.lr if factor is None else (direction * factor.to(direction)).mul_(-move.lr)
            for move, direction, factor in zip(moves, directions, factors, strict=True)
        ]
        if self.trust is not None:
            shorten = self._shorten([move.old for move in moves], changes)
            if shorten < 1:
                self.clipped += 1
                holders = {id(holder): holder for holder in map(self._holder, records)}
                for holder, direction in zip(holders.values(), directions, strict=False):
                    like = direction if self.scope == "element" else direction.new_ones(())
                    self.update.shorten_(self._slots(holder, like), math.sqrt(shorten))
        for move, change, factor in zip(moves, changes, factors, strict=True):
            # Where every factor is 1, the base optimizer's own result stays, to the last bit.
            if move.lr and (factor is not None or shorten < 1):
                move.param.copy_(_precise(move.old).add(change, alpha=shorten) if shorten else move.old)

    def _shorten(self, points: list[Tensor], changes: list[Tensor]) -> float:
        if self.trust is None:
            return 1.0
        count = sum(point.numel() for point in points)
        lengths = torch.stack([torch.stack(_norms(points)), torch.stack(_norms(changes))])
        size, step = torch.linalg.vector_norm(lengths, dim=1).tolist()
        longest = self.trust * max(size, _SMALLEST * math.sqrt(count))
        if math.isfinite(step):
            return min(1.0, longest / step) if step else 1.0
        # The factors have taken a finite direction out of range; only a step of nothing is safe.
        return 0.0

    def _skip(self) -> None:
        self.skipped += 1
        self.cosine = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a gradient or an update is not finite, so the step sizes were not changed in this step, and the optimizer's "
                "update is applied as it is. Clip the gradients or lower lr. Further such steps are only counted, in `skipped`.",
                UserWarning,
                stacklevel=2,
            )

    def _measure(self, grads: list[Tensor], records: list[dict[str, Any]]) -> None:
        pairs = [(grad, record["past"]) for grad, record in zip(grads, records, strict=True) if "past" in record]
        self.cosine = None
        if pairs:
            dot = float(torch.stack([(left * right).sum().double().cpu() for left, right in pairs]).sum())
            sizes = [math.hypot(*torch.stack(_norms(list(side))).tolist()) for side in zip(*pairs, strict=True)]
            self.cosine = dot / (sizes[0] * sizes[1]) if all(sizes) else None

    def factors(self) -> dict[Tensor, Tensor]:
        """The factors by parameter: of its shape, or a number for the other scopes. Left out while still 1."""
        found = {}
        for param, record in self._records.items():
            slots = self._holder(record).get("slots")
            if slots:
                found[param] = self.update.factor(slots)
        return found

    def metrics(self, names: dict[Tensor, str]) -> dict[str, float]:
        """Quantiles of the factors, the cosine of gradient and last direction, shares of shortened and skipped steps."""
        steps, clipped = self.steps - self._logged[0], self.clipped - self._logged[1]
        self._logged = (self.steps, self.clipped)
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
            few = factor.flatten()[:: max(1, factor.numel() // 10_000)].float()
            levels = torch.quantile(few, few.new_tensor([0.1, 0.5, 0.9])).tolist()
            found |= {f"factor/{name}/q{level}": value for level, value in zip((10, 50, 90), levels, strict=True)}
        return found

    def _record(self, param: Tensor) -> dict[str, Any]:
        if param not in self._records:
            saved: dict[str, Any] = {}
            if self._waiting:
                number = next(number for number, other in enumerate(self.params()) if other is param)
                saved = self._waiting.pop(number, {})
            self._records[param] = self._placed(saved, param)
        return self._records[param]

    def _placed(self, saved: dict[str, Any], param: Tensor) -> dict[str, Any]:
        shape = param.shape if self.scope == "element" else torch.Size()
        tensors = saved.get("slots", {}).values()
        if any(leaf.shape != shape for leaf in tensors) or ("past" in saved and saved["past"].shape != param.shape):
            raise ValueError(
                "the state of the step sizes belongs to parameters of other shapes; start without it, for instance from the "
                "weights alone, with load_from_checkpoint"
            )
        placed: dict[str, Any] = _moved(saved, param.device)
        return placed

    def _identity(self) -> dict[str, Any]:
        hint = None if self.hint is None else [self.hint.of, self.hint.corrected]
        target = None if self.bootstrap is None else self.bootstrap.options
        return {"update": type(self.update).__name__, "scope": self.scope, "hint": hint, "target": target}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`StepEngine`."""
        params = self.params()
        last = max([len(params) - 1, *self._waiting])
        tensors = []
        for number in range(last + 1):
            record = self._records.get(params[number]) if number < len(params) else None
            tensors.append(_moved(self._waiting.get(number, {}) if record is None else record, None))
        counts = {"steps": self.steps, "clipped": self.clipped, "skipped": self.skipped, "logged": list(self._logged)}
        shared = _moved(self._shared, None)
        return {"format": 1, **self._identity(), **counts, "base": dict(self._base), "shared": shared, "tensors": tensors}

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
        params = self.params()
        self._shared = _moved(state_dict["shared"], params[0].device)
        self._records, self._waiting = {}, {number: saved for number, saved in enumerate(state_dict["tensors"]) if saved}
        for param in params:
            if not is_lazy(param):
                self._record(param)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    # On one device, for there may be several.
    return [torch.linalg.vector_norm(_precise(tensor)).to(tensors[0].device) for tensor in tensors]


def _moved(value: Any, device: torch.device | None) -> Any:
    # A copy, in plain containers.
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True) if device is not None else value.detach().clone()
    return {key: _moved(leaf, device) for key, leaf in value.items()} if isinstance(value, dict) else value
