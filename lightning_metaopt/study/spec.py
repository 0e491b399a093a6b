"""Recipes: what is compared with what, on which problems, with which budget. All of it is checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from lightning_metaopt.study.components import RecipeError, build, build_lazily, merge, only, parse, set_option, slug
from lightning_metaopt.study.evaluation import Evaluation, TaskEvaluation
from lightning_metaopt.study.method import Method, read_method
from lightning_metaopt.study.metrics import default_metrics, metric_names
from lightning_metaopt.study.run_metric import RunMetric
from lightning_metaopt.study.search import SAMPLERS
from lightning_metaopt.study.training import TrainerEvaluation
from lightning_metaopt.study.yaml_text import read_yaml
from lightning_metaopt.task import TaskFamily

__all__ = ["KEYS", "Problem", "Recipe", "TaskEvaluation", "TrainerEvaluation", "load_recipe"]


@dataclass
class Problem:
    """What optimizers are compared on.

    Attributes:
        name: as in the recipe; "" if the recipe has one problem without a name.
        source: the resolved text of ``family``, ``evaluation``, ``claim`` and ``note``.
    """

    name: str
    source: dict[str, Any]

    @property
    def where(self) -> str:
        """The place in the recipe, for messages."""
        return f"problems.{self.name}." if self.name else ""

    @property
    def claim(self) -> str:
        """What the paper says of it."""
        return str(self.source.get("claim", ""))

    def title(self, method: str) -> str:
        """The name of a method's runs on this problem."""
        return f"{self.name}: {method}" if self.name else method

    @property
    def note(self) -> str:
        """What it is, in a line for the report."""
        return str(self.source.get("note", ""))

    @cached_property
    def family(self) -> TaskFamily | None:
        """The problems that rules are meta-trained on, and whose parameters rules are sized for."""
        if "family" not in self.source:
            return None
        family: TaskFamily = build(TaskFamily, self.source["family"], f"{self.where}family")
        return family

    @cached_property
    def evaluation(self) -> Evaluation:
        """How an optimizer is judged."""
        evaluation: Evaluation = build_lazily(Evaluation, self.source["evaluation"], f"{self.where}evaluation")
        return evaluation


@dataclass
class Recipe:
    """A comparison. ``lightning-metaopt run FILE`` carries it out.

    Attributes:
        title: what is shown above tables and plots.
        problems: what optimizers are compared on, by name. A recipe with ``family`` and ``evaluation`` in the place of
            ``problems`` has one, named "".
        methods: the rows of the comparison, by name.
        seeds: the final runs; every seed has its own meta-training, problems and starting points.
        tuning_seeds: the runs on which options are chosen, on problems of their own.
        trials: how many trials every method with a search has; equal for all, or the recipe is refused.
        metrics: what is computed from the recorded runs, beside the scores of the evaluation.
        sampler: how trials are chosen, see :data:`~lightning_metaopt.study.search.SAMPLERS`.
        claim: what the paper says, printed above the table.
        source: the resolved text of the recipe.
    """

    title: str
    problems: dict[str, Problem]
    methods: dict[str, Method]
    seeds: list[int]
    tuning_seeds: list[int]
    trials: int
    sampler: str
    metrics: list[RunMetric]
    claim: str
    source: dict[str, Any]

    @classmethod
    def from_source(cls, source: dict[str, Any], check: bool = True) -> Recipe:
        """Check the resolved text of a recipe and build its parts; without ``check``, only when they are needed."""
        only(source, KEYS, "the recipe")
        for key in ("title", "methods"):
            if key not in source:
                raise RecipeError(f"the recipe has no '{key}'")
        if not isinstance(source["methods"], dict) or not source["methods"]:
            raise RecipeError("methods must be a mapping from names to methods, with at least one")
        recipe = cls(
            title=build(str, source["title"], "title"),
            claim=build(str, source.get("claim", ""), "claim"),
            problems=_problems(source),
            methods={str(name): read_method(str(name), options) for name, options in source["methods"].items()},
            seeds=build(list[int], source.get("seeds", [0, 1, 2, 3, 4]), "seeds"),
            tuning_seeds=build(list[int], source.get("tuning_seeds", [1000]), "tuning_seeds"),
            trials=build(int, source.get("trials", 1), "trials"),
            sampler=build(str, source.get("sampler", "grid"), "sampler"),
            metrics=_metrics(source.get("metrics")),
            source=source,
        )
        if check:
            recipe.check()
        return recipe

    def pairs(self) -> list[tuple[Problem, str, Method]]:
        """Every method with every problem that it is tried on."""
        return [
            (problem, name, method.on(problem.name))
            for problem in self.problems.values()
            for name, method in self.methods.items()
            if method.problems is None or problem.name in map(str, method.problems)
        ]

    def check(self) -> None:
        """Build every kind of trial of every method once; raises :class:`RecipeError` for the first that cannot run."""
        self._check_plan()
        for problem, name, method in self.pairs():
            evaluation = problem.evaluation  # not inside: its own faults are not the method's
            for trial in method.space.grid() if self.sampler == "grid" else method.space.each():
                try:
                    evaluation.check(method.candidate(problem.family, trial))
                except (ValueError, TypeError) as error:
                    raise RecipeError(f"methods.{name}{f' with {trial}' if trial else ''}: {error}") from error

    def check_text(self) -> None:
        """Check all names of classes, their options and the budget without building anything: no data set is loaded."""
        self._check_plan()
        for problem in self.problems.values():
            parse(Evaluation, problem.source["evaluation"], f"{problem.where}evaluation")
            if "family" in problem.source:
                parse(TaskFamily, problem.source["family"], f"{problem.where}family")
        for _, name, method in self.pairs():
            for trial in method.space.each():
                method.check_text(f"methods.{name}", trial)

    def _check_plan(self) -> None:
        if not self.seeds or not self.tuning_seeds or set(self.seeds) & set(self.tuning_seeds):
            raise RecipeError("seeds and tuning_seeds must not be empty and not overlap: options are not chosen on the final runs")
        for key in ("seeds", "tuning_seeds"):
            seeds: list[int] = getattr(self, key)
            if len(set(seeds)) < len(seeds):
                raise RecipeError(f"{key} holds one seed twice: {seeds}")
        if self.trials < 1:
            raise RecipeError(f"trials must be at least 1, got {self.trials}")
        if self.sampler not in SAMPLERS:
            raise RecipeError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        for name, method in self.methods.items():
            if method.problems is not None and not method.problems:
                raise RecipeError(f"methods.{name}.problems is empty: name a problem, or leave the key out to try it on all")
            unknown = set(map(str, method.problems or [])) - set(self.problems)
            if unknown:
                raise RecipeError(f"methods.{name}.problems: the recipe has no problem {', '.join(sorted(unknown))}")
        for _, name, method in self.pairs():
            self._check_budget(name, method)
        idle = set(self.problems) - {problem.name for problem, _, _ in self.pairs()}
        if idle:
            raise RecipeError(
                f"no method is tried on the problem {', '.join(sorted(idle))}: add it to a method's 'problems', or drop it"
            )
        self._check_names()

    def _check_names(self) -> None:
        files: dict[str, str] = {}
        for problem, name, _ in self.pairs():
            title = problem.title(name)
            file = slug(title)
            if not slug(name) or len(title) > LONGEST or len(file.encode()) > LONGEST:
                raise RecipeError(
                    f"methods.{name}: the names of problem and method must have a letter or digit, and together at most {LONGEST} "
                    f"bytes, as they become names of files; got {title!r}"
                )
            if file in files:
                raise RecipeError(f"{files[file]!r} and {title!r} would share the file name {file!r}: rename one of them")
            files[file] = title

    def _check_budget(self, name: str, method: Method) -> None:
        if not method.search or self.sampler != "grid":
            return
        if not method.space.finite:
            raise RecipeError(f"methods.{name}: a grid needs lists of values; for ranges choose another sampler")
        count = len(method.space.grid())
        if count != self.trials:
            raise RecipeError(f"methods.{name} has {count} trials, but every searched method gets {self.trials} (trials)")


