"""Every exercise: its solution passes the check, its stub and the typical wrong answers do not, and the check says why.

The sources nbs/_exercises/NN_exercises.ipynb hold, for each `## Exercise N.n`, one cell tagged `exercise` with a solution
between marks, one tagged `check`, one tagged `hint`, and cells tagged `wrong`: a mistake, what it is, and a piece of the
message that the check must give for it."""
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT/"nbs/_exercises").glob("*.ipynb"))
LEVELS = ("*Read", "*Change", "*Write")


def exercises(path):
    "The cells before the first exercise, and each exercise's cells under its number."
    head, parts = [], {}
    cells = head
    for cell in nbformat.read(path, as_version=4).cells:
        number = re.match(r"## Exercise (\d+\.\d)", cell.source) if cell.cell_type == "markdown" else None
        if number: cells = parts.setdefault(number[1], [])
        cells.append(cell)
    return head, parts


def tagged(cells, tag):
    return [c for c in cells if tag in c.metadata.get("tags", [])]


def stub(cell):
    "The cell as a student gets it."
    student = json.loads((ROOT/"nbs/exercises"/cell.file).read_text(encoding="utf-8"))
    return next("".join(c["source"]) for c in student["cells"] if c["id"] == cell.id)


def execute(source, names):
    exec(compile(source, "cell", "exec"), names)
    plt.close("all")


@pytest.fixture
def still(monkeypatch):
    "No windows, no menus, and whatever an exercise sets is set back."
    monkeypatch.setenv("EO_DDPM_WIDGETS", "0")
    with matplotlib.rc_context(): yield


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_solutions_pass_and_wrong_answers_do_not(path, still):
    "A check that no solution passes, that a stub or a known mistake slips through, or that names another property."
    head, parts = exercises(path)
    names = {"__name__": "exercise"}
    for cell in head:
        if cell.cell_type == "code": execute(cell.source, names)
    for number, cells in parts.items():
        code = [c for c in cells if c.cell_type == "code" and "wrong" not in c.metadata.get("tags", [])]
        (exercise,), (check,) = tagged(cells, "exercise"), tagged(cells, "check")
        start, end = code.index(exercise), code.index(check)
        for cell in code[:start]: execute(cell.source, names)
        exercise.file, before = path.name, dict(names)

        def answer(source):
            "The exercise's cell replaced, and what stands between it and its check."
            torch.manual_seed(0)
            for piece in (source, *(c.source for c in code[start+1:end+1])): execute(piece, names)

        with pytest.raises(NotImplementedError): answer(stub(exercise))
        for wrong in tagged(cells, "wrong"):
            names.clear(), names.update(before)
            message = re.search(r"# The check says: (.+)", wrong.source)[1]
            with pytest.raises(AssertionError) as e: answer(wrong.source)
            assert message in str(e.value), f"{number}: {wrong.source.splitlines()[0]!r} got {str(e.value)!r}"
        names.clear(), names.update(before)
        answer(exercise.source)
        for cell in code[end+1:]: execute(cell.source, names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_three_levels_with_hints(path):
    "An exercise without a hint or a planted mistake, a solution longer than promised, a level that is missing."
    head, parts = exercises(path)
    number = path.name[:2].lstrip("0") or "0"
    assert list(parts) == [f"{number}.{n}" for n in (1, 2, 3)]
    for level, cells in zip(LEVELS, parts.values()):
        assert level in cells[0].source, f"expected the level {level}"
        assert "<details>" in tagged(cells, "hint")[0].source and tagged(cells, "wrong")
        (exercise,) = tagged(cells, "exercise")
        solution = re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", exercise.source, re.S)
        assert len(solution) == 1 and len([line for line in solution[0].splitlines() if line.strip()]) <= 8


def test_every_lesson_has_exercises():
    "A lesson of the course table without a source here, or one that does not lead to its exercises."
    table = re.findall(r"\| \[(\d\d)_(\w+)\]\(nbs/[^|]+\|.+\|.+\|.+\| \[3\]\(nbs/exercises/(\d\d)_exercises.ipynb\) \|",
                       (ROOT/"README.md").read_text(encoding="utf-8"))
    assert len(table) >= 14 and sorted(number for number, *_ in table) == [path.name[:2] for path in SOURCES]
    for number, name, linked in table:
        assert linked == number and f"exercises/{number}_exercises.ipynb" in (ROOT/f"nbs/{number}_{name}.ipynb").read_text(encoding="utf-8")


def test_students_get_the_stubs_of_these_sources(tmp_path):
    "A student notebook edited by hand, or a source edited without `make export`; a solution that is given away."
    subprocess.run([sys.executable, str(ROOT/".ci/exercises.py"), str(tmp_path)], check=True, capture_output=True)
    made = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.glob("*.ipynb")}
    kept = {p.name: p.read_text(encoding="utf-8") for p in (ROOT/"nbs/exercises").glob("*.ipynb")}
    assert made == kept, "run `make export`"
    for text in kept.values(): assert "SOLUTION" not in text and '"wrong"' not in text
