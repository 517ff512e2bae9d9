"""Package, notebooks and README say the same thing."""
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
SCRIPTS = Path(sys.executable).parent


def nbdev(command, cwd, *args):
    "Run one of nbdev's commands in a copy of the project."
    script = shutil.which(command, path=str(SCRIPTS)) or command
    return subprocess.run([script, *args], cwd=cwd, check=True, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    "The project's sources, to run generators on without touching the original."
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT/name, tmp_path)
    for name in ("nbs", "eo_ddpm", ".ci"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return tmp_path


def test_package_is_what_the_notebooks_export(copy):
    "Catches a module edited by hand, or a notebook edited without an export."
    for module in (copy/"eo_ddpm").glob("*.py"):
        if module.name != "__init__.py": module.unlink()
    nbdev("nbdev_export", copy)
    modules = sorted(p.name for p in (ROOT/"eo_ddpm").glob("*.py"))
    assert sorted(p.name for p in (copy/"eo_ddpm").glob("*.py")) == modules
    _, differ, errors = filecmp.cmpfiles(ROOT/"eo_ddpm", copy/"eo_ddpm", modules, shallow=False)
    assert not differ and not errors, f"run `make export`: {differ + errors}"


def test_notebooks_are_clean(copy):
    "Catches execution counts, local metadata and lost `parameters` tags."
    nbdev("nbdev_clean", copy)
    dirty = [p.name for p in NOTEBOOKS if json.loads(p.read_text(encoding="utf-8")) != json.loads((copy/"nbs"/p.name).read_text(encoding="utf-8"))]
    assert not dirty, f"run `make export`: {dirty}"


def test_readme_is_the_index_notebook(copy):
    "Catches a README edited by hand, or an index that was not converted."
    subprocess.run([sys.executable, str(copy/".ci/readme.py")], check=True, capture_output=True)
    assert (copy/"README.md").read_text(encoding="utf-8") == (ROOT/"README.md").read_text(encoding="utf-8"), "run `make export`"
    for picture in (copy/"nbs/images").glob("index*"): assert filecmp.cmp(picture, ROOT/"nbs/images"/picture.name, shallow=False)


def test_parameters_tag_survives():
    "Without the tag papermill puts its values before the defaults, which then win."
    cells = json.loads((ROOT/"nbs/07_train_gpu.ipynb").read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs(path):
    "Students see these first: catches missing, failed or heavy outputs, warnings, and widget state that GitHub refuses."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs) or path.stem in ("12_doctor", "13_cli"), "no figure stored"
    assert not any(o["output_type"] == "error" for o in outputs)
    assert not any(o.get("name") == "stderr" for o in outputs), "a warning is stored"
    assert "widgets" not in notebook["metadata"]
    assert path.stat().st_size < 2_500_000


def lessons():
    "The notebooks of the course table, in its order."
    text = (ROOT/"nbs/index.ipynb").read_text(encoding="utf-8")
    return [ROOT/f"nbs/{stem}.ipynb" for stem in re.findall(r"\| \[(\d\d_\w+)\]\(\1\.ipynb\)", text.split("Behind the lessons")[0])]


def test_figures_say_what_they_show():
    "A lesson whose figures are closed to who cannot see them; an alternative text on a cell without a figure."
    assert len(lessons()) >= 14, "the course table is not found"
    for path in lessons():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        described = [c for c in cells if "".join(c["source"]).startswith("#| fig-alt: ")]
        assert len(described) >= 2, path.name
        for cell in described: assert any("image/png" in o.get("data", {}) for o in cell["outputs"]), f"{path.name}: {cell['source'][0]}"


def test_notebooks_open_on_colab():
    "A badge that opens another notebook, a set-up cell that is missing, late, or another one."
    for path in [*NOTEBOOKS, *sorted((ROOT/"nbs/exercises").glob("*.ipynb"))]:
        if path.stem == "index": continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        name = path.relative_to(ROOT).as_posix()
        assert f"colab.research.google.com/github/eo-ddpm/eo_ddpm/blob/main/{name})" in "".join(cells[0]["source"] + cells[1]["source"] + cells[2]["source"]), name
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and not "".join(c["source"]).startswith("#| default_exp")]
        assert "if \"COLAB_RELEASE_TAG\" in os.environ and not find_spec(\"eo_ddpm\")" in code[0], name


def test_imports_flow_down():
    "Catches a module that imports one taught after it."
    order = {re.search(r"#\| default_exp (\w+)", p.read_text(encoding="utf-8"))[1]: p.stem[:2]
             for p in NOTEBOOKS if "#| default_exp" in p.read_text(encoding="utf-8")}
    for module, number in order.items():
        text = (ROOT/"eo_ddpm"/f"{module}.py").read_text(encoding="utf-8")
        for other in re.findall(r"from (?:eo_ddpm)?\.(\w+) import", text): assert order[other] < number, f"{module} imports {other}"


def test_light_import():
    "Importing the package must not pull in what only the course or the tests need."
    code = "import sys, eo_ddpm.sampling, eo_ddpm.training; print([m for m in ('nbdev', 'diffusers', 'ipywidgets', 'fastcore', 'pytest') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert run.stdout.strip() == "[]"


def test_lessons_need_only_what_a_class_installs():
    "Catches a lesson that imports what only `make test` installs: green here, an ImportError on thirty laptops."
    needs = ConfigParser(delimiters=["="])
    needs.read(ROOT/"settings.ini", encoding="utf-8")
    listed = f"{needs['DEFAULT']['requirements']} {needs['DEFAULT']['class_requirements']}"
    installed = {re.match(r"[\w-]+", need).group().lower().replace("-", "_") for need in listed.split()}
    installed |= {"ipython", "jupyter_client", "jupyter_core", "pil", "packaging", "psutil"}  # jupyterlab, matplotlib, accelerate bring them
    installed |= {"eo_ddpm", *sys.stdlib_module_names}
    imports = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    strange = {}
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        code = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")
        if found := {name for name in imports.findall(code) if name.lower() not in installed}: strange[path.name] = found
    assert not strange
