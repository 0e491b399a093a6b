"""What the tables of a report hold, taken from the tidy rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lightning_metaopt.study.markup import Cell, Mark, Table, figure
from lightning_metaopt.study.statistics import average_ranks, holm, paired_permutation_test, paired_t_interval, paired_t_test
from lightning_metaopt.study.tidy import StudyData, Summary

__all__ = [
    "baseline_table",
    "best_baseline",
    "failure_table",
    "objective_table",
    "option_table",
    "problem_tables",
    "rank_table",
    "rule_table",
    "score_table",
]


def _shown(data: StudyData, row: Summary | None) -> str:
    if row is None:
        return "-"
    about, problem = data.record["metrics"][row.metric], data.record["problems"][row.problem]
    if row.metric == "diverged":
        return f"{row.diverged}/{row.n}"
    if about["censored"]:
        if problem["targets"].get(row.metric) is None:
            return "-"
        if row.reached == row.n:
            return figure(row.mean, row.sd)
        limit = f"> {problem['budget']}" if about["unit"] == "steps" else "never"
        return f"{f'{row.median:.4g}' if 2 * row.reached > row.n else limit} ({row.reached}/{row.n})"
    if about["unit"] in ("seconds", "MB"):
        return figure(row.mean, row.sd) if row.reached else "-"
    shown = figure(row.mean, row.sd)
    return f"{shown} ({row.n - row.reached}/{row.n} diverged)" if 0 < row.reached < row.n else shown


def marks(data: StudyData, problem: str, metric: str) -> dict[str, Mark]:
    """The best method by the mean over seeds, and those whose paired difference to it may be zero (95 % t-interval).

    A method with a run that diverged, or did not reach a target, is neither.
    """
    values = _complete(data, problem, metric)
    if not values:
        return {}
    best = _best(data, metric, values)
    found: dict[str, Mark] = {best: "best"}
    for name, by_seed in values.items():
        low, high = paired_t_interval(*_paired(by_seed, values[best]))
        if name != best and (low <= 0 <= high or by_seed == values[best]):
            found[name] = "near"
    return found


def _complete(data: StudyData, problem: str, metric: str) -> dict[str, dict[int, float]]:
    found = data.values(problem, metric)
    seeds = max(map(len, found.values()), default=0)
    return {
        name: values
        for name, values in found.items()
        if len(values) == seeds and all(map(math.isfinite, values.values())) and not data.summary[problem, name, metric].diverged
    }


def _best(data: StudyData, metric: str, values: Mapping[str, Mapping[int, float]]) -> str:
    larger = data.record["metrics"][metric]["larger_is_better"]
    return (max if larger else min)(values, key=lambda name: fmean(values[name].values()))


def _paired(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    seeds = [seed for seed in first if seed in second]
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def _row(data: StudyData, columns: Sequence[tuple[str, str]], name: str) -> list[str | Cell]:
    return [name, *(_cell(data, problem, metric, name) for problem, metric in columns)]


def _failed(data: StudyData, problem: str) -> dict[str, str]:
    """Text of the error by method; records of older versions have none."""
    found = {name: result.get("failed", "") for name, result in data.record["results"][problem].items()}
    return {name: error for name, error in found.items() if error}


def _cell(data: StudyData, problem: str, metric: str, name: str) -> Cell:
    if name in _failed(data, problem):
        return Cell("failed")
    row = data.summary.get((problem, name, metric))
    everything = data.summary.get((problem, name, "diverged"))
    if row is None and everything is not None and everything.diverged == everything.n:
        return Cell("diverged")  # in meta-training, before there was a run to measure
    if row is None:
        return Cell("-")
    about = data.record["metrics"][metric]
    compared = metric != "diverged" and (about["censored"] or about["unit"] not in ("seconds", "MB"))
    return Cell(_shown(data, row), marks(data, problem, metric).get(name, "") if compared else "")


def score_table(data: StudyData, problem: str, metrics: Sequence[str], title: str = "", note: str = "") -> Table:
    """The methods of one problem, a column for each metric."""
    failed = _failed(data, problem)
    names = [name for name in data.methods if (problem, name, "diverged") in data.summary or name in failed]
    return Table(title, ["method", *metrics], [_row(data, [(problem, metric) for metric in metrics], name) for name in names], note)


def objective_table(data: StudyData, title: str = "All problems") -> Table:
    """All methods on all problems, by what each problem's search minimised."""
    columns = [(problem, data.objective(problem)) for problem in data.problems]
    rows = [_row(data, columns, name) for name in data.methods]
    if len({metric for _, metric in columns}) == 1:
        return Table(title, ["method", *data.problems], rows, f"The figure is the {columns[0][1]}, which every search minimised.")
    return Table(title, ["method", *(f"{problem}: {metric}" for problem, metric in columns)], rows, "What each search minimised.")


