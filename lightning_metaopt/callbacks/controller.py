"""The engine of ``GPCMetaOpt``: a linear function of the last disturbances, added to every step of an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_metaopt.callbacks.adjoints import Adjoints, of_decay, of_path, of_rollout
from lightning_metaopt.callbacks.coefficients import Coefficients, MetaOptimizer
from lightning_metaopt.callbacks.flat import Flat
from lightning_metaopt.callbacks.hooks import Move, StepEngine
from lightning_metaopt.callbacks.ring import Ring
from lightning_metaopt.callbacks.rollout import Gradients, Past
from lightning_metaopt.recording import Moment
from lightning_metaopt.rules.control import GradientPerturbation
from lightning_metaopt.tree import escape

__all__ = ["Controller", "Mode", "Options"]

Mode = Literal["exact", "onpolicy", "gram"]


@dataclass(frozen=True)
class Options:
    """What a controller is: see :class:`~lightning_metaopt.GPCMetaOpt`."""

    history: int
    rollout: int
    mode: Mode
    kind: Literal["scalar", "diagonal"]
    common_batch: bool
    normalize: bool
    bf16: bool
    save_buffers: bool
    clip: float | None
    meta_optimizer: MetaOptimizer

    @property
    def identity(self) -> dict[str, Any]:
        """What a saved state has to agree with."""
        keys = ("history", "rollout", "mode", "kind", "common_batch", "normalize", "bf16")
        return {key: getattr(self, key) for key in keys}


@final
class Controller(StepEngine):
    """Adds :math:`-\\sum_h M^h d_{t+1-h}` to each step of an optimizer, and learns :math:`M` from rollouts.

    Args:
        optimizer: any optimizer that is not ``LBFGS``.
        options: see there.
        start: the first coefficients, shape ``(H,)`` or ``(H, n)``; ``None`` for zeros.

    Raises:
        ValueError: for an optimizer that maximises.
    """

    def __init__(self, optimizer: Optimizer, options: Options, start: Tensor | None = None) -> None:
        super().__init__(optimizer)
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                "an optimizer with maximize=True cannot be corrected by rollouts, which minimise; negate the loss instead"
            )
        self.options = options
        self.gradients = Gradients()
        self.plain = type(optimizer) is SGD and not any(group["momentum"] for group in optimizer.param_groups)
        self.learning = True
        self.unit: float | None = None  # the learning rate that disturbances are measured by
        self.coefficients: Coefficients | None = None
        self._start = start
        self._flat: Flat | None = None
        self._room: Tensor | None = None  # for the gradient
        self._ring: Ring | None = None
        self._past: list[Past] = []
        self._mixtures: Tensor | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def compares(self) -> bool:
        """Whether the parameters before a step are needed after it."""
        return not self.plain or (self.learning and (self.options.mode == "onpolicy" or self.options.common_batch))

    @property
    def replays(self) -> bool:
        """Whether meta-gradients need further gradients of the training step."""
        mode, length = self.options.mode, self.options.rollout
        return mode == "exact" or (mode == "onpolicy" and self.plain and length > 1)

    def adjust(self, moves: list[Move]) -> None:
        """One meta-step, and the correction."""
        moments = self.gradients.take()
        flat, ring, own = self._arrange(moves)
        by_param = {move.param: move for move in moves}
        taken = [by_param.get(param) for param in flat.params]
        grad = self._room = flat.join([None if move is None else move.grad for move in taken], self._room)
        unit, old, reached = self.unit or 1.0, None, None  # copies of all parameters are made where they are needed
        if self.compares:
            old = flat.join([self._old[param] for param in flat.params])
        if not self.plain or (self.learning and self.options.mode == "exact"):
            reached = flat.join(flat.params)
        if old is not None and reached is not None and not self.plain:
            disturbance = (old - reached) / unit
        else:
            factor = flat.spread([0.0 if move is None else move.lr / unit for move in taken])
            disturbance = grad if isinstance(factor, float) and factor == 1.0 else grad * factor
        square = disturbance.dot(disturbance)
        if not bool(torch.isfinite(square if disturbance is grad else square + grad.dot(grad))):
            own.skip()
            self.restart()
            return
        if self.learning:
            self._learn(flat, ring, own, grad, moments)
        ring.write(disturbance, square)
        ahead = self.learning and self.options.mode == "exact"
        self._mixtures = ring.mixtures(own.value.detach().to(flat.dtype), self.options.rollout if ahead else 1)
        if self.learning:
            self._remember(flat, moves, moments, old, reached)
        if own.steps or self._start is not None:  # else there is nothing to add, and the optimizer's own bits stay
            for param, part in zip(flat.params, flat.split(self._mixtures[0]), strict=True):
                param.sub_(part)

    def _arrange(self, moves: list[Move]) -> tuple[Flat, Ring, Coefficients]:
        # Made at the first step, and afresh when other parameters are trained.
        params = [param for param in self.params() if param in self._old]
        if self.unit is None:
            self.unit = next((move.base_lr for move in moves if move.base_lr), 1.0)
        if self._flat is None or self._ring is None or not self._flat.fits(params):
            self._flat, self._room = Flat(params), None
            like = torch.zeros(self._flat.size, dtype=self._flat.dtype, device=self._flat.device)
            rows = self.options.history + (self.options.rollout - 1 if self.learning else 0)
            self._ring, self._past, self._mixtures = Ring(rows, like, self.options.bf16), [], None
            shape = (self.options.history,) + ((self._flat.size,) if self.options.kind == "diagonal" else ())
            if self.coefficients is None or self.coefficients.value.shape != shape:
                start = like.new_zeros(shape) if self._start is None else self._start.to(like)
                if start.shape != shape:
                    raise ValueError(
                        f"the coefficients have shape {tuple(start.shape)}, but history and parameters need {shape}; give those "
                        "that were learned for this history and, for kind='diagonal', for these parameters"
                    )
                self.coefficients = Coefficients(start, self.options.meta_optimizer, self.options.clip)
        assert self.coefficients is not None
        if self._loaded is not None:
            self._place(self._loaded, self._flat, self._ring, self.coefficients)
            self._loaded = None
        return self._flat, self._ring, self.coefficients

    def restart(self) -> None:
        """Forget the past, as at the start of an episode; what was learned stays."""
        self._past, self._mixtures = [], None
        if self._ring is not None:
            self._ring = Ring(
                len(self._ring.values), torch.zeros_like(self._ring.values[0], dtype=self._ring.squares.dtype), self.options.bf16
            )
        if self.coefficients is not None:
            self.coefficients.begin()
        self.gradients.moments.clear()

    def freeze(self) -> None:
        """Learn no more: the correction stays, with what it has learned."""
        self.learning, self._past = False, []
        self.gradients.moments.clear()
        if self._ring is not None:
            self._ring = self._ring.resized(self.options.history)

    def _learn(self, flat: Flat, ring: Ring, own: Coefficients, grad: Tensor, moments: list[Moment]) -> None:
        length = self.options.rollout
        if ring.count < self.options.history + length - 1 or (self.replays and len(self._past) < length):
            return
        if self.replays and not moments:
            raise RuntimeError(
                "there is no batch to compute a rollout on; outside of a Trainer, call engine.gradients.record(batch) before "
                "each step"
            )
        found = self._adjoints(flat, grad, moments)
        meta = -ring.products(found.vectors, found.uses, own.value.detach())
        if self.options.normalize:
            meta = meta / (torch.linalg.vector_norm(found.vectors[0]) * ring.squares.mean().sqrt()).clamp(min=1e-30)
        own.step(meta)

    def _adjoints(self, flat: Flat, grad: Tensor, moments: list[Moment]) -> Adjoints:
        options, length = self.options, self.options.rollout
        if options.mode == "exact" and not (length == 1 and self.gradients.clip is None and not options.common_batch):
            assert self._mixtures is not None
            kept = {"plain": self.plain, "common": options.common_batch}
            return of_rollout(self.gradients, self._past, moments, self._mixtures, flat, **kept)
        if not self.replays:
            return of_decay(grad, flat.spread(self._decays(flat)), length)
        return of_path(self.gradients, grad, self._past, moments if options.common_batch else None, flat)

    def _decays(self, flat: Flat) -> list[float]:
        groups = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        return [groups[p]["lr"] * groups[p]["weight_decay"] if self.plain else 0.0 for p in flat.params]

    def _remember(self, flat: Flat, moves: list[Move], moments: list[Moment], old: Tensor | None, reached: Tensor | None) -> None:
        if not self.replays:
            return
        rates = {move.param: move.lr for move in moves}
        lr = [rates.get(param, 0.0) for param in flat.params]
        decay = [decay if param in rates else 0.0 for param, decay in zip(flat.params, self._decays(flat), strict=True)]
        vectors: dict[str, Tensor] = {}
        if old is not None and (self.options.mode == "onpolicy" or (self.options.common_batch and self.plain)):
            vectors["point"] = old
        elif reached is not None:
            vectors["reached"] = reached
            if old is not None and self.options.rollout > 1:
                vectors["update"] = reached - old
        self._past = [*self._past, Past(moments, lr, decay, vectors)][-self.options.rollout :]

    def rule(self) -> GradientPerturbation:
        """What was learned, as a rule: a deployable one where the base optimizer is plain SGD.

        Raises:
            RuntimeError: before the first step.
        """
        if self.coefficients is None or self._flat is None:
            raise RuntimeError("nothing has been learned yet: the optimizer has made no step")
        diagonal = self.options.kind == "diagonal"
        names = {param: name for name, param in self._named()} if diagonal else {}
        shapes = {names.get(p, f"param{i}"): tuple(p.shape) for i, p in enumerate(self._flat.params)} if diagonal else None
        decay = float(self.optimizer.param_groups[0].get("weight_decay", 0.0)) * (self.unit or 0.0) if self.plain else 0.0
        base = None if self.plain else type(self.optimizer).__name__
        kind = self.options.kind
        found = GradientPerturbation(self.options.history, self.unit or 0.0, decay, kind, shapes, bf16=self.options.bf16, base=base)
        value = self.coefficients.value.detach().cpu()
        with torch.no_grad():
            if isinstance(found.coefficients, nn.ParameterDict):
                for name, part in zip(shapes or {}, value.split(self._flat.sizes, 1), strict=True):
                    found.coefficients[escape(name)].copy_(part.reshape(self.options.history, *(shapes or {})[name]))
            else:
                found.coefficients.copy_(value)
        return found

    def _named(self) -> list[tuple[str, Tensor]]:
        return [] if self.gradients.replay is None else list(self.gradients.replay.module.named_parameters())

    def metrics(self, names: dict[Tensor, str]) -> dict[str, float]:
        """The profile :math:`\\eta e_1 + M` by lag, its sum and mean lag, how many meta-gradients were shortened or left out."""
        if self.coefficients is None:
            return {}
        rule = self.rule()
        found = {f"profile/{lag:03d}": float(value) for lag, value in enumerate(rule.profile(), start=1)}
        counts = {"skipped": float(self.coefficients.skipped), "clipped": float(self.coefficients.clipped)}
        return {**rule.describe(), **counts, **found}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`StepEngine`."""
        if self._loaded is not None:
            return self._loaded
        kept = None if self.coefficients is None else self.coefficients.state_dict()
        numbers = {"steps": self.steps, "unit": self.unit, "base": dict(self._base), "learning": self.learning}
        buffers = self._buffers() if self.options.save_buffers else None
        return {"format": 1, **self.options.identity, **numbers, "coefficients": kept, "buffers": buffers}

    def _buffers(self) -> dict[str, Any] | None:
        past = []
        for step in self._past:
            moments = [moment.state_dict() for moment in step.moments]
            if any(moment is None for moment in moments):
                return None
            past.append({"moments": moments, "lr": step.lr, "decay": step.decay, "vectors": step.vectors})
        return None if self._ring is None else {"ring": self._ring.state_dict(), "past": past}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :class:`StepEngine`. Without saved buffers the past fills anew, from the first step on."""
        own = self.options.identity
        if any(state_dict[key] != own[key] for key in own):
            saved = {key: state_dict[key] for key in own}
            raise ValueError(
                f"the coefficients were saved with other options, {saved} instead of {own}; give the same ones to continue"
            )
        self.steps, self.unit, self._base = state_dict["steps"], state_dict["unit"], dict(state_dict["base"])
        self._flat = self._ring = None
        self.learning = state_dict["learning"]
        self._loaded = state_dict if state_dict["coefficients"] is not None else None

    def _place(self, state: dict[str, Any], flat: Flat, ring: Ring, own: Coefficients) -> None:
        if state["coefficients"]["value"].shape != own.value.shape:
            raise ValueError("the coefficients were saved for other parameters; start without them, from the weights alone")
        own.load_state_dict(state["coefficients"])
        buffers = state["buffers"]
        if buffers is None:
            return
        if buffers["ring"]["values"].shape != ring.values.shape:
            raise ValueError("the buffers were saved for other parameters; start without them, from the weights alone")
        ring.load_state_dict(buffers["ring"])
        replay = self.gradients.replay
        for step in buffers["past"]:
            assert replay is not None
            moments = [Moment.from_state_dict(moment, replay.module) for moment in step["moments"]]
            vectors = {name: vector.to(flat.device) for name, vector in step["vectors"].items()}
            self._past.append(Past(moments, list(step["lr"]), list(step["decay"]), vectors))
        if self.learning and ring.count:
            self._mixtures = ring.mixtures(
                own.value.detach().to(flat.dtype), self.options.rollout if self.options.mode == "exact" else 1
            )
