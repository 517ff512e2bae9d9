".ci/report.py, the three runs of `make report`: in order, all else equal, one failure spoils nothing, a second call goes on."
import json
import runpy
import shutil
import sys
from pathlib import Path

import papermill
import pytest
from nbclient.exceptions import DeadKernelError

from eo_ddpm.data import sample_root
from eo_ddpm.runs import read_evaluation, read_info

SCRIPT = str(Path(__file__).resolve().parents[1]/".ci"/"report.py")


def report(monkeypatch, *arguments):
    "Run the script; True if it says that all went well."
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    try: runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as e: return not e.code
    return True


@pytest.fixture
def lessons(monkeypatch):
    "papermill, faked: writes what the lessons would leave behind, notes what it was asked for, fails where `broken` says."
    asked, broken = [], set()
    def execute(source, out, parameters, **_):
        lesson = Path(source).stem[:2]
        asked.append((lesson, parameters))
        Path(out).write_text("executed", encoding="utf-8")
        if (lesson, parameters.get("schedule")) in broken:
            raise papermill.PapermillExecutionError(5, 5, "fit(...)", "ValueError", "planted", [])
        run = Path(parameters.get("run", ""))
        if lesson == "07":
            (run/"samples").mkdir()
            (run/"samples"/"final.png").write_bytes(b"")
            (run/"config.json").write_text(json.dumps(dict(config=dict(steps_per_epoch=int(parameters.get("steps_per_epoch", 321))))))
        if lesson == "08": (run/"evaluation.json").write_text("{}")
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return asked, broken


def test_the_others_get_the_steps_of_the_first(lessons, tmp_path, monkeypatch):
    "Catches a clock that gives a run on a busy machine fewer steps, and a parameter that does not arrive."
    asked, _ = lessons
    assert report(monkeypatch, tmp_path, "--profile", "quick", "-p", "data", "/data/SEN12MS")
    trained = [parameters for lesson, parameters in asked if lesson == "07"]
    assert [p["schedule"] for p in trained] == ["linear", "cosine", "sigmoid"]
    assert [p.get("steps_per_epoch") for p in trained] == [None, 321, 321]
    assert all(p["profile"] == "quick" and p["data"] == "/data/SEN12MS" and p["resume"] for p in trained)
    assert [lesson for lesson, _ in asked] == ["07", "08"]*3 + ["09"]


def test_a_failed_run_spoils_nothing_and_is_made_up_for(lessons, tmp_path, monkeypatch):
    "Catches a report that stops at the first failure, hides it, or trains again what was done."
    asked, broken = lessons
    broken.add(("07", "linear"))
    assert not report(monkeypatch, tmp_path)
    assert [lesson for lesson, _ in asked] == ["07", "07", "08", "07", "08", "09"]
    assert not (tmp_path/"linear"/"evaluation.json").exists() and (tmp_path/"sigmoid"/"evaluation.json").exists()
    asked.clear(), broken.clear()
    assert report(monkeypatch, tmp_path)
    assert [(lesson, p.get("schedule")) for lesson, p in asked] == [("07", "linear"), ("08", None), ("09", None)]
    assert asked[0][1]["steps_per_epoch"] == 321


def test_a_kernel_killed_for_memory_spoils_nothing_either(lessons, tmp_path, monkeypatch):
    "papermill lets this one through as another kind of error: catches a report that dies with it."
    asked, _ = lessons
    honest = papermill.execute_notebook
    def execute(source, out, parameters, **kwargs):
        if parameters.get("schedule") == "cosine": raise DeadKernelError("Kernel died")
        honest(source, out, parameters, **kwargs)
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    assert not report(monkeypatch, tmp_path)
    assert (tmp_path/"sigmoid"/"evaluation.json").exists() and asked[-1][0] == "09"


@pytest.mark.heavy
def test_a_tree_laid_out_as_sen12ms(tmp_path, monkeypatch):
    "All for real but tiny: a folder of SEN12MS's layout given by path. Catches lessons that only know the built-in sample."
    shutil.copytree(sample_root(), tmp_path/"SEN12MS")
    tiny = [x for pair in dict(data=tmp_path/"SEN12MS", holdout="7,8", epochs=2, steps_per_epoch=3, samples=4).items() for x in ("-p", *pair)]
    assert report(monkeypatch, tmp_path/"out", "--profile", "quick", *tiny)
    for name in ("linear", "cosine", "sigmoid"):
        assert read_info(tmp_path/"out"/name)["data"] == str((tmp_path/"SEN12MS").resolve())
        assert read_evaluation(tmp_path/"out"/name)["step"] == 6
    assert "SEN12MS" in (tmp_path/"out"/"09_compare.ipynb").read_text(encoding="utf-8")