def rank_table(data: StudyData) -> Table:
    """Average ranks over problems and seeds, and over the seeds of each problem; 1 is best."""
    problems = [problem for problem in data.problems if data.values(problem, "diverged")]  # not those where all methods failed
    names = [name for name in data.methods if all((problem, name, "diverged") in data.summary for problem in problems)]
    blocks = {problem: data.blocks(problem, data.objective(problem), names) for problem in problems}
    overall = average_ranks([block for found in blocks.values() for block in found])
    single = {problem: average_ranks(found) for problem, found in blocks.items()}
    rows = [
        [
            Cell(name),
            Cell(f"{rank:.2f}", "best" if rank == min(overall.values()) else ""),
            *(Cell(f"{single[problem][name]:.2f}") for problem in problems),
        ]
        for name, rank in sorted(overall.items(), key=lambda pair: pair[1])
    ]
    count = sum(map(len, blocks.values()))
    note = (
        f"Mean rank among {len(names)} methods in {count} comparisons (problem and seed), by what each search minimised; "
        "ties share a rank, diverged runs the last one."
    )
    left_out = [name for name in data.methods if name not in names]
    if left_out:
        note += f" Not run on all problems, and so left out: {', '.join(left_out)}."
    return Table("Average ranks", ["method", "all", *problems], rows, note)


def best_baseline(data: StudyData, problem: str) -> str | None:
    """The ordinary optimizer with the best mean objective, among those of which no run diverged; ``None`` if there is none."""
    metric = data.objective(problem)
    values = {name: found for name, found in _complete(data, problem, metric).items() if name not in data.learned}
    return _best(data, metric, values) if values else None


def baseline_table(data: StudyData, problem: str, title: str = "") -> Table | None:
    """Every method against the best ordinary optimizer, paired by seed; ``None`` if there is nothing to test."""
    metric, baseline = data.objective(problem), best_baseline(data, problem)
    values = data.values(problem, metric)
    if baseline is None or len(values) < 2 or len(values[baseline]) < 2:
        return None
    others = {name: _paired(found, values[baseline]) for name, found in values.items() if name != baseline}
    student = holm({name: paired_t_test(*pair) for name, pair in others.items()})
    flips = holm({name: paired_permutation_test(*pair) for name, pair in others.items()})
    larger = data.record["metrics"][metric]["larger_is_better"]
    rows = []
    for name, (first, second) in others.items():
        wins = sum((a > b) if larger else (a < b) for a, b in zip(first, second, strict=True))
        low, high = paired_t_interval(first, second)
        difference = fmean(first) - fmean(second) if all(map(math.isfinite, first)) else math.nan
        tested = math.isfinite(difference)
        cells = [f"{difference:+.3g}", f"{low:+.3g} to {high:+.3g}", f"{student[name]:.2g}", f"{flips[name]:.2g}"]
        rows.append([name, *(cells if tested else ["diverged", "-", "-", "-"]), f"{wins}/{len(first)}"])
    seeds = len(values[baseline])
    note = (
        f"Difference of {metric} to {baseline}, paired by seed. It is the ordinary optimizer that was best in these same runs, "
        f"which flatters it a little. P-values are two-sided and "
        f"adjusted by Holm's method (comparisons: {sum(map(math.isfinite, student.values()))}). The t-test assumes normal "
        f"differences. The exact test flips signs and assumes nothing; with {seeds} seeds its smallest value is "
        f"{2 / 2**seeds:.2g} before the adjustment."
    )
    header = ["method", "difference", "95 % interval", "p, t-test", "p, exact", "better"]
    return Table(title, header, rows, note)


