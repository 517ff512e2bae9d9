"""The lessons that have handles."""
import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("00_plot", "02_forward", "03_schedules")  # seconds each; the others up to two minutes


def has_handles(cell):
    "Does a line of this cell call `explore` or `play`?"
    if cell.cell_type != "code": return False
    calls = [line.value for line in ast.parse(cell.source).body if isinstance(getattr(line, "value", None), ast.Call)]
    return any(getattr(call.func, "id", "") in ("explore", "play") for call in calls)


def handle_cells(notebook):
    "The numbers of the cells that show handles."
    return [i for i, cell in enumerate(notebook.cells) if has_handles(cell)]


LESSONS = [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.heavy, id=path.stem)
           for path in sorted((ROOT/"nbs").glob("*.ipynb")) if handle_cells(nbformat.read(path, as_version=4))]
