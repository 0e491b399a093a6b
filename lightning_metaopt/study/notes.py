"""What a reader of the results must know of how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_metaopt.study.provenance import made_with

__all__ = ["notes"]


def notes(record: Mapping[str, Any]) -> list[str]:
    """Sentences for the report with this ``record.json``; none if there is nothing to say."""
    return [note for note in (_versions_note(record), _rules_note(record)) if note]


def _versions_note(record: Mapping[str, Any]) -> str:
    counts = record.get("made_with", {})  # none in the records of older versions
    if not counts or list(counts) == [made_with(record["versions"])]:
        return ""
    listed = "; ".join(f"{versions or 'versions that were not recorded'} ({count})" for versions, count in counts.items())
    return f"Finished trials and runs were made with: {listed}. This report was made with the versions below."


def _rules_note(record: Mapping[str, Any]) -> str:
    missing = [
        f"{f'{problem}: {name}' if problem else name} (seeds {', '.join(map(str, seeds))})"
        for problem, methods in record["results"].items()
        for name, found in methods.items()
        if (seeds := found.get("rules_elsewhere"))
    ]
    if not missing:
        return ""
    return (
        f"Rule files that are not in this folder: {'; '.join(missing)}. They were made in another folder, on another machine "
        "perhaps, that shares the database; the same command there puts them into its folder of rules."
    )
