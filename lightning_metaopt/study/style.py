"""How a method looks in all figures of a study, and how a figure is made."""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["COLORS", "Panel", "Style", "picture", "styles", "svg"]

COLORS = ("#3d7fe0", "#d9541e", "#1f9d5b", "#b65fd0", "#a07d00", "#0d96a8", "#e0457b", "#77808d", "#8d6ce8", "#6b9a1c")
"""Ten colours with a contrast of at least 3 to white and to the dark background of the page."""

_DASHES: dict[bool, list[tuple[float, ...]]] = {
    True: [(), (9, 1.5), (9, 1.5, 1.5, 1.5)],
    False: [(4, 2), (1.2, 1.6), (4, 1.6, 1.2, 1.6)],
}
LETTERS = 9.0  # of a heading, to the inch
_INK = "#010203"  # stands for the text colour of whatever page the drawing is put on


@dataclass(frozen=True)
class Style:
    """Colour, dashes (on, off, ... in line widths; none for a solid line), width in points, and a name for the style sheet."""

    color: str
    dashes: tuple[float, ...]
    width: float
    name: str

    def mark(self) -> dict[str, Any]:
        """Arguments of matplotlib's functions for what is no line."""
        return {"color": self.color, "gid": self.name}

    def line(self) -> dict[str, Any]:
        """Arguments of matplotlib's ``plot``."""
        return {
            "gid": self.name,
            "color": self.color,
            "linewidth": self.width,
            "linestyle": (0, self.dashes) if self.dashes else "-",
            "zorder": self.width,
        }


@dataclass(frozen=True)
class Panel:
    """One drawing: heading, a sentence that says what is to be seen, what draws it, height over width."""

    title: str
    text: str
    draw: Callable[[Any], None]
    height: float = 0.72


def styles(methods: Sequence[str], learned: Sequence[str]) -> dict[str, Style]:
    """A style for every method: the learned ones thick and solid, ordinary ones dashed. Up to 30 methods no two are equal."""
    found = {}
    for index, name in enumerate([*learned, *(name for name in methods if name not in learned)]):
        dashes = _DASHES[name in learned]
        cycle, color = divmod(index, len(COLORS))
        found[name] = Style(COLORS[color], dashes[cycle % len(dashes)], 2.1 if name in learned else 1.4, f"method-{index}")
    return {name: found[name] for name in methods}


@contextmanager
def _settings(ink: str) -> Iterator[None]:
    from matplotlib import rc_context

    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    shared: dict[Any, Any] = {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.18,
        "svg.fonttype": "none",
        "svg.hashsalt": "lightning_metaopt",
    }
    with rc_context(shared | dict.fromkeys(colored, ink)):
        yield


def picture(panels: Sequence[Panel], title: str, legend: dict[str, Style], columns: int = 3) -> bytes:
    """A PNG with all panels, ``columns`` a row, and one legend to their right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    height = 4.6 * max(panel.height for panel in panels)
    with _settings("#222222"):
        size = (5.2 * columns + (2.0 if legend else 0), max(height * rows + 0.5, 0.21 * len(legend) + 1.2))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in zip(places, panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title)
        for axes in list(places)[len(panels) :]:
            axes.set_axis_off()
        # The heading may be as wide as the figure: the legend stands half way down, with room above it.
        figure.suptitle("\n".join(textwrap.wrap(title, int(LETTERS * size[0]))), x=0.01, ha="left")
        if legend:
            handles = [Line2D([], [], **style.line()) for style in legend.values()]
            figure.legend(handles, list(legend), loc="outside right center", frameon=False, fontsize=9, handlelength=3)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def svg(panel: Panel, name: str) -> str:
    """A panel as SVG to stand inside a page, in the page's own colour and font; ``name`` must differ from others there."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _settings(_INK):
        figure = Figure(figsize=(4.8, 4.8 * panel.height), layout="tight")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        panel.draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="(method-\d+)"', r'class="\1"', text)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: (?:[a-z]+ )?([0-9.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    label = html.escape(f"{panel.title}. {panel.text}" if panel.title else panel.text, quote=True)
    text = re.sub(r'^<svg ([^>]*?)width="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', text)
    text = re.sub(r'^(<svg [^>]*?)height="[^"]*"', r"\1", text)
    return text.replace(_INK, "currentColor").strip()
