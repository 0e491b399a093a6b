"""Judging an optimizer by what it is for: training an ordinary LightningModule."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_metaopt.callbacks import SwapOptimizer
from lightning_metaopt.rule import Rule
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.evaluation import Candidate, Evaluation, Split, stream
from lightning_metaopt.study.memory import PeakMemory
from lightning_metaopt.study.records import Result
from lightning_metaopt.study.run_metric import higher_is_better
from lightning_metaopt.task import TaskFamily

__all__ = ["TrainerEvaluation"]


@final
class TrainerEvaluation(Evaluation):
    """Trains a fresh copy of a LightningModule with each optimizer, then tests it.

    The runs of one seed differ in nothing but the optimizer: same initial weights, same order of the data, and no schedule of
    the module's own (a method may bring one). A rule comes in through :class:`~lightning_metaopt.SwapOptimizer`. The data
    modules are made once, and every run has a copy.

    Args:
        module: makes the module, a class_path with init_args.
        data: makes the data module of the final runs.
        tune_data: makes the data module of searches; its problems must be others.
        steps: optimizer steps of a run.
        smooth: training losses are averaged over so many steps for the curve, and for the last figure.
        validate_every: steps between validations, whose metrics become curves too (never scores); 0 for none.
        objective: the score that a search minimises: ``"mean training loss"`` (over the run), ``"last training loss"``,
            or whatever the module logs in its test step.
        trainer: further arguments of the ``Trainer``.
    """

    lazy: ClassVar[dict[str, type]] = {"module": LightningModule, "data": LightningDataModule, "tune_data": LightningDataModule}

    def __init__(
        self,
        module: Callable[[], LightningModule],
        data: Callable[[], LightningDataModule],
        tune_data: Callable[[], LightningDataModule],
        steps: int = 200,
        smooth: int = 10,
        validate_every: int = 0,
        objective: str = "mean training loss",
        trainer: dict[str, Any] | None = None,
    ) -> None:
        if steps < smooth or steps % smooth:
            raise RecipeError(f"smooth must divide steps, got {smooth} and {steps}")
        if higher_is_better(objective):
            raise RecipeError(f"a search looks for the smallest objective, and {objective!r} is to be large; name a loss")
        self.module, self.data, self.tune_data = module, data, tune_data
        self.steps, self.smooth, self.validate_every, self.objective = steps, smooth, validate_every, objective
        self.trainer = trainer or {}
        self.budget = steps
        self._data: dict[Split, LightningDataModule] = {}

    def check(self, candidate: Candidate) -> None:
        candidate.callbacks()
        if candidate.optimizer is not None:
            optimizer = candidate.optimizer([torch.nn.Parameter(torch.zeros(1))])
            if candidate.scheduler is not None:
                candidate.scheduler(optimizer)
        elif candidate.scheduler is not None:
            raise RecipeError("'scheduler' belongs to a torch optimizer; a rule's module brings its own")

    def sources(self) -> dict[str, str]:
        made = {"training and test": self._fresh_data("test"), "search": self._fresh_data("tune")}
        return {role: str(getattr(data, "source", type(data).__name__)) for role, data in made.items()}

    def _fresh_data(self, split: Split) -> LightningDataModule:
        # Loading and preparing data takes longer than many a run: done once, and every run has a copy.
        if split not in self._data:
            seed_everything(stream("data", 0) % 2**32, verbose=False)
            self._data[split] = self.data() if split == "test" else self.tune_data()
        return copy.deepcopy(self._data[split])

    def run(self, family: TaskFamily | None, candidate: Candidate, rule: Rule | None, seed: int, split: Split) -> Result:
        begin = time.perf_counter()
        data = self._fresh_data(split)
        record = _Observer(self.smooth)
        callbacks: list[Callback] = [record, *candidate.callbacks()]
        seed_everything(stream(split, seed) % 2**32, verbose=False)  # last before the module: what made the rest may have drawn
        module = self.module()
        if rule is not None:
            # A module's own schedule is for its own optimizer. It would scale a rule's updates too, but has no part in other runs.
            module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)  # type: ignore[method-assign]
            callbacks.append(SwapOptimizer(rule))
        else:
            # As LightningCLI does: the instance's method, so that any module can be given any optimizer.
            module.configure_optimizers = lambda: record.undisturbed(lambda: _optimizers(candidate, module))  # type: ignore[method-assign]
        options = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False, **self.trainer}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        if self.validate_every and split == "test":
            options |= {"val_check_interval": self.validate_every, "check_val_every_n_epoch": None}
        else:
            options["limit_val_batches"] = 0
        trainer = Trainer(max_steps=self.steps, max_epochs=-1, callbacks=callbacks, **options)
        with PeakMemory() as memory:
            trainer.fit(module, datamodule=data)
        scores = dict(trainer.test(module, datamodule=data, verbose=False)[0])
        if not record.losses:
            raise RecipeError("the run ended before its first step: a callback stopped it, or the data have no batch")
        losses = torch.stack(record.losses).double().cpu()
        scores["mean training loss"] = float(losses.mean())
        scores["last training loss"] = float(losses[-self.smooth :].mean())
        if self.objective not in scores:
            raise RecipeError(f"objective {self.objective!r} is none of the scores: {', '.join(scores)}")
        means = [float(part.mean()) for part in losses.split(self.smooth)]  # a callback may have ended the run early
        steps = [min((index + 1) * self.smooth, len(losses)) for index in range(len(means))]
        curves = {"training loss": list(zip(steps, means, strict=True)), **record.validations}
        clock = [(step, record.clock[step - 1]) for step in steps]
        return Result(curves, scores, len(losses), time.perf_counter() - begin, clock, memory.peak_mb)


def _optimizers(candidate: Candidate, module: LightningModule) -> Any:
    assert candidate.optimizer is not None
    optimizer = candidate.optimizer(module.parameters())
    if candidate.scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": candidate.scheduler(optimizer), "interval": "step"}}


class _Observer(Callback):
    """Losses and times of all steps (validations have no part in the times); and what an optimizer draws from torch's global
    generators does not shift the order of the data, augmentation or dropout.

    One callback for both: a Trainer spends as long on calling it as it takes itself.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.losses: list[Tensor] = []
        self.clock: list[float] = []
        self.validations: dict[str, list[tuple[int, float]]] = {}
        self.origin = self.paused = 0.0
        self.may_draw = True
        self._parts: list[Tensor] = []
        self._states: list[Tensor] = []

    def undisturbed(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; what it draws at random is drawn again by whoever comes next."""
        self._keep()
        try:
            return make()
        finally:
            self._restore()

    def _keep(self) -> None:
        if not self._states:  # the first of several times that an optimizer asks for the loss
            self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]

    def _restore(self) -> None:
        if self._states:
            torch.set_rng_state(self._states[0])
        if self._states[1:]:
            torch.cuda.set_rng_state_all(self._states[1:])
        self._states = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep()  # SwapOptimizer comes later

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()
        # torch's own optimizers draw nothing (LBFGS asks for the loss, and thereby for dropout, several times); others, and what
        # callbacks hang on an optimizer, may. To look after the generators costs more than everything else here.
        own = [type(optimizer).__module__.startswith("torch.optim.") for optimizer in trainer.optimizers]
        plain = all(own) and not any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers)
        self.may_draw = not (plain and trainer.callbacks == [self])  # type: ignore[attr-defined]  # an attribute of every Trainer
        self.origin = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.may_draw:
            self._keep()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.origin += time.perf_counter() - self.paused
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val"):
                self.validations.setdefault(name, []).append((trainer.global_step, float(value)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.may_draw:
            self._restore()
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        parts, step = self._parts, trainer.global_step
        parts.append(loss.detach())  # read at the end of the run: an accelerator goes on meanwhile
        if step > len(self.losses):  # the last of the batches whose gradients are added up
            self.losses.append(parts[0] if len(parts) == 1 else torch.stack(parts).mean())
            parts.clear()
            if step % self.every == 0 and loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            self.clock.append(time.perf_counter() - self.origin)
