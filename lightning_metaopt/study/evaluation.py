"""How an optimizer is judged: on a family of tasks, or by training a user's LightningModule."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_metaopt.episode import start, unroll
from lightning_metaopt.loop import MetaLearner
from lightning_metaopt.rule import Rule
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.memory import PeakMemory
from lightning_metaopt.study.records import Result
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree, cat

__all__ = ["Candidate", "Evaluation", "MakeOptimizer", "MakeScheduler", "Split", "TaskEvaluation", "stream"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Split = Literal["tune", "test"]


@dataclass(frozen=True)
class Candidate:
    """One optimizer with all options fixed.

    Attributes:
        rule: makes the rule, to be meta-trained if there is a ``learner``; without it there is an ``optimizer``.
        optimizer: makes a torch optimizer.
        learner: makes the meta-learner.
        trainer: options of the meta-training's trainer.
        callbacks: makes the callbacks of a run.
        scheduler: makes the learning-rate schedule, one step of which is one optimizer step.
    """

    rule: Callable[[], Rule] | None = None
    optimizer: MakeOptimizer | None = None
    learner: Callable[..., MetaLearner] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    scheduler: MakeScheduler | None = None


def stream(name: str, seed: int) -> int:
    """A seed for the stream ``name``, so that tuning, meta-training and final problems never coincide.

    >>> stream("tune", 0) != stream("test", 0)
    True
    """
    return int.from_bytes(hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=7).digest(), "big")


class Evaluation(ABC):
    """Runs one optimizer once. The smallest ``objective`` score wins a search."""

    lazy: ClassVar[dict[str, type]] = {}
    """Constructor arguments that are makers: called for a fresh object of the given class in every run."""

    objective: str
    budget: int
    """Inner gradients that one run takes for one problem: what a search pays for each trial."""

    @abstractmethod
    def check(self, candidate: Candidate) -> None:
        """Raise :class:`RecipeError` if this kind of optimizer cannot be judged here."""

    def sources(self) -> dict[str, str]:
        """Where real data came from, by role; empty for generated problems."""
        return {}

    @abstractmethod
    def run(self, family: TaskFamily | None, candidate: Candidate, rule: Rule | None, seed: int, split: Split) -> Result:
        """Judge the optimizer: ``rule`` is the (meta-trained) rule, or ``None`` for a torch optimizer."""


@final
class TaskEvaluation(Evaluation):
    """Runs an optimizer on new tasks of the family and records the mean validation loss after every step.

    A rule works on all problems at once. A torch optimizer is made anew for each problem, and its ``step`` is called with a
    closure that computes loss and gradients.

    Args:
        steps: inner steps of a run.
        tasks: problems of a run.
        report: steps at which the tables give the loss, beside the last one.
        objective: what a search minimises: ``"final"`` (validation loss after the last step) or ``"mean"`` (over the curve).
    """

    def __init__(
        self, steps: int = 30, tasks: int = 100, report: list[int] | None = None, objective: Literal["final", "mean"] = "final"
    ) -> None:
        if min([steps, tasks]) < 1:
            raise RecipeError(f"steps and tasks must be at least 1, got {steps} and {tasks}")
        self.steps, self.tasks = steps, tasks
        self.budget = steps
        self.objective = f"loss@{steps}" if objective == "final" else "mean loss"
        self.report = sorted({*(report or []), steps})
        if self.report[-1] > steps or self.report[0] < 0:
            raise RecipeError(f"report names steps outside 0..{steps}: {self.report}")

    def check(self, candidate: Candidate) -> None:
        if candidate.callbacks is not list:
            raise RecipeError("TaskEvaluation has no Trainer: 'callbacks' belong to a TrainerEvaluation")
        if candidate.scheduler is not None and candidate.optimizer is None:
            raise RecipeError("'scheduler' belongs to a torch optimizer; a rule has its own step sizes")

    def run(self, family: TaskFamily | None, candidate: Candidate, rule: Rule | None, seed: int, split: Split) -> Result:
        if family is None:
            raise RecipeError("TaskEvaluation draws its problems from a 'family', and the problem has none")
        begin = time.perf_counter()
        task = family.draw(stream(split, seed), self.tasks)
        generator = torch.Generator().manual_seed(stream(f"{split}-start", seed))
        with PeakMemory() as memory:
            runner = _Descent(candidate, task, generator) if rule is None else _RuleDescent(rule, task, generator)
            curve, clock, spent = [(0, runner.validation())], [(0, 0.0)], 0.0
            for step in range(1, self.steps + 1):
                before = time.perf_counter()
                runner.step()
                spent += time.perf_counter() - before
                curve.append((step, runner.validation()))
                clock.append((step, spent))
        values = [value for _, value in curve]
        scores = {f"loss@{step}": values[step] for step in self.report}
        scores["mean loss"] = sum(values) / len(values)
        seconds = time.perf_counter() - begin
        return Result({"validation loss": curve}, scores, self.steps, seconds, clock, memory.peak_mb)


class _RuleDescent:
    """A rule on all problems of a task."""

    def __init__(self, rule: Rule, task: Task, generator: torch.Generator) -> None:
        self.rule, self.episode = rule, start(rule, task, generator)

    def step(self) -> None:
        self.episode, _ = unroll(self.rule, self.episode, 1)

    def validation(self) -> float:
        return _validation(self.episode.task, self.episode.params, self.episode.buffers)


class _Descent:
    """A torch optimizer for each problem of a task, all in step; from the same starting points as rules."""

    def __init__(self, candidate: Candidate, task: Task, generator: torch.Generator) -> None:
        assert candidate.optimizer is not None
        self.task, self.taken = task, 0
        starts, buffers = task.init(generator)
        self.problems = [task.select(slice(index, index + 1)) for index in range(task.size)]
        self.params = [{name: nn.Parameter(leaf[index].clone()) for name, leaf in starts.items()} for index in range(task.size)]
        self.buffers = [{name: leaf[index : index + 1].clone() for name, leaf in buffers.items()} for index in range(task.size)]
        self.optimizers = [candidate.optimizer(params.values()) for params in self.params]
        self.schedulers = [candidate.scheduler(optimizer) for optimizer in self.optimizers] if candidate.scheduler else []

    def step(self) -> None:
        for problem, params, buffers, optimizer in zip(self.problems, self.params, self.buffers, self.optimizers, strict=True):
            batch = problem.batch(self.taken)

            def closure(problem: Task = problem, params: Any = params, buffers: Any = buffers, batch: Any = batch) -> float:
                loss = problem.loss_alone(dict(params), buffers, batch)
                for param, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
                    param.grad = grad
                return float(loss.detach())

            optimizer.step(closure)
        for scheduler in self.schedulers:
            scheduler.step()
        self.taken += 1

    def validation(self) -> float:
        stacked = {name: torch.stack([params[name].detach() for params in self.params]) for name in self.params[0]}
        return _validation(self.task, stacked, cat(self.buffers))


def _validation(task: Task, params: Tree, buffers: Tree) -> float:
    with torch.no_grad():
        return float(task.val_loss(params, dict(buffers)).mean())
