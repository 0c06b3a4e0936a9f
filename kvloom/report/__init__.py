"""Tables, plots and one self-contained HTML page, made from result records alone.

records = load_records("runs/")
print(render_text(records))
Path("report.html").write_text(render_html(records, title="SmolLM2"), encoding="utf-8")
save_pictures(records, Path("charts"))
"""

from __future__ import annotations

from kvloom.report._page import render_html
from kvloom.report._pictures import save_pictures
from kvloom.report._ranking import HEADINGS, ranking_notes, ranking_rows
from kvloom.report._records import Record, load_records
from kvloom.report._text import render_text

__all__ = [
    "HEADINGS",
    "Record",
    "load_records",
    "ranking_notes",
    "ranking_rows",
    "render_html",
    "render_text",
    "save_pictures",
]
