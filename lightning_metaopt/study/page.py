"""One HTML page for a study: tables and figures, all in the one file, to be opened without network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from lightning_metaopt.study.layout import STYLE_SHEET
from lightning_metaopt.study.notes import notes
from lightning_metaopt.study.plots import cost_panels, curve_panels, profile_panels, sensitivity_panels, target_panels
from lightning_metaopt.study.style import Panel, Style, styles, svg
from lightning_metaopt.study.tables import objective_table, problem_tables, rank_table
from lightning_metaopt.study.tidy import StudyData

__all__ = ["page"]

_FILES = {
    "summary.md": "the tables as text",
    "summary.csv": "every figure over seeds, with intervals",
    "scores.csv": "every figure of every run",
    "runs.csv": "every curve of every run",
    "tuning.csv": "every trial of every search",
    "recipe.yaml": "the recipe",
    "record.json": "everything else",
}


def page(data: StudyData, recipe: str = "") -> str:
    """The page as text.

    Args:
        data: the study.
        recipe: the recipe's text, shown at the end; nothing is shown without.
    """
    looks = styles(data.methods, data.learned)
    several = len(data.problems) > 1
    sections: list[tuple[str, str, str]] = []
    if several:
        sections.append(("overview", "All problems", objective_table(data, title="").html() + rank_table(data).html() + _MARKS))
    for number, problem in enumerate(data.problems):
        sections.append((f"problem-{number}", problem if several else "Results", _problem(data, problem, several)))
    figures = [
        ("curves", "Curves", curve_panels(data, looks), True),
        ("sensitivity", "Sensitivity to searched options", sensitivity_panels(data, looks), True),
        ("profiles", "Performance profiles", profile_panels(data, looks), True),
        ("targets", "Steps and time to the target", target_panels(data, looks), False),
        ("costs", "Time and memory", cost_panels(data, looks), False),
    ]
    sections += [
        (name, title, _figures(name, panels, looks if legend else {})) for name, title, panels, legend in figures if panels
    ]
    sections.append(("again", "How to get this again", _again(data, recipe)))
    links = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(title)}</h2>\n{content}</section>'
        for name, title, content in sections
    )
    title = html.escape(data.record["title"])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>{STYLE_SHEET}{_highlights(looks)}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>\n{_claim(data.record['claim'])}{_facts(data)}</header>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


_MARKS = (
    '<p class="note">Mean ± standard deviation over seeds. <strong>Bold</strong>: the best mean. <u>Underlined</u>: the paired '
    "difference to it may be zero (95 % t-interval over seeds).</p>\n"
)


def _claim(claim: str) -> str:
    return f'<p class="claim">Claim: {html.escape(claim.strip())}</p>\n' if claim else ""


def _facts(data: StudyData) -> str:
    record = data.record
    runs = len({(row.problem, row.method, row.seed) for row in data.figures})
    diverged = sum(row.metric == "diverged" and row.value == 1 for row in data.figures)
    failed = sum(bool(found.get("failed")) for methods in record["results"].values() for found in methods.values())
    facts = {
        "methods": f"{len(data.methods)} ({len(data.learned)} meta-trained)",
        "final runs": f"{runs}, {diverged} of them diverged",
        "seeds": ", ".join(map(str, record["seeds"])),
        "search": f"{record['trials']} trials each, on seeds {', '.join(map(str, record['tuning_seeds']))}",
    }
    if failed:
        facts["failed"] = f"{failed} (a method on a problem)"
    if len(data.problems) > 1:
        facts = {"problems": str(len(data.problems)), **facts}
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>' for name, value in facts.items())}</dl>\n"


def _problem(data: StudyData, problem: str, several: bool) -> str:
    about = data.record["problems"][problem]
    parts = [
        f"<p>{html.escape(about['note'].strip())}</p>\n" if about["note"] else "",
        _claim(about["claim"]),
        f"<p>The search minimised <em>{html.escape(about['objective'])}</em>; a run has {about['budget']} steps.</p>\n",
    ]
    first, *rest = problem_tables(data, problem)
    parts += [first.html(), "" if several else _MARKS, *(found.html() for found in rest)]
    if about["sources"]:
        listed = "".join(f"<li>{html.escape(role)}: {html.escape(source)}</li>" for role, source in about["sources"].items())
        parts.append(f"<h3>Data and licences</h3>\n<ul>{listed}</ul>\n")
    return "".join(parts)


def _figures(section: str, panels: Sequence[Panel], looks: Mapping[str, Style]) -> str:
    texts = list(dict.fromkeys(panel.text for panel in panels))
    note = "".join(f'<p class="note">{html.escape(text)}</p>\n' for text in texts)
    drawings = [svg(panel, f"{section}{number}") for number, panel in enumerate(panels)]
    drawn = "\n".join(
        f"<figure>{drawing}<figcaption>{html.escape(panel.title)}</figcaption></figure>"
        for drawing, panel in zip(drawings, panels, strict=True)
    )
    return f'{note}{_legend(looks)}<div class="figures">{drawn}</div>\n'


def _legend(looks: Mapping[str, Style]) -> str:
    if not looks:
        return ""
    items = []
    for name, style in looks.items():
        dashes = " ".join(f"{length * style.width:.1f}" for length in style.dashes)
        stroke = f'stroke="{style.color}" stroke-width="{style.width}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
        line = f'<svg width="36" height="10" aria-hidden="true"><line x1="0" y1="5" x2="36" y2="5" {stroke}/></svg>'
        items.append(f'<li class="{style.name}" tabindex="0">{line} {html.escape(name)}</li>')
    return f'<ul class="legend" aria-label="Legend">{"".join(items)}</ul>\n'


def _highlights(looks: Mapping[str, Style]) -> str:
    # Pointing at a method in a legend, or touching it, dims the others in the figures below it.
    names = [style.name for style in looks.values()]
    rules = [
        f"section:has(.legend .{name}:is(:hover, :focus)) figure [class^=method]:not(.{name}) {{ opacity: .1; }}" for name in names
    ]
    return "\n".join(rules) + "\n"


def _again(data: StudyData, recipe: str) -> str:
    record = data.record
    versions = "".join(f"<li>{html.escape(package)} {html.escape(number)}</li>" for package, number in record["versions"].items())
    machine = "".join(f"<li>{html.escape(part)}: {html.escape(name)}</li>" for part, name in record["machine"].items())
    rules = [
        f'<li><a href="{html.escape(path, quote=True)}">{html.escape(path)}</a></li>'
        for methods in record["results"].values()
        for found in methods.values()
        for path in found["rules"].values()
    ]
    files = "".join(
        f'<li><a href="{name}">{name}</a>: {what}</li>' for name, what in _FILES.items() if recipe or name != "recipe.yaml"
    )
    parts = [
        f'<p>Command:</p>\n<pre tabindex="0"><code>{html.escape(record["command"])}</code></pre>\n',
        *(f"<p>{html.escape(note)}</p>\n" for note in notes(record)),
        f'<h3>Versions</h3>\n<ul class="columns">{versions}</ul>\n<h3>Machine</h3>\n<ul>{machine}</ul>\n',
        f"<h3>Files beside this page</h3>\n<ul>{files}</ul>\n",
    ]
    if rules:
        parts.append(f"<details><summary>{len(rules)} rule files</summary><ul>{''.join(rules)}</ul></details>\n")
    if recipe:
        parts.append(
            f'<details><summary>The recipe</summary><pre tabindex="0"><code>{html.escape(recipe)}</code></pre></details>\n'
        )
    return "".join(parts)
