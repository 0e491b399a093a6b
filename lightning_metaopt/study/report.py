"""Results on disk: tidy tables, a summary and a page to read, figures, and what is needed to get them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_metaopt.study.gather import gather, join
from lightning_metaopt.study.markup import figure, table
from lightning_metaopt.study.notes import notes
from lightning_metaopt.study.provenance import machine, versions
from lightning_metaopt.study.records import Results
from lightning_metaopt.study.spec import Recipe
from lightning_metaopt.study.tables import objective_table, problem_tables, rank_table
from lightning_metaopt.study.tidy import StudyData, read_rows, replace_file

__all__ = [
    "compare_outputs",
    "figure",
    "read_rows",
    "redraw",
    "render",
    "summary_text",
    "table",
    "write_results",
]


def write_results(output: Path, recipe: Recipe, results: Results, command: str) -> None:
    """Write tables, figures, ``summary.md`` and ``index.html``, every file at once or not at all.

    The folder may hold the results of an earlier report, which are replaced, and other files, which are left alone.
    """
    data = gather(recipe, results, command, output)
    data.record |= {"versions": versions(), "machine": machine()}
    text = yaml.safe_dump(recipe.source, sort_keys=False, allow_unicode=True)
    replace_file(output / "recipe.yaml", text)
    render(output, data, text)


def render(output: Path, data: StudyData, recipe: str = "") -> None:
    """Write a study's tables and draw everything that is made from them; ``recipe`` is shown on the page."""
    from lightning_metaopt.study.page import page
    from lightning_metaopt.study.plots import draw_all

    data.write(output)
    replace_file(output / "summary.md", summary_text(data))
    draw_all(data, output)
    replace_file(output / "index.html", page(data, recipe))


def redraw(output: Path) -> None:
    """Make summary, figures and page of a finished run again, from its tables and ``record.json``."""
    recipe = output / "recipe.yaml"
    render(output, StudyData.read(output), recipe.read_text(encoding="utf-8") if recipe.is_file() else "")


def summary_text(data: StudyData, brief: bool = False) -> str:
    """The tables as one Markdown text; ``brief``: without tests, options and what else is not a score."""
    record = data.record
    lines = [f"# {record['title']}", ""]
    if record["claim"]:
        lines += [f"Claim: {record['claim'].strip()}", ""]
    lines += [f"Mean ± standard deviation over seeds {record['seeds']}. `{record['command']}`", ""]
    lines += ["Bold: the best mean. Italics: the paired difference to it may be zero (95 % t-interval over seeds).", ""]
    if len(data.problems) > 1:
        lines += [*objective_table(data).markdown(), *rank_table(data).markdown()]
    for problem in data.problems:
        lines += _problem(data, problem, brief)
    lines += [line for note in notes(record) for line in (note, "")]
    lines += ["Versions: " + ", ".join(f"{package} {number}" for package, number in record["versions"].items()) + ".", ""]
    lines += ["Machine: " + ", ".join(record["machine"].values()) + "."]
    return "\n".join(lines) + "\n"


def _problem(data: StudyData, problem: str, brief: bool) -> list[str]:
    about = data.record["problems"][problem]
    several = len(data.problems) > 1
    level = 3 if several else 2
    lines = [f"## {problem}", ""] if several else []
    if about["note"]:
        lines += [about["note"].strip(), ""]
    if about["claim"]:
        lines += [f"Claim: {about['claim'].strip()}", ""]
    tables = problem_tables(data, problem)
    for shown in tables[:1] if brief else tables:
        lines += shown.markdown(level)
    if about["sources"]:
        lines += ["Data: " + "; ".join(f"{role}: {source}" for role, source in about["sources"].items()) + ".", ""]
    return lines


def compare_outputs(outputs: Sequence[Path], output: Path | None = None) -> str:
    """The scores of several result folders in one text, with average ranks over all problems.

    Args:
        outputs: folders of finished runs.
        output: a folder for the joined tables, figures and page of all of them; nothing is written without.
    """
    data = join([(folder.resolve().name, StudyData.read(folder)) for folder in outputs])
    if output is not None:
        render(output, data)
    return summary_text(data, brief=True)