def option_table(data: StudyData, problem: str, title: str = "") -> Table:
    """What the searches chose, and what meta-training cost."""
    header = ["method", "chosen", "at the edge of its search", "meta-training: gradient evaluations", "seconds", "pays back after"]
    trials, budget = (data.record["problems"][problem][key] for key in ("trials", "budget"))
    note = (
        "Pays back after: the number of new problems on which tuning an ordinary optimizer "
        f"({trials} trials x {budget} steps) costs as many gradient evaluations as one meta-training; "
        "in brackets, with the search of the learned method's own options."
    )
    methods = {name: found for name, found in data.record["results"][problem].items() if not found.get("failed")}
    rows = [_option_row(name, found, max(trials, 1) * budget) for name, found in methods.items()]
    meta_trained = any(found["training"]["gradient_evaluations"] for found in methods.values())
    if not meta_trained:
        return Table(title, header[:3], [row[:3] for row in rows], folded=True)
    return Table(title, header, rows, note, folded=True)


def _option_row(name: str, found: Mapping[str, Any], per_use: int) -> list[str]:
    chosen = ", ".join(f"{key.rsplit('.', 1)[-1]} = {_value(value)}" for key, value in found["chosen"].items()) or "as given"
    edge = ", ".join(key.rsplit(".", 1)[-1] for key in found["at_edge"]) or "no"
    spent = found["training"]["gradient_evaluations"]
    if not spent:
        return [name, chosen, edge, "0", "0", "no meta-training"]
    whole = spent + found["search"]["gradient_evaluations"]
    uses = f"{math.ceil(spent / per_use)} ({math.ceil(whole / per_use)})"
    return [name, chosen, edge, f"{spent:.3g}", f"{found['training']['seconds']:.1f}", uses]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rule_table(data: StudyData, problem: str, title: str = "") -> Table | None:
    """What the meta-trained rules say of themselves; ``None`` if there are none."""
    found = {
        name: method["learned"]
        for name, method in data.record["results"][problem].items()
        if method["learned"] and method["training"]["gradient_evaluations"]
    }
    shown = [[name, ", ".join(f"{key} {_number(value)}" for key, value in rule.items())] for name, rule in found.items()]
    return Table(title, ["method", "rule (mean over seeds)"], shown, folded=True) if shown else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def failure_table(data: StudyData, problem: str, title: str = "") -> Table | None:
    """The errors of the methods that failed; ``None`` if there are none."""
    rows = [[name, error] for name, error in _failed(data, problem).items()]
    note = "A run of theirs ended in an error, so that they have no figures. The same command tries them again."
    return Table(title, ["method", "error"], rows, note) if rows else None


def problem_tables(data: StudyData, problem: str) -> list[Table]:
    """The tables of one problem, the scores first."""
    record = data.record
    of_run = [name for name, about in record["metrics"].items() if about["computed"] and data.values(problem, name)]
    scores = [name for name, about in record["metrics"].items() if not about["computed"] and data.values(problem, name)]
    seeds = ", ".join(map(str, record["tuning_seeds"]))
    notes = [f"{name}: {method['note']}." for name, method in record["methods"].items() if method["note"]]
    searched = f"Options: chosen among {record['problems'][problem]['trials']} trials for every searched method, on seeds {seeds}"
    shown: list[Table | None] = [
        score_table(data, problem, scores, note=" ".join(notes)),
        failure_table(data, problem, "Failed"),
        score_table(data, problem, of_run, "The whole run", _target_note(data, problem)) if of_run else None,
        baseline_table(data, problem, "Against the best baseline"),
        option_table(data, problem, searched),
        rule_table(data, problem, "What the rules learned"),
    ]
    return [found for found in shown if found is not None]


def _target_note(data: StudyData, problem: str) -> str:
    """What the columns to a target refer to."""
    found = [f"{name}: {value:.4g}" for name, value in data.record["problems"][problem]["targets"].items() if value is not None]
    if not found:
        return ""
    return (
        f"Targets: {', '.join(found)}. In brackets, how many runs reached it: the figure is the median of all runs then, or the "
        "budget where at least half of them did not."
    )
