"""From what a study measured to tidy rows, and several studies joined into one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.metrics import Diverged, RunMetric, higher_is_better
from lightning_metaopt.study.records import MethodResult, Results
from lightning_metaopt.study.run_metric import mean, points_of
from lightning_metaopt.study.spec import Recipe
from lightning_metaopt.study.tidy import Figure, Point, StudyData, Trial

__all__ = ["gather", "join"]


def gather(recipe: Recipe, results: Results, command: str, output: Path) -> StudyData:
    """The tidy rows of a recipe's results. Files of rules are named as seen from ``output``."""
    always = Diverged()
    metrics = [*(metric for metric in recipe.metrics if metric.name != always.name), always]
    ordinary = {name for name, method in recipe.methods.items() if method.train is None}
    record: dict[str, Any] = {
        "title": recipe.title,
        "claim": recipe.claim,
        "command": command,
        "seeds": recipe.seeds,
        "tuning_seeds": recipe.tuning_seeds,
        "trials": recipe.trials,
        "learned": [name for name in recipe.methods if name not in ordinary],
        "problems": {},
        "methods": {name: {"learned": name not in ordinary, "note": method.note} for name, method in recipe.methods.items()},
        "metrics": {},
        "results": {},
        "made_with": _sum_up(result.made_with for methods in results.values() for result in methods.values()),
    }
    data = StudyData(record)
    for name, methods in results.items():
        evaluation = recipe.problems[name].evaluation
        learned_on = getattr(recipe.problems[name].family, "source", None)  # families of real data have one
        ran = {method: result for method, result in methods.items() if not result.failed}
        resolved = [metric.resolved(ran, ordinary & set(ran)) for metric in metrics]
        _add_runs(data, name, ran, resolved)
        targets = {metric.name: getattr(metric, "target", None) for metric in resolved if metric.censored}
        record["problems"][name] = {
            "claim": recipe.problems[name].claim,
            "note": recipe.problems[name].note,
            "objective": evaluation.objective,
            "budget": evaluation.budget,
            "trials": recipe.trials,
            "sources": evaluation.sources() | ({} if learned_on is None else {"meta-training": str(learned_on)}),
            "targets": {key: value for key, value in targets.items() if isinstance(value, float) and math.isfinite(value)},
        }
        record["results"][name] = {method: _spent(result, output) for method, result in methods.items()}
        data.trials += [
            Trial(name, method, number, json.dumps(trial.options), trial.score)
            for method, result in methods.items()
            for number, trial in enumerate(result.trials)
        ]
    _describe(record, data.figures, metrics)
    return data


def _add_runs(data: StudyData, problem: str, methods: Mapping[str, MethodResult], metrics: Sequence[RunMetric]) -> None:
    for method, result in methods.items():
        for seed, run in result.runs.items():
            for curve in run.curves:
                data.points += [Point(problem, method, seed, curve, *point) for point in points_of(run, curve)]
            computed = {metric.name for metric in metrics}
            scores = {score: value for score, value in run.scores.items() if score not in computed}
            data.figures += [Figure(problem, method, seed, score, value) for score, value in scores.items()]
            data.figures += [Figure(problem, method, seed, metric.name, metric.of(run)) for metric in metrics]


def _spent(result: MethodResult, output: Path) -> dict[str, Any]:
    described = [values for values in result.learned.values() if values]
    return {
        "chosen": result.chosen,
        "at_edge": result.at_edge,
        "training": vars(result.training),
        "search": vars(result.search),
        "learned": {key: mean(values[key] for values in described) for key in described[0]} if described else {},
        "failed": result.failed,
        "rules_elsewhere": [seed for seed in result.learned if seed not in result.rules],
        "rules": {str(seed): _relative(path, output) for seed, path in result.rules.items()},
    }


def _relative(path: Path, output: Path) -> str:
    return str(path.relative_to(output)) if path.is_relative_to(output) else str(path)


def _describe(record: dict[str, Any], figures: Sequence[Figure], metrics: Sequence[RunMetric]) -> None:
    # In the order of the tables: what the evaluations score, then what is computed from the runs.
    objectives = {about["objective"] for about in record["problems"].values()}
    computed = {metric.name: metric for metric in metrics}
    for score in dict.fromkeys(row.metric for row in figures if row.metric not in computed):
        larger = higher_is_better(score) and score not in objectives
        record["metrics"][score] = {"larger_is_better": larger, "censored": False, "computed": False, "unit": ""}
    for name, metric in computed.items():
        about = {"larger_is_better": metric.larger_is_better, "censored": metric.censored, "computed": True, "unit": metric.unit}
        record["metrics"][name] = about


def join(studies: Sequence[tuple[str, StudyData]]) -> StudyData:
    """Several studies as one: every problem with its study's name before its own, the methods of all side by side.

    Methods of the same name are taken to be the same. Ranks cover those that were run on all problems.
    """
    names = [name for name, _ in studies]
    if len(set(names)) < len(names):
        raise RecipeError(f"two of the folders have the same name: {', '.join(names)}; rename one")
    first = studies[0][1].record
    record: dict[str, Any] = {
        "title": f"Comparison of {', '.join(names)}" if len(names) > 1 else first["title"],
        "claim": "" if len(names) > 1 else first["claim"],
        "command": f"lightning-metaopt compare {' '.join(names)}",
    }
    joined = StudyData(record)
    for key in ("seeds", "tuning_seeds"):
        record[key] = sorted({seed for _, study in studies for seed in study.record[key]})
    record["trials"] = _either(study.record["trials"] for _, study in studies)
    for key in ("versions", "machine"):
        parts = dict.fromkeys(part for _, study in studies for part in study.record[key])
        record[key] = {part: _either(study.record[key].get(part, "none") for _, study in studies) for part in parts}
    for part in ("problems", "methods", "metrics", "results"):
        record[part] = {}
    for name, study in studies:
        renamed = {problem: _full_name(name, problem, len(names)) for problem in study.problems}
        for part in ("problems", "results"):
            record[part] |= {renamed[problem]: about for problem, about in study.record[part].items()}
        record["methods"] |= {method: about for method, about in study.record["methods"].items() if method not in record["methods"]}
        record["metrics"] |= {metric: about for metric, about in study.record["metrics"].items() if metric not in record["metrics"]}
        joined.points += [row._replace(problem=renamed[row.problem]) for row in study.points]
        joined.figures += [row._replace(problem=renamed[row.problem]) for row in study.figures]
        joined.trials += [row._replace(problem=renamed[row.problem]) for row in study.trials]
    record["learned"] = joined.learned
    record["made_with"] = _sum_up(study.record.get("made_with", {}) for _, study in studies)
    return joined


def _sum_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _either(values: Iterable[Any]) -> Any:
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else " or ".join(map(str, found))


def _full_name(study: str, problem: str, studies: int) -> str:
    if studies == 1:
        return problem
    return f"{study}: {problem}" if problem else study
