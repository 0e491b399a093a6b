"""Longer and longer episodes in meta-training, as validation allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_metaopt.learner import MetaLearner

__all__ = ["Curriculum"]


@final
class Curriculum(Callback):
    """Meta-trains on episodes of ``stages[0]`` inner steps, then ``stages[1]``, and so on.

    Within a stage, held-out problems are run for the **next** stage's number of steps (the last stage's own), as often as the
    ``Trainer`` validates. After ``patience`` validations in a row without a new best, the best rule of the stage is restored and
    the next stage begins; a stage without any progress beyond what it began with ends meta-training, and so does the last
    one. (Chen et al.: *Training Stronger Baselines for Learning to Optimize*, NeurIPS 2020. Their code, and that of M-L2O,
    leaves a stage at the first validation that is no better, from the third of the stage on.)

    It replaces the learner's ``horizon`` and ``val_steps``. All of it is in checkpoints: a resumed run has the same bits.

    Args:
        stages: inner steps of an episode, increasing; multiples of the learner's unroll. Those of the published code by default.
        patience: validations without progress that end a stage.

    Raises:
        ValueError: for stages that do not increase or a patience below 1; when the fit begins, for stages that the learner's
            unrolls do not divide, or a learner without validation.
        TypeError: when the fit begins, for a module that is no :class:`~lightning_metaopt.MetaLearner`.

    >>> import lightning_metaopt as lmo
    >>> learner = lmo.MetaLearner(lmo.rules.GradientDescent(), lmo.tasks.LeastSquares(dim=3, rows=5), lmo.Unrolled(2),
    ...     tasks=4, horizon=2, steps_per_epoch=2)
    >>> longer = lmo.Curriculum([2, 4], patience=1)
    >>> rule = lmo.MetaLoop(max_epochs=9, callbacks=[longer], accelerator="cpu", enable_progress_bar=False).fit(learner)
    >>> learner.episodes.horizon in (2, 4)
    True
    """

    def __init__(self, stages: Sequence[int] = (100, 200, 500, 1000, 1500, 2000, 2500, 3000), patience: int = 3) -> None:
        if not stages or stages[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(stages)):
            raise ValueError(f"stages must be increasing numbers of inner steps, got {list(stages)}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.stages, self.patience = tuple(stages), patience
        self._stage = self._waited = self._seen = 0
        self._progress = False

    @property
    def stage(self) -> int:
        """Number of the present stage, from 0."""
        return self._stage

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learner = _learner(pl_module)
        window = learner.metagrad.inner_steps
        wrong = [stage for stage in self.stages if stage % window]
        if wrong:
            raise ValueError(f"stages must be multiples of the {window} inner steps of a meta-step; {wrong} are not")
        if not learner.val_tasks:
            raise ValueError("a curriculum needs validation to move on: give the learner val_tasks of at least 1")
        self._set(learner)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here, not where validation ends: a resumed run may have made up for a validation outside of Lightning's loop.
        learner, step = _learner(pl_module), trainer.global_step
        if step == self._seen or not learner.ledger.has("val_loss", step):
            return
        self._seen = step
        better = learner.best.step == step
        self._progress |= better
        self._waited = 0 if better else self._waited + 1
        if self._waited < self.patience:
            return
        if not self._progress or self._stage + 1 == len(self.stages):
            trainer.should_stop = True
            return
        self._stage, self._waited, self._progress = self._stage + 1, 0, False
        self._set(learner)
        learner.best.load_into_(learner.rule)
        learner.episodes.restart()
        self._measure_again(trainer, learner)

    def _set(self, learner: MetaLearner) -> None:
        learner.episodes.horizon = self.stages[self._stage]
        learner.held_out.steps = self.stages[min(self._stage + 1, len(self.stages) - 1)]

    def _measure_again(self, trainer: Trainer, learner: MetaLearner) -> None:
        # Losses after more steps are no measure for those after fewer: the restored rule sets the new one.
        def add_up(sums: Tensor) -> Tensor:
            found = trainer.strategy.reduce(sums.clone(), reduce_op="sum")
            assert isinstance(found, Tensor)
            return found

        with trainer.precision_plugin.val_step_context():
            value, _ = learner.held_out.evaluate(learner.rule, "validation", learner.device, add_up)
        learner.cost.gradient_evaluations += learner.held_out.steps * learner.val_tasks
        learner.best.value = math.inf
        learner.best.offer(learner.rule, value, trainer.global_step)
        learner.ledger.write(trainer.global_step, {"curriculum/steps": self.stages[self._stage], "curriculum/val_loss": value})

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "waited": self._waited, "seen": self._seen, "progress": self._progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage, self._waited, self._seen = state_dict["stage"], state_dict["waited"], state_dict["seen"]
        self._progress = state_dict["progress"]


def _learner(module: LightningModule) -> MetaLearner:
    if not isinstance(module, MetaLearner):
        raise TypeError(f"Curriculum lengthens the episodes of a MetaLearner, got {type(module).__name__}")
    return module
