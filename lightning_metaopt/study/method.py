"""One row of a comparison: a rule, meta-trained or not, or a torch optimizer, and what is searched."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import Callback

from lightning_metaopt.loop import MetaLearner, MetaLoop
from lightning_metaopt.rule import Rule
from lightning_metaopt.study.components import (
    RecipeError,
    build,
    build_call,
    maker,
    only,
    parse,
    parse_call,
    set_option,
    with_shapes,
)
from lightning_metaopt.study.evaluation import Candidate, MakeOptimizer, MakeScheduler
from lightning_metaopt.study.search import Space
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.tasks import LeastSquares

__all__ = ["Method", "read_method"]


@dataclass
class Method:
    """One row of a comparison, as it stands in a recipe.

    Attributes:
        name: of the row.
        rule: class_path and init_args of a :class:`~lightning_metaopt.Rule`; ``shapes`` is filled in from the family.
        optimizer: class_path and init_args of a torch optimizer, instead of a rule.
        scheduler: class_path and init_args of a learning-rate schedule for it, one step of which is one optimizer step.
        callbacks: class_path and init_args of callbacks for the runs, as a list.
        train: how the rule is meta-trained: the arguments of :class:`~lightning_metaopt.MetaLearner`. Without it, the
            rule is used as it is.
        trainer: the arguments of :class:`~lightning_metaopt.MetaLoop`, with ``train``.
        search: dotted option to the values that are tried, as a list, or as a mapping with ``low``, ``high`` and ``log``.
        problems: names of the problems that it is tried on, default: all; or a mapping from each of them to dotted options that
            are others there, such as ``{digits: {}, photos: {train.metagrad.init_args.steps: 8}}``, or a ``search`` of its own.
        note: shown beside the row.
    """

    name: str = ""
    rule: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    callbacks: list[Any] | None = None
    train: dict[str, Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    problems: list[str] | dict[str, dict[str, Any]] | None = None
    note: str = ""

    @cached_property
    def space(self) -> Space:
        """What is searched."""
        return Space.parse(self.search, f"methods.{self.name}.search")

    def on(self, problem: str) -> Method:
        """The method as it is on one of its problems."""
        others = {str(key): value for key, value in self.problems.items()}.get(problem) if isinstance(self.problems, dict) else None
        if not others:
            return self
        parts = deepcopy({key: value for key in sorted(_PARTS | _LISTS) if (value := getattr(self, key)) is not None})
        for key, value in others.items():
            set_option(parts, key, value)
        return replace(self, **parts)

    def options(self, trial: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of the method with one trial's values put in: all that its runs depend on."""
        parts = {key: getattr(self, key) for key in ("rule", "optimizer", "scheduler", "callbacks", "train", "trainer")}
        options: dict[str, Any] = {key: deepcopy(part) for key, part in parts.items() if part is not None}
        for key, value in trial.items():
            set_option(options, key, value)
        return options

    def check_text(self, where: str, trial: Mapping[str, Any]) -> None:
        """Check one trial's classes and options without building them.

        Raises:
            RecipeError: naming the option.
        """
        options = self.options(trial)
        kinds: dict[str, Any] = {"optimizer": MakeOptimizer, "scheduler": MakeScheduler, "callbacks": list[Callback]}
        for key, kind in kinds.items():
            if key in options:
                parse(kind, options[key], f"{where}.{key}")
        if "rule" in options:
            parse(Rule, with_shapes(options["rule"], LeastSquares(dim=1, rows=1)), f"{where}.rule")
        if "train" in options:
            parse_call(MetaLearner, options["train"], f"{where}.train", {"family", "rule", "seed"})

    def candidate(self, family: TaskFamily | None, trial: Mapping[str, Any]) -> Candidate:
        """The method with one trial's values put in.

        Raises:
            RecipeError: for anything that does not fit.
        """
        options = self.options(trial)
        if ("rule" in options) == ("optimizer" in options):
            raise RecipeError("give exactly one of 'rule' and 'optimizer'")
        extras: dict[str, Any] = {}
        if "callbacks" in options:
            extras["callbacks"] = maker(list[Callback], options["callbacks"], "callbacks")
        if "scheduler" in options:
            extras["scheduler"] = build(MakeScheduler, options["scheduler"], "scheduler")
        if "optimizer" in options:
            if "train" in options:
                raise RecipeError("'train' belongs to a rule; a torch optimizer has nothing to meta-train")
            return Candidate(optimizer=build(MakeOptimizer, options["optimizer"], "optimizer"), **extras)
        spec = with_shapes(options["rule"], family)
        make_rule = maker(Rule, spec, "rule")
        rule = make_rule()
        if "train" not in options:
            return Candidate(rule=make_rule, **extras)
        if family is None:
            raise RecipeError("'train' needs the problem to have a 'family' to meta-train on")
        make_learner = partial(build_call, MetaLearner, options["train"], "train", family=family)
        make_learner(rule=rule, seed=0)  # once now, so that a wrong option is found before anything runs
        MetaLoop(**options["trainer"])
        return Candidate(rule=make_rule, learner=make_learner, trainer=options["trainer"], **extras)


_PARTS = {"rule": dict, "optimizer": dict, "scheduler": dict, "train": dict, "trainer": dict, "search": dict}
_LISTS = {"callbacks": list}


def read_method(name: str, options: Any) -> Method:
    """A method from its text in a recipe."""
    known = {*_PARTS, *_LISTS, "problems", "note"}
    if not isinstance(options, dict):
        raise RecipeError(f"methods.{name} must be a mapping with the keys {', '.join(sorted(known))}")
    only(options, known, f"methods.{name}")
    for key, kind in (_PARTS | _LISTS).items():
        if key in options and not isinstance(options[key], kind):
            what = "a mapping" if kind is dict else "a list"
            raise RecipeError(f"methods.{name}.{key} must be {what}, got {options[key]!r}")
    _check_problems(name, options.get("problems", []))
    method = Method(name=name, **options)
    for variant in (method, *map(method.on, map(str, method.problems or []))):
        Space.parse(variant.search, f"methods.{name}.search")  # now, so that a wrong entry is named
    return method


def _check_problems(name: str, problems: Any) -> None:
    if not isinstance(problems, list | dict):
        raise RecipeError(f"methods.{name}.problems must be a list, or a mapping with options, got {problems!r}")
    for problem, others in problems.items() if isinstance(problems, dict) else ():
        if not isinstance(others, dict):
            raise RecipeError(f"methods.{name}.problems.{problem} must be a mapping of options, got {others!r}; {{}} for none")
        only({str(key).split(".")[0]: None for key in others}, {*_PARTS, *_LISTS}, f"methods.{name}.problems.{problem}")
