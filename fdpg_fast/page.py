"""The pieces of a page that is one HTML file: headings, tables, plots that carry their pictures.

Nothing in it is fetched from elsewhere, so that a page can be mailed, archived, opened offline.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fdpg_fast.progress import joined

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "markdown_table",
    "note",
    "number",
    "plot",
    "prompted",
    "section",
    "show",
    "table",
    "whole",
]


def whole(title: str, sections: Sequence[str]) -> str:
    """The whole file."""
    return _PAGE.format(title=html.escape(title), body="\n".join(sections))


def section(title: str, body: str) -> str:
    """A part of the page; without a heading where ``title`` is empty."""
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f"<section>{heading}{body}</section>"


def note(text: str) -> str:
    """Small print."""
    return f"<p class=note>{html.escape(text)}</p>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    kind: Literal["numbers", "facts", "samples"] = "numbers",
) -> str:
    """Numbers, right-aligned; facts in words; or samples, in columns of one width, that are HTML
    already."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{cell if kind == 'samples' else html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    first = f"<tr>{head}</tr>" if any(header) else ""
    return f"<div class=wide><table class={kind}>{first}{body}</table></div>"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the same table in Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(header) - 1)])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def plot(
    title: str,
    draw: Callable[[Axes], None],
    *,
    x: str = "step",
    size: tuple[float, float] = (4.6, 2.7),
) -> str:
    """One picture, as an <img> that carries its own SVG.

    Args:
        title: above it, and what it is called where it cannot be seen.
        draw: draws.
        x: what the horizontal axis counts.
        size: inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fdpg", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_xlabel(x)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{encoded}">'


def prompted(prompt: str, text: str) -> str:
    """A sample behind its prompt, which is greyed."""
    whole = joined(prompt, text)
    start, rest = whole[: len(prompt)], whole[len(prompt) :]
    return f"<em>{html.escape(start)}</em>{html.escape(rest)}"


def number(value: Any) -> float:
    """A float from what JSON has for it: a number, "inf", "-inf" or null."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan  # a plot has no place for infinity


def show(pair: Sequence[Any] | None) -> str:
    """``0.312 ± 0.021`` from ``[value, standard error or null]``."""
    if pair is None or pair[0] is None:
        return ""
    value, error = (float(pair[0]), pair[1])
    if math.isnan(value):  # as numbers are before JSON, which has null
        return ""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    value = round(value, digits) + 0.0  # no minus before a zero
    if error is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {float(error):.{digits}f}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
        padding: 0 1rem; color: #1a1a1a; background: #fff; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; vertical-align: top; }}
th {{ text-align: left; }}
.numbers td + td, .numbers th + th {{ text-align: right; font-variant-numeric: tabular-nums; }}
.samples {{ table-layout: fixed; width: 100%; }}
.samples em {{ color: #888; font-style: normal; }}
.wide {{ overflow-x: auto; }}
img {{ width: 380px; max-width: 100%; margin: .3rem; vertical-align: top; }}
.note {{ color: #666; font-size: .9rem; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
