"""The stick for a room without a network: filled, and installed from with every way out closed."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLOSED = "http://127.0.0.1:9"  # nobody listens there


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)


def test_a_target_that_is_misspelt(tmp_path):
    "Catches an hour of downloads for a system that does not exist."
    result = run(sys.executable, ROOT/".ci/stick.py", tmp_path/"stick", "window-3.12")
    assert result.returncode and "unknown target 'window-3.12'" in result.stderr and not (tmp_path/"stick").exists()


def test_a_stick_without_this_python_says_which_it_has(tmp_path):
    "Catches pip's `No matching distribution found` for thirty students, of whom ten have another Python."
    (tmp_path/"wheels").mkdir()
    (tmp_path/"wheels/torch-2.13.0-cp39-cp39-win_arm.whl").touch()
    shutil.copy(ROOT/".ci/stick/install.py", tmp_path)
    result = run(sys.executable, tmp_path/"install.py", tmp_path/"course")
    assert result.returncode and "torch-2.13.0-cp39-cp39-win_arm.whl" in result.stderr and not (tmp_path/"course").exists()


@pytest.mark.heavy
def test_install_and_a_lesson_without_a_network(tmp_path):
    """Catches a wheel that is missing on the stick, data that is fetched, and a lesson that asks the network.

    Fills the stick from the network first, 0.4 GB; some four minutes."""
    filled = run(sys.executable, ROOT/".ci/stick.py", tmp_path/"stick")
    assert filled.returncode == 0, filled.stderr[-3000:]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "EO_DDPM", "PYTHONPATH", "XDG_"))}
    for name in ("http_proxy", "https_proxy", "all_proxy"): env |= {name: CLOSED, name.upper(): CLOSED}
    env |= {name: str(tmp_path) for name in ("HOME", "USERPROFILE", "EO_DDPM_CACHE")} | {"OMP_NUM_THREADS": "1"}
    python = getattr(sys, "_base_executable", sys.executable)  # not the one that has everything already
    installed = run(python, tmp_path/"stick/install.py", tmp_path/"course", env=env)
    assert installed.returncode == 0 and "ready for the course" in installed.stdout, installed.stdout+installed.stderr
    programs = tmp_path/"course/.venv"/("Scripts" if os.name == "nt" else "bin")
    lesson = run(programs/"papermill", "-k", "python3", "02_forward.ipynb", tmp_path/"out.ipynb", env=env,
                 cwd=tmp_path/"course/nbs")
    assert lesson.returncode == 0, lesson.stderr[-3000:]
    cells = json.loads((tmp_path/"out.ipynb").read_text(encoding="utf-8"))["cells"]
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