_PROBLEM_KEYS = {"family", "evaluation", "claim", "note"}
KEYS = {"title", "problems", "family", "evaluation", "methods", "seeds", "tuning_seeds", "trials", "sampler", "metrics", "claim"}
"""What a recipe may have at its top."""
LONGEST = 200  # bytes of the names of problem and method: systems allow 255 for a file, which has a seed and a suffix too


def _metrics(specs: Any) -> list[RunMetric]:
    metrics: list[RunMetric] = default_metrics() if specs is None else build(list[RunMetric], specs, "metrics")
    try:
        metric_names(metrics)
    except ValueError as error:
        raise RecipeError(f"metrics: {error}") from error
    return metrics


def _problems(source: Mapping[str, Any]) -> dict[str, Problem]:
    if "problems" not in source:
        if "evaluation" not in source:
            raise RecipeError("the recipe has no 'evaluation' (nor 'problems', each with its own)")
        return {"": Problem("", {key: source[key] for key in ("family", "evaluation") if key in source})}
    if "evaluation" in source or "family" in source:
        raise RecipeError("give either 'problems' or one 'evaluation' with its 'family', not both")
    if not isinstance(source["problems"], dict) or not source["problems"]:
        raise RecipeError("problems must be a mapping from names to problems")
    for name, options in source["problems"].items():
        if not isinstance(options, dict) or "evaluation" not in options:
            raise RecipeError(f"problems.{name} must be a mapping with the keys {', '.join(sorted(_PROBLEM_KEYS))}")
        only(options, _PROBLEM_KEYS, f"problems.{name}")
    return {str(name): Problem(str(name), options) for name, options in source["problems"].items()}


def load_recipe(paths: Iterable[str], overrides: Mapping[str, str] | None = None, text_only: bool = False) -> Recipe:
    """Read one or more YAML files, later ones laid over earlier ones, then dotted overrides; check everything.

    With ``text_only`` only what can be checked without building anything, so that no data are needed.

    Raises:
        RecipeError: for missing files, unknown keys, wrong types and unequal budgets.
    """
    source: dict[str, Any] = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                loaded = read_yaml(file)
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise RecipeError(f"{path} is no recipe: it must be a mapping with the keys {', '.join(sorted(KEYS))}")
        source = merge(source, loaded)
    for key, text in (overrides or {}).items():
        try:
            set_option(source, key, read_yaml(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key}={text} is not valid YAML; put it in quotes: --{key}='\"{text}\"'") from error
    recipe = Recipe.from_source(source, check=not text_only)
    if text_only:
        recipe.check_text()
    return recipe
