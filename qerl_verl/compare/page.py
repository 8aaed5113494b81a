"""Writes the comparison as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from qerl_verl.compare.comparison import Comparison
from qerl_verl.compare.tables import Table, explain_intervals, settings_table, tables

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .8rem .3rem 0; text-align: right;
  vertical-align: top; white-space: pre-line; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
.conflict { background: #fde8e8; border-left: 4px solid #c00; padding: .5rem 1rem; }
"""


def page(comparison: Comparison, picture: bytes, title: str = "") -> str:
    """Returns the page as HTML.

    Args:
        comparison: what to show.
        picture: a PNG, see :func:`qerl_verl.compare.figure.draw`.
        title: the heading; empty takes the names of the arms.
    """
    heading = html.escape(title or f"Comparison of {', '.join(comparison.arms)}")
    conflicts = "".join(
        f'<p class="conflict"><b>Not the same:</b> {html.escape(c)}</p>' for c in comparison.agreement.conflicts
    )
    notes = [note for note in comparison.notes if not note.startswith("NOT THE SAME")]
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in (*explain_intervals(comparison), *notes))
    image = base64.b64encode(picture).decode("ascii")
    shown = [*tables(comparison, everything=True), *filter(None, [settings_table(comparison)])]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{heading}</h1>\n{conflicts}\n"
        f'<img alt="curves by step" src="data:image/png;base64,{image}">\n'
        + "\n".join(map(_table, shown))
        + f"\n<h2>notes</h2>\n<ul>{listed}</ul>\n</body></html>\n"
    )


def write(comparison: Comparison, path: Path, picture: bytes, title: str = "") -> None:
    """Writes the page of :func:`page` to a file."""
    path.write_text(page(comparison, picture, title), encoding="utf-8")


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>"
