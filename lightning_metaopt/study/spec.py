"""Recipes: what is compared with what, on which problems, with which budget. All of it is checked before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import yaml

from lightning_metaopt.loop import MetaLearner, MetaLoop
from lightning_metaopt.rule import Rule
from lightning_metaopt.study.components import RecipeError, build, build_call, build_lazily, merge, only, set_option, with_shapes
from lightning_metaopt.study.evaluation import Candidate, Evaluation, MakeOptimizer, TaskEvaluation
from lightning_metaopt.study.training import TrainerEvaluation
from lightning_metaopt.task import TaskFamily

__all__ = ["Method", "Recipe", "TaskEvaluation", "TrainerEvaluation", "load_recipe"]


@dataclass
class Method:
    """One row of a comparison, as it stands in a recipe.

    Attributes:
        rule: class_path and init_args of a :class:`~lightning_metaopt.Rule`; ``shapes`` is filled in from the family.
        optimizer: class_path and init_args of a torch optimizer, instead of a rule.
        train: how the rule is meta-trained: the arguments of :class:`~lightning_metaopt.MetaLearner`. Without it, the
            rule is used as it is.
        trainer: the arguments of :class:`~lightning_metaopt.MetaLoop`, with ``train``.
        search: dotted option to the values that are tried; all combinations are.
        note: shown beside the row.
    """

    rule: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    note: str = ""

    def trials(self) -> list[dict[str, Any]]:
        """Every combination of the searched values, as ``{dotted option: value}``; one empty trial without a search."""
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]

    def at_edge(self, trial: Mapping[str, Any]) -> list[str]:
        """The searched options of ``trial`` whose value is the first or last that was tried: a better one may lie outside."""
        return [key for key, values in self.search.items() if len(values) > 2 and trial[key] in (values[0], values[-1])]

    def candidate(self, family: TaskFamily, trial: Mapping[str, Any]) -> Candidate:
        """The method with one trial's values put in.

        Raises:
            RecipeError: for anything that does not fit.
        """
        parts = {"rule": self.rule, "optimizer": self.optimizer, "train": self.train, "trainer": self.trainer}
        options: dict[str, Any] = {key: deepcopy(part) for key, part in parts.items() if part is not None}
        for key, value in trial.items():
            set_option(options, key, value)
        if ("rule" in options) == ("optimizer" in options):
            raise RecipeError("give exactly one of 'rule' and 'optimizer'")
        if "optimizer" in options:
            if "train" in options:
                raise RecipeError("'train' belongs to a rule; a torch optimizer has nothing to meta-train")
            return Candidate(optimizer=build(MakeOptimizer, options["optimizer"], "optimizer"))
        make_rule = partial(build, Rule, with_shapes(options["rule"], family), "rule")
        rule = make_rule()
        if "train" not in options:
            return Candidate(rule=make_rule)
        make_learner = partial(build_call, MetaLearner, options["train"], "train", family=family)
        make_learner(rule=rule, seed=0)  # once now, so that a wrong option is found before anything runs
        MetaLoop(**options["trainer"])
        return Candidate(rule=make_rule, learner=make_learner, trainer=options["trainer"])


@dataclass
class Recipe:
    """A comparison. ``lightning-metaopt run FILE`` carries it out.

    Attributes:
        title: what is shown above tables and plots.
        family: the problems that rules are meta-trained on.
        evaluation: how an optimizer is judged.
        methods: the rows of the comparison, by name.
        seeds: the final runs; every seed has its own meta-training, problems and starting points.
        tuning_seeds: the runs on which options are chosen, on problems of their own.
        trials: how many trials every method with a search has; equal for all, or the recipe is refused.
        claim: what the paper says, printed above the table.
        source: the resolved text of the recipe.
    """

    title: str
    family: TaskFamily
    evaluation: Evaluation
    methods: dict[str, Method]
    seeds: list[int]
    tuning_seeds: list[int]
    trials: int
    claim: str
    source: dict[str, Any]

    @classmethod
    def from_source(cls, source: dict[str, Any]) -> Recipe:
        """Check the resolved text of a recipe and build its parts."""
        only(source, _KEYS, "the recipe")
        for key in ("title", "family", "evaluation", "methods"):
            if key not in source:
                raise RecipeError(f"the recipe has no '{key}'")
        if not isinstance(source["methods"], dict):
            raise RecipeError("methods must be a mapping from names to methods")
        recipe = cls(
            title=build(str, source["title"], "title"),
            claim=build(str, source.get("claim", ""), "claim"),
            family=build(TaskFamily, source["family"], "family"),
            evaluation=build_lazily(Evaluation, source["evaluation"], "evaluation"),
            methods={name: _method(name, options) for name, options in source["methods"].items()},
            seeds=build(list[int], source.get("seeds", [0, 1, 2, 3, 4]), "seeds"),
            tuning_seeds=build(list[int], source.get("tuning_seeds", [1000]), "tuning_seeds"),
            trials=build(int, source.get("trials", 1), "trials"),
            source=source,
        )
        recipe.check()
        return recipe

    def check(self) -> None:
        """Build every trial of every method once; raises :class:`RecipeError` for the first that cannot run."""
        if not self.seeds or not self.tuning_seeds or set(self.seeds) & set(self.tuning_seeds):
            raise RecipeError("seeds and tuning_seeds must not be empty and not overlap: options are not chosen on the final runs")
        for name, method in self.methods.items():
            trials = method.trials()
            if method.search and len(trials) != self.trials:
                raise RecipeError(f"methods.{name} has {len(trials)} trials, but every searched method gets {self.trials} (trials)")
            for trial in trials:
                try:
                    self.evaluation.check(method.candidate(self.family, trial))
                except (ValueError, TypeError) as error:
                    raise RecipeError(f"methods.{name}{f' with {trial}' if trial else ''}: {error}") from error


_KEYS = {"title", "family", "evaluation", "methods", "seeds", "tuning_seeds", "trials", "claim"}
_METHOD_KEYS = {"rule", "optimizer", "train", "trainer", "search", "note"}


def _method(name: str, options: Any) -> Method:
    if not isinstance(options, dict):
        raise RecipeError(f"methods.{name} must be a mapping with the keys {', '.join(sorted(_METHOD_KEYS))}")
    only(options, _METHOD_KEYS, f"methods.{name}")
    for key in _METHOD_KEYS - {"note"}:
        if key in options and not isinstance(options[key], dict):
            raise RecipeError(f"methods.{name}.{key} must be a mapping, got {options[key]!r}")
    for key, values in options.get("search", {}).items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"methods.{name}.search.{key} must be a list of values to try, got {values!r}")
    return Method(**options)


def load_recipe(paths: Iterable[str], overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read one or more YAML files, later ones laid over earlier ones, then dotted overrides; check everything.

    Raises:
        RecipeError: for missing files, unknown keys, wrong types and unequal budgets.
    """
    source: dict[str, Any] = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                loaded = yaml.safe_load(file)
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise RecipeError(f"{path} is no recipe: it must be a mapping with the keys {', '.join(sorted(_KEYS))}")
        source = merge(source, loaded)
    for key, text in (overrides or {}).items():
        set_option(source, key, yaml.safe_load(text))
    return Recipe.from_source(source)
