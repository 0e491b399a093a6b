"""Meta-training as a ``LightningModule``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.guard import Best, too_large
from lightning_metaopt.metagrads import MetaGradient, Unrolled, surrogate_loss
from lightning_metaopt.objectives import Objective, resolve_objective
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.task_loader import RunningEpisodes, TaskLoader, draw, shard

__all__ = ["Cost", "MetaLearner"]

FORMAT = 1
KEY = "meta_learner"
ADAM = partial(torch.optim.Adam, lr=1e-2)


@dataclass
class Cost:
    """What meta-training has cost so far, validation included.

    Attributes:
        gradient_evaluations: evaluations of an inner gradient, summed over all problems and processes.
        seconds: wall-clock time of training.
    """

    gradient_evaluations: int = 0
    seconds: float = 0.0


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
        cost: a :class:`Cost`.
        history: one dictionary of floats for every logged meta-step and validation, for plots.
        best: the best meta-parameters by validation loss (without validation: of the last finished epoch).
        val_curve: mean training loss of the held-out problems at inner steps 0 to ``val_steps``.

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
        _check_sizes(
            tasks=tasks,
            pool=pool,
            horizon=horizon,
            unroll=metagrad.inner_steps,
            epoch=steps_per_epoch,
            val_tasks=val_tasks,
            factor=guard_factor,
        )
        if next(rule.parameters(), None) is None:
            raise ValueError(f"{type(rule).__name__} has no parameters: there is nothing to meta-learn")
        self.rule = rule
        self.family = family
        self.metagrad = metagrad
        self.objective = resolve_objective(objective)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.tasks, self.pool, self.val_tasks, self.seed, self.guard_factor = tasks, pool, val_tasks, seed, guard_factor
        self.val_steps = val_steps or horizon or metagrad.inner_steps
        lanes = None if pool is None else pool // tasks
        self.steps_per_epoch = steps_per_epoch or lanes or 100
        self.episodes = RunningEpisodes(family, tasks, lanes, horizon, seed)
        self.cost = Cost()
        self.history: list[dict[str, float]] = []
        self.best = Best()
        self.val_curve: list[float] = []
        self._held_out: dict[str, Episode] = {}
        self._latest: dict[str, Tensor] = {}
        self._clock: float | None = None

    # -- what Lightning asks for -----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.rule.parameters())
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates a meta-step several times, but episodes move on each time; use a first-order optimizer"
            )
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def train_dataloader(self) -> TaskLoader:
        return TaskLoader(self.episodes.lanes or 1, self.steps_per_epoch)

    def val_dataloader(self) -> list[str]:
        return ["validation"] if self.val_tasks else []

    def test_dataloader(self) -> list[str]:
        return ["test"] if self.val_tasks else []

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if strategy.restore_checkpoint_after_setup or strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(strategy).__name__} shards the rule over processes, but every process unrolls the whole rule; "
                "use strategy='ddp' (a rule is small next to the problems, which are what is split)"
            )
        refuse_half_precision(self.trainer.precision)
        if self.val_tasks and self.val_tasks < self.trainer.world_size:
            raise ValueError(f"val_tasks={self.val_tasks} leaves some of {self.trainer.world_size} processes without problems")
        self.episodes.place(self.device, self.trainer.global_rank, self.trainer.world_size)

    def on_train_start(self) -> None:
        self.episodes.place(self.device, self.trainer.global_rank, self.trainer.world_size)
        self._held_out.clear()
        self._clock = time.perf_counter()
        if not self.best.phi:
            if self.val_tasks:
                with self.trainer.precision_plugin.val_step_context():
                    self._record({"val_loss": self._evaluate("validation")})
            self.best.offer(self.rule, self.history[-1]["val_loss"] if self.val_tasks else math.inf, 0)

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
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.rule.project_()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tick()
        trainer: Any = self.trainer  # sets this attribute where type checkers do not see it
        every = trainer.log_every_n_steps
        if every and self.global_step and self.global_step % every == 0:
            row = self._record({})
            for name, value in row.items():
                if name.startswith(("rule/", "cost/", "guard/")):
                    self.log(name, value, batch_size=self.tasks)

    def on_train_epoch_end(self) -> None:
        if not self.val_tasks and math.isfinite(float(self._latest["grad_norm"])):
            self.best.offer(self.rule, math.inf, self.global_step)

    def validation_step(self, batch: str, batch_idx: int) -> None:
        value = self._evaluate(batch)
        self.log("val/loss", value, prog_bar=True, batch_size=self.val_tasks)
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        self._record({"val_loss": value})
        if too_large(value, self.best.value, self.guard_factor or math.inf):
            self._restore(f"the validation loss is {value:.3g} (best: {self.best.value:.3g})")
        else:
            self.best.offer(self.rule, value, self.global_step)

    def test_step(self, batch: str, batch_idx: int) -> None:
        self.log("test/loss", self._evaluate(batch), batch_size=self.val_tasks)

    def on_validation_end(self) -> None:
        self._tick()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "best": self.best.state_dict(),
            "cost": asdict(self.cost),
            "history": list(self.history),
            "val_curve": self.val_curve,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.cost = Cost(**state["cost"])
        self.history, self.val_curve = list(state["history"]), list(state["val_curve"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Called in every process, so that all of them can hand in their part of the episodes.
        checkpoint[KEY] = {
            "format": FORMAT,
            "drawn": self._drawn_from(),
            "episodes": self.episodes.state_dict(self._gather),
            "metagrad": self.metagrad.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(KEY)
        if state is None or state["format"] != FORMAT:
            raise ValueError("this is no checkpoint of a MetaLearner, or one of a newer version of lightning_metaopt")
        for name, value in self._drawn_from().items():
            if state["drawn"][name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name}={state['drawn'][name]}, this MetaLearner has {name}={value}: its "
                    "running episodes would meet other problems. Give the same value, or start anew from the saved rule"
                )
        self.episodes.load_state_dict(state["episodes"])
        self.metagrad.load_state_dict(state["metagrad"])

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _drawn_from(self) -> dict[str, int | None]:
        return {"tasks": self.tasks, "pool": self.pool, "seed": self.seed}

    def _gather(self, leaf: Tensor) -> Tensor:
        gathered = self.trainer.strategy.all_gather(leaf.contiguous())
        return gathered.flatten(0, 1) if self.trainer.world_size > 1 else leaf

    def _evaluate(self, stream: str) -> float:
        # Lightning validates in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), torch.no_grad():
            begin = self._held_out_episode(stream)
            end, losses = unroll(self.rule, begin, self.val_steps)
            buffers = [{name: leaf.clone() for name, leaf in end.buffers.items()} for _ in range(2)]
            last = end.task.loss(end.params, buffers[0], end.task.batch(end.step))
            final = end.task.val_loss(end.params, buffers[1])
            sums = torch.cat([losses, last[None], final[None]]).sum(1)
            means = self.trainer.strategy.reduce(sums, reduce_op="sum") / self.val_tasks
        *self.val_curve, value = means.tolist()
        self.cost.gradient_evaluations += self.val_steps * self.val_tasks
        return float(value)

    def _held_out_episode(self, stream: str) -> Episode:
        if stream not in self._held_out:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            part = slice(rank * self.val_tasks // world, (rank + 1) * self.val_tasks // world)
            task, params, buffers = shard(draw(self.family, self.seed, stream, 0, self.val_tasks), part, self.device)
            self._held_out[stream] = Episode(task, params, buffers, {}, origin=params)
        begin = self._held_out[stream]
        return Episode(begin.task, begin.params, begin.buffers, self.rule.init(begin.params), origin=begin.params)

    def _record(self, extra: dict[str, float]) -> dict[str, float]:
        row: dict[str, float] = {"step": float(self.global_step)}
        row.update({name: float(value) for name, value in self._latest.items()})
        row.update({f"rule/{name}": value for name, value in self.rule.describe().items()})
        row["cost/gradient_evaluations"] = float(self.cost.gradient_evaluations)
        row["cost/seconds"] = self.cost.seconds
        row["guard/restores"] = float(self.best.restores)
        if self.history and self.history[-1]["step"] == row["step"]:
            self.history[-1].update({**row, **extra})
        else:
            self.history.append({**row, **extra})
        return row

    def _restore(self, reason: str) -> None:
        schedulers = self.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [] if schedulers is None else [schedulers]
        self.best.restore_(self.rule, self.trainer.optimizers, schedulers, reason)
        self.episodes.restart()

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            self.cost.seconds += now - self._clock
            self._clock = now


def refuse_half_precision(precision: Any) -> None:
    """Raise for float16: the inner gradients never see Lightning's ``GradScaler`` and would underflow."""
    if str(precision) in ("16", "16-mixed", "16-true"):
        raise ValueError(
            f"precision={precision!r}: inner gradients are taken inside a meta-step, out of reach of the GradScaler, and "
            "underflow in float16. Use 'bf16-mixed' or '32-true'"
        )


def _check_sizes(
    *, tasks: int, pool: int | None, horizon: int | None, unroll: int, epoch: int | None, val_tasks: int, factor: float | None
) -> None:
    if tasks < 1 or val_tasks < 0 or (epoch is not None and epoch < 1):
        raise ValueError(
            f"tasks and steps_per_epoch must be at least 1 and val_tasks at least 0, got {tasks}, {epoch} and {val_tasks}"
        )
    if pool is not None and (pool < tasks or pool % tasks):
        raise ValueError(f"pool must be a multiple of tasks: {pool} problems do not split into minibatches of {tasks}")
    if horizon is not None and (horizon < unroll or horizon % unroll):
        raise ValueError(
            f"horizon must be a multiple of the inner steps of a meta-step: {horizon} steps do not split into unrolls of {unroll}"
        )
    if factor is not None and not factor > 1:
        raise ValueError(f"guard_factor must be larger than 1, got {factor}")
