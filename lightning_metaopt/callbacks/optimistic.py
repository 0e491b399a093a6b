"""Optimistic meta-gradients: step sizes that are learned while an unchanged module trains."""

from __future__ import annotations

import os
from typing import Any, Literal, final

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_metaopt.callbacks.bootstrapped import Bootstrap, bind
from lightning_metaopt.callbacks.drawing import DrawnStepCallback
from lightning_metaopt.callbacks.families import has_momentum, normalizes
from lightning_metaopt.callbacks.fused import Compile
from lightning_metaopt.callbacks.step_sizes import Scope, StepSizes
from lightning_metaopt.metastep import Additive, Hint, Logarithmic, StepSizeUpdate
from lightning_metaopt.online.target import Mu
from lightning_metaopt.replay import Replay

__all__ = ["OptimisticMetaGrad"]


@final
class OptimisticMetaGrad(DrawnStepCallback):
    """Learns the step sizes of whatever optimizer a module has configured, by optimistic meta-gradients.

    The optimizer makes its update :math:`-\\mathrm{lr}_t P_t` (for SGD, :math:`P_t` is the gradient :math:`g_t`), and the
    parameters get :math:`-\\mathrm{lr}_t\\, w_t P_t`. The factors :math:`w`, 1 at first, follow the sum of the meta-gradient and of
    a guess of the next one, the hint :math:`h_t`:

    .. math:: D_t = g_t P_{t-1} + h_t - h_{t-1}, \\qquad h_t = \\kappa\\, g_t P_t .

    Args:
        mode: ``"optimistic"``, ``"standard"`` for meta-gradients without hint, or ``"bootstrapped"``, with the pull of a target in
            the place of :math:`g_t` (:class:`~lightning_metaopt.callbacks.bootstrapped.Bootstrap`), for which the module's
            ``training_step`` is repeated ``lookahead`` times in each step.
        scope: one factor for each ``"element"``, for each ``"tensor"``, or for the whole ``"optimizer"``.
        update: ``"log"``, the robust form: :math:`\\log w` is moved by Adam (so that no scale needs to be known), the hint is
            halved, and taken off again only for optimizers with momentum (see :class:`~lightning_metaopt.metastep.Hint`), rate
            and hint fade, and no step is longer than a part of the parameters' norm. ``"raw"``, the paper's
            rule :math:`\\mathrm{lr}\\,w \\leftarrow \\max(\\mathrm{lr}\\,w + \\beta D_t, 0)` (section 7.2), without a limit.
        meta_lr: rate :math:`\\beta` of the step sizes, by default 0.2 for ``"log"``: the usual change of a logarithm in one of
            the first steps. For ``"raw"`` it has to be given; it is in units of step size / squared gradient, and good values
            differ by orders of magnitude between problems.
        hint: instead of the usual one, ``Hint(of="previous")`` for that of Corollary 1, or other options of it.
        trust: longest step as a fraction of the norm of the parameters; ``None`` for no limit. By default, for ``"log"``,
            0.15; 0.1 for momentum, whose steps add up; 0.3 for Adam's family and others that divide by the size of the
            gradients: at tuned rates their first steps are as long (``recipes/optimistic/README.md``, Digits).
        betas: averaging constants of Adam for ``"log"``.
        limit: for ``"log"``, factors stay between ``1 / limit`` and ``limit``.
        fade: for ``"log"``, the rate falls like ``meta_lr / (1 + t / fade)**2`` with the number :math:`t` of meta-steps, so that
            long trainings settle, and the usual hint falls in the same way; ``None`` for neither.
        lookahead: for ``"bootstrapped"``, the steps :math:`K` between the parameters and their target.
        target_lr: for ``"bootstrapped"``, :math:`\\eta`, the last step to the target, along the gradient.
        mu: for ``"bootstrapped"``, ``"euclidean"`` to come closer to the target, ``"loss"`` to have the same loss there.
        corrected: for ``"bootstrapped"``, whether the steps ahead of the last target are taken off again. By default with ``"log"``
            and momentum, where factors would grow without end, and not otherwise.
        optimizer_index: which of several optimizers to follow; ``None`` for all, each with factors of its own.
        log: log quantiles of the factors (or the factors), ``cosine`` of gradient and last direction, ``clip_rate``.
        draw: file for a picture of what was logged, see :class:`~lightning_metaopt.callbacks.drawing.DrawnStepCallback`.
        compile: whether ``torch.compile`` makes the passes over memory: twice as fast in the element-wise form, after some 15
            seconds at the first start. ``"auto"`` compiles from 5 million parameters on. Without a C++ compiler training goes on in
            the slower form, after a warning.

    The printed formulas have :math:`\\varphi = + w \\nabla f`; the sign that descends is used here. A decay of the learning rate is
    not undone: the meta-gradient does not depend on it. Costs in the element-wise form: 4 numbers for each parameter for
    ``"log"``, 2 for ``"raw"``, 1 more for a hint that is corrected, and a copy of the parameters. With ``meta_lr=0`` and
    ``trust=None`` training is the same, bit by bit, as without the callback. Under DDP the gradients are averaged before the
    step, so meta-gradients are the same on every process.

    A step with gradients that are not finite leaves the factors as they were, and is counted. The first update of a lazy
    parameter stays as the optimizer made it.

    Raises:
        ValueError: for options out of range; when ``fit`` starts, for ``"bootstrapped"`` with manual optimisation. See
            :class:`~lightning_metaopt.callbacks.base.StepCallback` for others when ``fit`` starts.

    >>> from lightning.pytorch import Trainer
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    >>> callback = OptimisticMetaGrad()
    >>> trainer = Trainer(max_steps=3, limit_val_batches=0, accelerator="cpu", callbacks=[callback], **quiet)
    >>> trainer.fit(BoringModel())
    >>> callback.engines[0].steps
    3

    Reference: Optimistic Meta-Gradients (Flennerhag et al. 2023), sections 3, 5 and 7.2.
    """

    def __init__(
        self,
        mode: Literal["standard", "optimistic", "bootstrapped"] = "optimistic",
        scope: Scope = "element",
        update: Literal["log", "raw"] = "log",
        meta_lr: float | None = None,
        hint: Hint | None = None,
        trust: float | Literal["default"] | None = "default",
        betas: tuple[float, float] = (0.9, 0.999),
        limit: float = 1e4,
        fade: float | None = 80.0,
        lookahead: int = 1,
        target_lr: float = 1.0,
        mu: Mu = "euclidean",
        corrected: bool | None = None,
        optimizer_index: int | None = None,
        log: bool = True,
        draw: str | os.PathLike[str] | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(optimizer_index, log, draw)
        if mode not in ("standard", "optimistic", "bootstrapped"):
            raise ValueError(f"mode must be 'standard', 'optimistic' or 'bootstrapped', got {mode!r}")
        if scope not in ("element", "tensor", "optimizer"):
            raise ValueError(f"scope must be 'element', 'tensor' or 'optimizer', got {scope!r}")
        if update not in ("log", "raw"):
            raise ValueError(f"update must be 'log' or 'raw', got {update!r}")
        if mode != "optimistic" and hint is not None:
            raise ValueError(f"mode={mode!r} has no hint; use mode='optimistic'")
        if update == "raw" and meta_lr is None:
            raise ValueError("update='raw' needs a meta_lr, in units of step size / squared gradient; or use update='log'")
        self.scope: Scope = scope
        self.compile: Compile = compile
        self.update: StepSizeUpdate = (
            Logarithmic(0.2 if meta_lr is None else meta_lr, betas, limit, fade) if update == "log" else Additive(meta_lr or 0.0)
        )
        usual = Hint(scale=0.5, corrected=None, fade=fade) if update == "log" else Hint()
        self.hint = hint or usual if mode == "optimistic" else None
        self.bootstrapped = mode == "bootstrapped"
        corrected = False if corrected is None and update == "raw" else corrected
        self.target: dict[str, Any] = {"lookahead": lookahead, "target_lr": target_lr, "mu": mu, "corrected": corrected}
        Bootstrap(**self.target)  # checks them
        self.trust = None if trust == "default" and update == "raw" else trust
        if self.trust is not None and self.trust != "default" and not self.trust > 0:
            raise ValueError(f"trust must be positive or None, got {self.trust}")

    def engine(self, optimizer: Optimizer) -> StepSizes:
        bootstrap = Bootstrap(**self.target) if self.bootstrapped else None
        groups = getattr(optimizer, "param_groups", [])
        usual = 0.3 if any(map(normalizes, groups)) else 0.1 if any(map(has_momentum, groups)) else 0.15
        trust = usual if self.trust == "default" else self.trust
        return StepSizes(optimizer, self.update, self.scope, self.hint, trust, bootstrap, self.compile)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.bootstrapped and stage == "fit":
            Replay(pl_module)  # refuses what cannot be repeated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for ahead in self._aheads():
            bind(ahead, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for ahead in self._aheads():
            if ahead.replay is not None:
                ahead.record(batch, batch_idx, 1 / trainer.accumulate_grad_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step != self._global_step:
            for ahead in self._aheads():
                ahead.moments.clear()  # of a step that was left out

    def _aheads(self) -> list[Bootstrap]:
        return [engine.bootstrap for engine in self.engines] if self.bootstrapped else []

    def _detach(self) -> None:
        super()._detach()
        for ahead in self._aheads():
            ahead.release()

    @classmethod
    def attach(cls, optimizer: Optimizer, replay: Replay | None = None, **options: Any) -> StepSizes:
        """The same outside of Lightning: from now on, each ``optimizer.step()`` is followed by a meta-step.

        Args:
            optimizer: any optimizer but ``LBFGS``.
            replay: for ``mode="bootstrapped"``, the loss: ``Replay(module, step)``; before each step (each batch, where gradients
                are accumulated), hand over the batch by ``engine.bootstrap.record(batch)``.
            options: those of the constructor.

        Returns:
            The engine, with ``factors()``, ``state_dict()``, ``load_state_dict()`` and ``detach()``.

        >>> import torch
        >>> net = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> engine = OptimisticMetaGrad.attach(optimizer, scope="tensor")
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(2, 3)).square().mean().backward()
        ...     loss = optimizer.step()
        >>> bool(engine.factors()[net.weight] > 1)
        True
        """
        engine = cls(**options).engine(optimizer)
        if engine.bootstrap is not None:
            if replay is None:
                raise ValueError("mode='bootstrapped' computes further gradients: pass replay=Replay(module, step)")
            engine.bootstrap.bind(replay)
        engine.attach()
        return engine
