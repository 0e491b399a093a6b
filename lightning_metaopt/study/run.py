"""Carrying out a recipe: search on tuning problems, then final runs on new ones."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import statistics
import sys
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_metaopt.loop import MetaLoop
from lightning_metaopt.rule import Rule
from lightning_metaopt.storage import save_rule
from lightning_metaopt.study.components import RecipeError, is_sized, slug
from lightning_metaopt.study.evaluation import Candidate, Split, TaskEvaluation, stream
from lightning_metaopt.study.method import Method
from lightning_metaopt.study.progress import Progress
from lightning_metaopt.study.provenance import made_with
from lightning_metaopt.study.records import Cost, MethodResult, Result, Results, Trial
from lightning_metaopt.study.search import planned
from lightning_metaopt.study.shared import WorkList
from lightning_metaopt.study.spec import Problem, Recipe

__all__ = ["Study", "train_rule"]

PAUSE = 1.0  # seconds between looks at what other workers have finished
LONGEST = 400  # letters of an error's text in the tables


class Study:
    """A recipe under way: what is finished is in the storage, so that any number of workers can go on at any time.

    Args:
        recipe: what to carry out.
        storage: of :func:`~lightning_metaopt.study.shared.open_storage`.
        folder: for the rules, and for the results at the end.
        attempt: the same for workers that begin together: what fails for one of them, the others leave alone.
    """

    def __init__(self, recipe: Recipe, storage: Any, folder: Path, attempt: str = "") -> None:
        self.recipe = recipe
        self.folder = folder
        self.entries = [_Entry(recipe, storage, folder, attempt, *pair) for pair in recipe.pairs()]

    @property
    def total(self) -> int:
        """Number of runs."""
        return sum(entry.total for entry in self.entries)

    @property
    def done(self) -> int:
        """Number of runs that are known to be finished; :attr:`finished` looks for more."""
        return sum(entry.done for entry in self.entries)

    @property
    def finished(self) -> bool:
        """Whether all runs are, but for those of methods that failed in this attempt."""
        return sum(entry.finished for entry in self.entries) == len(self.entries)  # not all(): every entry looks

    def made_with(self) -> Counter[str]:
        """How many of the runs that are known to be finished were made with which versions."""
        return sum((entry.made_with() for entry in self.entries), Counter())

    def work(self, progress: Progress, first: int = 0) -> None:
        """Do whatever is to be done and nobody else does, until everything is finished. A method that fails stops no other.

        Workers that begin at different places, ``first``, meet less often.
        """
        order = self.entries[first % len(self.entries) :] + self.entries[: first % len(self.entries)]
        while True:
            moved = False
            for entry in order:
                while entry.advance(progress):
                    moved = True
                    progress.finished(self.done)
            if self.finished:
                return
            if not moved:
                progress.at("waiting for other workers")
                progress.finished(self.done)
                time.sleep(PAUSE)

    def results(self) -> Results:
        """Everything that was measured; the rules are copied to ``folder/rules``."""
        found: Results = {name: {} for name in self.recipe.problems}
        for entry in self.entries:
            found[entry.problem.name][entry.name] = entry.result()
        return {name: methods for name, methods in found.items() if methods}


class _Entry:
    """One method on one problem."""

    def __init__(
        self, recipe: Recipe, storage: Any, folder: Path, attempt: str, problem: Problem, name: str, method: Method
    ) -> None:
        self.recipe, self.storage, self.folder, self.attempt = recipe, storage, folder, attempt
        self.problem, self.name, self.method = problem, name, method
        self.title = problem.title(name)
        self.search: WorkList | None = None
        self._final: WorkList | None = None
        self._candidate: tuple[dict[str, Any], Candidate] | None = None  # of the run before: most runs have the same
        if method.search:
            budget = [method.search, recipe.sampler, recipe.trials, recipe.tuning_seeds]
            key = f"{self.title} | search | {_digest(self.depends(problem, method), method.options({}), budget)}"
            seed = stream(key, 0) % 2**31
            size = len(method.space.grid()) if recipe.sampler == "grid" else recipe.trials
            items = planned(method.space, recipe.sampler, recipe.trials, seed)
            self.search = WorkList(storage, key, size, items, method.space, recipe.sampler, seed, attempt)

    @staticmethod
    def depends(problem: Problem, method: Method) -> dict[str, Any]:
        # What of the problem the method's runs depend on. Only some rules depend on the family: those that are meta-trained on
        # it, sized for it or judged on it.
        source, on_tasks = problem.source, isinstance(problem.evaluation, TaskEvaluation)
        kinds = [method.options(trial) for trial in method.space.each()]
        family = any("rule" in kind and ("train" in kind or on_tasks or is_sized(kind["rule"])) for kind in kinds)
        return {"evaluation": source["evaluation"], "family": source.get("family") if family else None}

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The options of the final runs; ``None`` while the search goes on."""
        if self.search is None:
            return {}
        if not self.search.finished:
            return None
        best: dict[str, Any] = min(self.search.records().values(), key=lambda record: record["score"])["item"]
        return best

    @property
    def final(self) -> WorkList | None:
        """The final runs; ``None`` while the search goes on."""
        chosen = self.chosen
        if self._final is None and chosen is not None:
            self.key = _digest(self.depends(self.problem, self.method), self.method.options(chosen))
            items = {seed: {"seed": seed} for seed in self.recipe.seeds}
            self._final = WorkList(self.storage, f"{self.title} | final | {self.key}", len(items), items, attempt=self.attempt)
        return self._final

    @property
    def total(self) -> int:
        searched = self.search.size * len(self.recipe.tuning_seeds) if self.search else 0
        return searched + len(self.recipe.seeds)

    @property
    def done(self) -> int:
        searched = len(self.search.known) * len(self.recipe.tuning_seeds) if self.search else 0
        return searched + (len(self._final.known) if self._final else 0)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return (self.final is not None and self.final.finished) or bool(self.failure)

    @property
    def failure(self) -> str:
        """What stopped the method in this attempt; "" if nothing is known to."""
        return next((work.failure for work in (self.search, self._final) if work is not None and work.failure), "")

    def advance(self, progress: Progress) -> bool:
        """Do one piece of work, if there is one."""
        try:
            if self.search is not None and not self.search.finished:
                return self.search.advance(lambda item: self._try(item, progress))
            return self.final is not None and self.final.advance(lambda item: self._judge(item["seed"], progress))
        except _RunError as error:
            traceback.print_exception(error.__cause__)
            print(f"{self.title} failed: {error}; the others go on", file=sys.stderr)
            return True

    def _try(self, options: Any, progress: Progress) -> tuple[float, dict[str, Any]]:
        assert self.search is not None
        scores, cost = [], Cost()
        for seed in self.recipe.tuning_seeds:
            description = f"{self.title}: trial {len(self.search.records()) + 1}/{self.search.size}"
            run, _, spent = self._run(options, seed, "tune", progress, description)
            cost.add(spent)
            scores.append(run.scores[self.problem.evaluation.objective])
        score = statistics.fmean(scores)
        return score if math.isfinite(score) else math.inf, {"cost": vars(cost), "made_with": made_with()}

    def _judge(self, seed: int, progress: Progress) -> tuple[float, dict[str, Any]]:
        run, rule, cost = self._run(self.chosen, seed, "test", progress, f"{self.title}: seed {seed}")
        record: dict[str, Any] = {"run": run.to_json(), "cost": vars(cost), "made_with": made_with()}
        if rule is not None:
            provenance = {"recipe": self.recipe.title, "method": self.title, "options": self.chosen, "seed": seed}
            save_rule(rule, self._rule_file(seed), provenance)
            record["learned"] = {key: str(value) for key, value in rule.describe().items()}
        score = run.scores[self.problem.evaluation.objective]
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in run.scores.items())
        progress.console.print(f"{self.title}, seed {seed}: {shown}")
        return score if math.isfinite(score) else math.inf, record

    def _rule_file(self, seed: int) -> Path:
        return self.folder / "work" / f"{self.key}-seed{seed}.safetensors"

    def _run(self, options: Any, seed: int, split: Split, progress: Progress, description: str) -> tuple[Result, Rule | None, Cost]:
        """Meta-train if need be, then judge. What diverges for good is a result too: not-a-number."""
        evaluation, family = self.problem.evaluation, self.problem.family
        if self._candidate is None or self._candidate[0] != options:
            self._candidate = dict(options), self.method.candidate(family, options)
        candidate = self._candidate[1]
        try:
            rule, cost = train_rule(candidate, seed, progress, description)
            return evaluation.run(family, candidate, rule, seed, split), rule, cost
        except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # public; torch does not list it
            progress.console.print(f"{description}: {error}")
            return Result({}, {evaluation.objective: math.nan}, 0, 0.0), None, Cost()
        except SystemExit as stop:
            if type(stop) is not SystemExit:  # SIGTERM
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from stop  # which a Trainer has made an exit
        except RecipeError:  # no fault of this method: the others would fail alike
            raise
        except Exception as error:
            text = textwrap.shorten(str(error), LONGEST, placeholder=" ...")
            given = [f"{key.rsplit('.', 1)[-1]} = {value}" for key, value in dict(options).items()]
            raise _RunError(f"{type(error).__name__}: {text} ({', '.join([*given, f'seed {seed}'])})") from error

    def made_with(self) -> Counter[str]:
        lists = [work for work in (self.search, self._final) if work is not None]
        return Counter(record.get("made_with", "") for work in lists for record in work.known.values())

    def result(self) -> MethodResult:
        if self.failure:
            return MethodResult(failed=self.failure)
        assert self.final is not None
        result = MethodResult(chosen=self.chosen or {}, made_with=dict(self.made_with()))
        for trial in self.search.records().values() if self.search else ():
            result.trials.append(Trial(trial["item"], trial["score"]))
            result.search.add(Cost(**trial["cost"]))
        if self.search:
            result.at_edge = self.method.space.at_edge(result.chosen)
        records = self.final.records()
        for seed in self.recipe.seeds:
            record = records[seed]
            result.runs[seed] = Result.from_json(record["run"])
            result.training.add(Cost(*(value / len(records) for value in record["cost"].values())))
            if "learned" in record:
                result.learned[seed] = {key: float(value) for key, value in record["learned"].items()}
            if self._rule_file(seed).exists():  # another machine's may be elsewhere
                result.rules[seed] = self.folder / "rules" / f"{slug(self.title)}-seed{seed}.safetensors"
                result.rules[seed].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._rule_file(seed), result.rules[seed])
        return result


