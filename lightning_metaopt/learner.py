"""Meta-training as a ``LightningModule``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_metaopt import checks
from lightning_metaopt.adaptation import Adaptation, adapt
from lightning_metaopt.guard import Best, too_large
from lightning_metaopt.held_out import HeldOut
from lightning_metaopt.ledger import Cost, Ledger
from lightning_metaopt.metagrads import Adapted, MetaGradient, Unrolled, surrogate_loss
from lightning_metaopt.objectives import Objective, resolve_objective
from lightning_metaopt.processes import gather, reduce
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.task_loader import RunningEpisodes, TaskLoader

__all__ = ["MetaLearner"]

FORMAT = 1
KEY = "meta_learner"
ADAM = partial(torch.optim.Adam, lr=1e-2)


class MetaLearner(LightningModule):
    """Meta-trains ``rule`` on problems of ``family``: a ``LightningModule`` for any ``Trainer``.

    A meta-step takes ``tasks`` problems, lets ``metagrad`` unroll them and estimate the gradient of ``objective`` with
    respect to the rule's parameters, and hands that to Lightning as a surrogate loss. Backward, clipping, accumulation,
    averaging over processes, precision and checkpoints are Lightning's.

    Args:
        rule: the rule to train, in place.
        family: where problems come from.
        metagrad: how to differentiate; by default ``Unrolled(steps=1)``.
        objective: what should be small, an object or its short name.
        optimizer: makes the meta-optimizer from the meta-parameters; Adam with learning rate 0.01 by default.
        scheduler: makes a learning-rate schedule for it, advanced at every meta-step.
        tasks: problems in a meta-step, over all processes: the result does not depend on their number.
        pool: size of a fixed set of training problems, visited in minibatches of ``tasks`` (``pool=tasks`` and
            ``horizon=None`` is Algorithm 1 of DCO). ``None`` draws fresh problems for every episode.
        horizon: inner steps after which an episode starts afresh. A horizon longer than one unroll carries iterates and
            the rule's state over meta-steps (truncated meta-gradients). ``None`` starts afresh at every meta-step.
        steps_per_epoch: meta-steps in an epoch; by default one pass over the pool, or 100.
        val_tasks: held-out problems, drawn once from their own stream of seeds; 0 for no validation.
        val_steps: inner steps in validation; by default the horizon, or the length of one unroll.
        seed: of all problems and starting points.
        guard_factor: a validation loss that is not finite or this many times the best, or a meta-gradient that is not
            finite, restores the best rule, halves the meta learning rate, forgets the moments and restarts the episodes.
            ``None`` guards against non-finite values only.

    Attributes:
        best: the best meta-parameters by validation loss (without validation: those of ``steps_per_epoch`` meta-steps ago at most).
        held_out: the validation and test problems.

    Raises:
        ValueError: for sizes that do not divide each other; the message names both.

    >>> import lightning_metaopt as lmo
    >>> learner = lmo.MetaLearner(lmo.rules.GradientDescent(), lmo.tasks.LeastSquares(dim=3, rows=5), tasks=4, pool=8)
    >>> len(learner.train_dataloader())
    2
    """

    def __init__(
        self,
        rule: Rule,
        family: TaskFamily,
        metagrad: MetaGradient | None = None,
        objective: Objective | str = "final",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = ADAM,
        *,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        tasks: int = 16,
        pool: int | None = None,
        horizon: int | None = None,
        steps_per_epoch: int | None = None,
        val_tasks: int = 32,
        val_steps: int | None = None,
        seed: int = 0,
        guard_factor: float | None = 100.0,
    ) -> None:
        super().__init__()
        metagrad = metagrad or Unrolled(steps=1)
        checks.check_sizes(
            tasks=tasks,
            pool=pool,
            horizon=horizon,
            inner_steps=metagrad.inner_steps,
            steps_per_epoch=steps_per_epoch,
            val_tasks=val_tasks,
            guard_factor=guard_factor,
        )
        if next(rule.parameters(), None) is None:
            raise ValueError(f"{type(rule).__name__} has no parameters: there is nothing to meta-learn")
        self.rule = rule
        self.family = family
        self.metagrad = metagrad
        self.objective = resolve_objective(objective)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.tasks, self.val_tasks, self.guard_factor = tasks, val_tasks, guard_factor
        self._drawn_from = {"tasks": tasks, "pool": pool, "seed": seed}
        lanes = None if pool is None else pool // tasks
        self.steps_per_epoch = steps_per_epoch or lanes or 100
        self.episodes = RunningEpisodes(family, tasks, lanes, horizon, seed)
        self.held_out = HeldOut(family, seed, val_tasks, val_steps or horizon or metagrad.inner_steps)
        self.ledger = Ledger()
        self.best = Best()
        self._latest: dict[str, Tensor] = {}
        self._validation_due = False

    @property
    def cost(self) -> Cost:
        """What meta-training has cost so far."""
        return self.ledger.cost

    @property
    def history(self) -> list[dict[str, float]]:
        """One row of floats for every logged meta-step and validation: step, meta_loss, grad_norm, val_loss, rule/..., cost/..."""
        return self.ledger.history

    @property
    def val_curve(self) -> list[float]:
        """Mean training loss of the held-out problems at inner steps 0 to ``val_steps``, at the latest validation."""
        return self.ledger.val_curve

    def adapt(self, family: TaskFamily, steps: int = 5, **options: Any) -> Adaptation:
        """:func:`~lightning_metaopt.adaptation.adapt` its rule to ``family``, with its meta-gradient (the inner one of an
        :class:`Adapted`) and its objective unless ``options`` name others. The learner's own rule stays as it is.

        >>> import lightning_metaopt as lmo
        >>> rule, family = lmo.rules.GradientDescent(lr=1e-3), lmo.tasks.LeastSquares(dim=3, rows=5)
        >>> learner = lmo.MetaLearner(rule, family, lmo.Unrolled(5))
        >>> found = learner.adapt(lmo.tasks.LeastSquares(dim=3, rows=5, mean=True), restart_every=2, lr=0.3)
        >>> found.kept, found.after < found.before, found.rule.describe()["lr"] > rule.describe()["lr"]
        (True, True, True)
        """
        metagrad = self.metagrad.inner if isinstance(self.metagrad, Adapted) else self.metagrad
        return adapt(self.rule, family, steps, **{"metagrad": metagrad, "objective": self.objective} | options)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.rule.parameters())
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates a meta-step several times, but episodes move on each time; use a first-order optimizer"
            )
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step", "monitor": "meta/loss"},
        }

    def train_dataloader(self) -> TaskLoader:
        return TaskLoader(self.episodes.lanes or 1, self.steps_per_epoch)

    def val_dataloader(self) -> list[str]:
        return ["validation"] if self.val_tasks else []

    def test_dataloader(self) -> list[str]:
        return ["test"] if self.val_tasks else []

    def setup(self, stage: str) -> None:
        checks.refuse_sharding(self.trainer.strategy)
        checks.refuse_half_precision(self.trainer.precision)
        checks.check_processes(self.tasks, self.val_tasks, self.trainer.world_size)
        self.held_out.place(self.trainer.global_rank, self.trainer.world_size)

    def on_train_start(self) -> None:
        self.episodes.place(self.device, self.trainer.global_rank, self.trainer.world_size)
        self.ledger.start_clock()
        first = not self.best.phi
        if self.val_tasks and (first or self._validation_due):
            with self.trainer.precision_plugin.val_step_context():
                self._validate()
        elif first:
            self.best.offer(self.rule, math.inf, 0)
        self._validation_due = False

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        estimate = self.metagrad(self.rule, self.episodes.current(self.rule, batch), self.objective)
        self.episodes.advance(batch, estimate.episode)
        self.cost.gradient_evaluations += self.metagrad.gradient_evaluations * self.tasks
        loss = surrogate_loss(self.rule, estimate)
        self._latest["meta_loss"] = loss.detach()
        self.log("meta/loss", loss.detach(), prog_bar=True, batch_size=self.tasks, sync_dist=self.trainer.world_size > 1)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Gradients are averaged over processes by now, so that all of them decide alike.
        norm = get_total_norm([p.grad for p in self.rule.parameters() if p.grad is not None])
        self._latest["grad_norm"] = norm
        self.log("meta/grad_norm", norm, batch_size=self.tasks)
        if bool(torch.isfinite(norm)):
            self.best.progressed()
        else:
            self._restore("the meta-gradient is not finite")
            optimizer.zero_grad(set_to_none=True)  # the step that follows does nothing

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # All that belongs to a meta-step happens here, before callbacks may save a checkpoint of it.
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.rule.project_()
        self.ledger.tick()
        trainer: Any = self.trainer  # sets log_every_n_steps where type checkers do not see it
        step = self.global_step + 1  # Lightning counts when this returns
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            for name, value in self._record(step).items():
                self.log(name, value, batch_size=self.tasks)
        if not self.val_tasks and step % self.steps_per_epoch == 0:
            self.best.offer(self.rule, math.inf, step)

    def on_train_end(self) -> None:
        # The last meta-steps may have come after the last validation.
        if self.val_tasks and not self.ledger.has("val_loss", self.global_step):
            with self.trainer.precision_plugin.val_step_context():
                self._validate()
        self.ledger.tick()

    def validation_step(self, batch: str, batch_idx: int) -> None:
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        value = self._validate() if training else self._evaluate(batch)
        self.log("val/loss", value, prog_bar=True, batch_size=self.val_tasks, sync_dist=self.trainer.world_size > 1)

    def test_step(self, batch: str, batch_idx: int) -> None:
        self.log("test/loss", self._evaluate(batch), batch_size=self.val_tasks, sync_dist=self.trainer.world_size > 1)

    def on_validation_end(self) -> None:
        self.ledger.tick()

    def get_extra_state(self) -> dict[str, Any]:
        return {"best": self.best.state_dict(), "ledger": self.ledger.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.ledger.load_state_dict(state["ledger"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Called in every process, so that all of them can hand in their part of the episodes.
        checkpoint[KEY] = {
            "format": FORMAT,
            "drawn": self._drawn_from,
            "episodes": self.episodes.state_dict(partial(gather, self.trainer)),
            "metagrad": self.metagrad.state_dict(),
            "validation_due": checks.validation_is_due(self.trainer) and not self.ledger.has("val_loss", self.global_step),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checks.check_checkpoint(checkpoint.get(KEY), FORMAT, self._drawn_from)
        self.episodes.load_state_dict(state["episodes"])
        self.metagrad.load_state_dict(state["metagrad"])
        self._validation_due = state["validation_due"]

    def _evaluate(self, stream: str) -> float:
        value, self.ledger.val_curve = self.held_out.evaluate(
            self.rule, stream, self.device, lambda sums: reduce(self.trainer, sums, "sum")
        )
        self.cost.gradient_evaluations += self.held_out.steps * self.val_tasks
        return value

    def _validate(self) -> float:
        value = self._evaluate("validation")
        self._record(self.global_step, val_loss=value)
        if too_large(value, self.best.value, self.guard_factor or math.inf) and self.best.phi:
            self._restore(f"the validation loss is {value:.3g} (best: {self.best.value:.3g})")
        else:
            self.best.offer(self.rule, value, self.global_step)
        return value

    def _record(self, step: int, **extra: float) -> dict[str, float]:
        row = {f"rule/{name}": value for name, value in self.rule.describe().items()}
        row["cost/gradient_evaluations"] = float(self.cost.gradient_evaluations)
        row["cost/seconds"] = self.cost.seconds
        row["guard/restores"] = float(self.best.restores)
        if self._latest:
            extra["meta_loss"] = float(reduce(self.trainer, self._latest["meta_loss"], "mean"))
            extra["grad_norm"] = float(self._latest.get("grad_norm", math.nan))
        self.ledger.write(step, {**extra, **row})
        return row

    def _restore(self, reason: str) -> None:
        schedulers = self.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [] if schedulers is None else [schedulers]
        self.best.restore_(self.rule, self.trainer.optimizers, schedulers, reason)
        self.episodes.restart()
