"""Gradient perturbation control on the steps of any optimizer, learned while an unchanged module trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_metaopt.callbacks.coefficients import MetaOptimizer, numbers_of, rule_of
from lightning_metaopt.callbacks.controller import Controller, Mode, Options
from lightning_metaopt.callbacks.drawing import DrawnStepCallback, History
from lightning_metaopt.callbacks.episodes import Beginning, FixedBatch, Init, reset_parameters
from lightning_metaopt.callbacks.processes import gathered, of_this_process
from lightning_metaopt.callbacks.profile import draw_profile
from lightning_metaopt.callbacks.rollout import bind
from lightning_metaopt.replay import Replay
from lightning_metaopt.rules.control import GradientPerturbation
from lightning_metaopt.storage import save_rule

__all__ = ["GPCMetaOpt"]


@final
class GPCMetaOpt(DrawnStepCallback):
    """Learns how much the last ``history`` gradients should count in the steps of whatever optimizer a module has configured.

    The optimizer makes its update, and the callback adds to it (Algorithm 7)

    .. math:: -\\sum_{h=1}^H M^h d_{t+1-h} .

    For plain SGD, :math:`d_t` is the gradient :math:`g_t`, and the whole is the paper's algorithm, :math:`\\delta` being the
    product of learning rate and weight decay. For other optimizers :math:`d_t` is the direction of their update, in units of the
    learning rate that their schedule starts from. In each step, :math:`M` follows the meta-gradient of the present loss after a
    rollout that starts ``rollout`` steps ago (:class:`~lightning_metaopt.Counterfactual`).

    Args:
        history: :math:`H`; so many vectors of the size of all parameters are kept.
        rollout: :math:`L`, the steps of a rollout. Meta-steps begin after ``history + rollout - 1`` steps.
        mode: ``"exact"`` for the meta-gradient of Algorithm 4: the training step is repeated ``rollout`` times, all but once with a
            product with its Hessian. ``"onpolicy"`` takes iterates that were met in the place of those of the rollout:
            ``rollout - 1`` repetitions. ``"gram"`` takes inner products of gradients alone, and repeats nothing.
        kind: ``"scalar"`` for one number for each lag, ``"diagonal"`` for one for each lag and coordinate.
        meta_lr: learning rate of :math:`M`, in units of the optimizer's learning rate.
        meta_optimizer: makes the optimizer of :math:`M`; by default Adam with ``meta_lr``.
        clip: see :class:`~lightning_metaopt.callbacks.coefficients.Coefficients`; ``None`` for the paper's algorithm to the letter.
        normalize: divide meta-gradients by the norms of gradient and disturbances, so that all phases of training count alike.
        common_batch: use the present batch in the whole rollout, for learning on minibatches.
        fixed_batch: while learning, train on the first batch again and again (deterministic optimisation, in which learning is
            stable); afterwards on what the loader brings.
        episode_steps: steps after which training begins anew, with the same :math:`M`: weights, buffers, optimizer and schedulers
            go back to their start. ``None`` for one episode.
        freeze_after: steps after which :math:`M` is held fixed (with ``episode_steps``, training begins anew once more then, and
            goes on to the end). 0 to use given coefficients only; ``None`` for never.
        init: what makes new weights for an episode, a function of the module, or ``"reset"`` for ``reset_parameters()`` of every
            layer; by default the weights at the start of ``fit``.
        coefficients: where :math:`M` starts: a rule or rule file (see :meth:`save`), or numbers; by default zero.
        bf16: keep disturbances in bfloat16.
        save_buffers: put the past into checkpoints, so that a run that is resumed goes on exactly: ``history + 2 * rollout``
            vectors and the last batches. Otherwise the past fills anew; what was learned is kept either way.
        optimizer_index: which of several optimizers to follow; ``None`` for all, each with coefficients of its own.
        log: log the profile :math:`\\eta e_1 + M`, its sum, and counts.
        draw: file for a picture of it, see :class:`~lightning_metaopt.callbacks.drawing.DrawnStepCallback`.

    Rollouts repeat all batches of an accumulated step, with clipping, in the precision of training. Processes of DDP average the
    gradients of rollouts as they do their own, and learn the same; in a checkpoint are the batches of all of them. (Clipping
    that a module does itself is a constant factor when rollouts are differentiated.) A step whose gradients or
    meta-gradients are not finite leaves :math:`M` as it was, and is counted.

    Raises:
        ValueError: for options out of range; when ``fit`` starts, for manual optimisation unless ``mode="gram"``; for a checkpoint
            with fixed batches of another number of processes. See :class:`~lightning_metaopt.callbacks.base.StepCallback` for
            others when ``fit`` starts.

    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    >>> callback = GPCMetaOpt(history=2, meta_lr=1e-3)
    >>> Trainer(max_steps=6, limit_val_batches=0, accelerator="cpu", callbacks=[callback], **quiet).fit(BoringModel())
    >>> callback.engines[0].coefficients.steps, callback.rule()
    (3, GradientPerturbation())

    Reference: Nonconvex Meta-optimization for Deep Learning (Chen, Dogariu, Lu, Hazan), Algorithm 7.
    """

    def __init__(
        self,
        history: int = 32,
        rollout: int = 2,
        mode: Mode = "exact",
        kind: Literal["scalar", "diagonal"] = "scalar",
        meta_lr: float = 1e-4,
        *,
        meta_optimizer: MetaOptimizer | None = None,
        clip: float | None = 10.0,
        normalize: bool = False,
        common_batch: bool = False,
        fixed_batch: bool = False,
        episode_steps: int | None = None,
        freeze_after: int | None = None,
        init: Init | Literal["reset"] | None = None,
        coefficients: GradientPerturbation | str | os.PathLike[str] | Sequence[float] | Tensor | None = None,
        bf16: bool = False,
        save_buffers: bool = True,
        optimizer_index: int | None = None,
        log: bool = True,
        draw: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(optimizer_index, log, draw)
        if history < 1 or rollout < 1:
            raise ValueError(f"history and rollout must be at least 1, got history={history}, rollout={rollout}")
        if mode not in ("exact", "onpolicy", "gram"):
            raise ValueError(f"mode must be 'exact', 'onpolicy' or 'gram', got {mode!r}")
        if kind not in ("scalar", "diagonal"):
            raise ValueError(
                f"kind must be 'scalar' or 'diagonal', got {kind!r}; full matrices are a matter of small problems: "
                "meta-train rules.GradientPerturbation(kind='full') with a MetaLearner"
            )
        if not meta_lr >= 0 or not (clip is None or clip > 0):
            raise ValueError(f"meta_lr must not be negative and clip positive or None, got meta_lr={meta_lr}, clip={clip}")
        if common_batch and mode == "gram":
            raise ValueError("common_batch is a matter of repeated training steps, which mode='gram' has none of; leave it out")
        if episode_steps is not None and episode_steps < history + rollout:
            raise ValueError(
                f"an episode of {episode_steps} steps ends before the first meta-step, which takes history + rollout = "
                f"{history + rollout} of them; give longer episodes or a shorter history"
            )
        if fixed_batch and freeze_after is None:
            raise ValueError("fixed_batch=True trains on one batch while it learns; say by freeze_after when that ends")
        adam: MetaOptimizer = partial(torch.optim.Adam, lr=meta_lr)
        rates = meta_optimizer or adam
        self.options = Options(history, rollout, mode, kind, common_batch, normalize, bf16, save_buffers, clip, rates)
        self.episode_steps, self.freeze_after = episode_steps, freeze_after
        self.beginning = Beginning(reset_parameters if init == "reset" else init)
        self.fixed = FixedBatch() if fixed_batch else None
        self.start = coefficients
        self._episode = 0  # steps since it began
        self._micro = 0  # batches since the last step

    def engine(self, optimizer: Optimizer) -> Controller:
        start = numbers_of(self.start)
        made = Controller(optimizer, self.options, start)
        found = rule_of(self.start)
        base = None if made.plain else type(optimizer).__name__
        if found is not None and found.base != base:
            raise ValueError(
                f"these coefficients were learned for the directions of {found.base or 'plain SGD'}, the module configured "
                f"{type(optimizer).__name__}; configure the same optimizer, or learn them anew"
            )
        if self.freeze_after == 0:
            made.freeze()
        return made

    @property
    def episode(self) -> int:
        """Steps since the episode began."""
        return self._episode

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._episode = self._micro = 0
        if not pl_module.automatic_optimization and (self.options.mode != "gram" or self.fixed or self.episode_steps):
            raise ValueError(
                f"{type(pl_module).__name__} has automatic_optimization=False: its training step takes optimizer steps itself, so "
                "it cannot be repeated in rollouts. Use automatic optimisation, or mode='gram' without episodes and fixed batch"
            )
        if self.options.mode != "gram":
            Replay(pl_module)  # refuses what cannot be repeated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed = self._loaded is not None
        super().on_train_start(trainer, pl_module)
        if not resumed and self.episode_steps is not None:
            self.beginning.mark(trainer, pl_module)
        learning = any(engine.learning for engine in self.engines)
        if self.fixed is not None and learning:
            self.fixed.hold(pl_module)
        for engine in self.engines:
            if pl_module.automatic_optimization:
                bind(engine.gradients, trainer, pl_module, None if self.fixed is None else self.fixed.step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._micro == 0:
            self._turn(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        count = trainer.accumulate_grad_batches
        learning = [engine for engine in self.engines if engine.learning]
        if self.fixed is not None and learning:
            batch = self.fixed.choose(batch, self._micro, count)
        for engine in learning:
            if engine.replays and engine.gradients.replay is not None:
                engine.gradients.record(batch, batch_idx, 1 / count)
        self._micro += 1

    def _turn(self, trainer: Trainer, module: LightningModule) -> None:
        # Where phases end: learning, and episodes.
        over = self.freeze_after is not None and self._batches >= self.freeze_after
        freezes = over and any(engine.learning for engine in self.engines)
        if freezes:
            for engine in self.engines:
                engine.freeze()
            if self.fixed is not None:
                self.fixed.release()
        if self.episode_steps is not None and (freezes if over else self._episode >= self.episode_steps):
            self.beginning.back(trainer, module)
            for engine in self.engines:
                engine.restart()
            self._episode = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        before = self._batches
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._batches != before:
            self._episode += 1
            self._micro = 0
            for engine in self.engines:
                engine.gradients.moments.clear()  # of a step that was left out

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._trained:
            state["episode"] = self._episode
            state["beginning"] = self.beginning.state_dict()
            state["fixed"] = None if self.fixed is None else self.fixed.state_dict()
            state["processes"] = gathered(state)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        state = of_this_process(state)
        super()._restore(state)
        self._episode = state["episode"]
        if state["beginning"] is not None:
            self.beginning.load_state_dict(state["beginning"])
        if self.fixed is not None:
            self.fixed.load_state_dict(state["fixed"], self.engines[0].params()[0].device)

    def _detach(self) -> None:
        super()._detach()
        if self.fixed is not None:
            self.fixed.release()
        for engine in self.engines:
            engine.gradients.release()

    def picture(self, histories: list[History], path: Path) -> None:
        draw_profile(histories, path, type(self).__name__)

    def rule(self, number: int = 0) -> GradientPerturbation:
        """What was learned on the steps of an optimizer, as a rule: deployable where that is plain SGD."""
        found: GradientPerturbation = self.engines[number].rule()
        return found

    def save(self, path: str | os.PathLike[str], number: int = 0) -> None:
        """Write :meth:`rule` to a file, for ``coefficients=`` or :class:`~lightning_metaopt.LearnedOptimizer`."""
        engine = self.engines[number]
        facts = {"optimizer": type(engine.optimizer).__name__, "steps": engine.steps, **self.options.identity}
        save_rule(self.rule(number), path, facts)

    @classmethod
    def attach(cls, optimizer: Optimizer, replay: Replay | None = None, **options: Any) -> Controller:
        """The same outside of Lightning: from now on, each ``optimizer.step()`` is followed by a meta-step and the correction.

        Args:
            optimizer: any optimizer but ``LBFGS``.
            replay: unless ``mode="gram"``, the loss: ``Replay(module, step)``; before each step (each batch, where gradients are
                accumulated), hand over the batch by ``engine.gradients.record(batch)``.
            options: those of the constructor but episodes.

        >>> net = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> engine = GPCMetaOpt.attach(optimizer, history=2, mode="gram")
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(2, 3)).square().mean().backward()
        ...     loss = optimizer.step()
        >>> (engine.coefficients.value > 0).tolist()
        [True, True]
        """
        engine = cls(**options).engine(optimizer)
        if replay is not None:
            engine.gradients.bind(replay)
        elif engine.replays and engine.learning:
            raise ValueError("rollouts repeat training steps: pass replay=Replay(module, step), or use mode='gram'")
        engine.attach()
        return engine