class _RunError(Exception):
    """A run ended in an error, which is its cause."""


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


class _ShowMetaLoss(Callback):
    def __init__(self, progress: Progress, description: str) -> None:
        self.progress, self.description = progress, description

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % 10 == 0 and "meta/loss" in trainer.callback_metrics:
            note = f"meta-loss {float(trainer.callback_metrics['meta/loss']):.4g} (step {trainer.global_step})"
            self.progress.at(self.description, note)


def train_rule(candidate: Candidate, seed: int, progress: Progress, description: str) -> tuple[Rule | None, Cost]:
    """The candidate's rule, meta-trained from ``seed`` if it has a learner; ``None`` for a torch optimizer."""
    progress.at(description)
    if candidate.rule is None:
        return None, Cost()
    torch.manual_seed(stream("phi", seed))  # rules with random initial meta-parameters
    rule = candidate.rule()
    if candidate.learner is None:
        return rule, Cost()
    learner = candidate.learner(rule=rule, seed=seed)
    options = {"enable_progress_bar": False, "logger": False, **candidate.trainer}
    callbacks = [*options.pop("callbacks", []), _ShowMetaLoss(progress, description)]
    rule = MetaLoop(**options, callbacks=callbacks).fit(learner)
    return rule, Cost(learner.cost.gradient_evaluations, learner.cost.seconds)
