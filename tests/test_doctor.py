"""The doctor of machines: each look finds the fault that is planted for it, and says what to do."""
import builtins
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eo_ddpm import doctor
from eo_ddpm.doctor import (Check, check_cache, check_kernel, check_machine, check_memory, check_packages, check_python,
                            check_sample, check_torch, check_widgets, report)


def block(monkeypatch, *names):
    "Imports of these modules fail, as where they are not installed or do not load."
    real = builtins.__import__
    def guarded(name, *args, **options):
        if name.split(".")[0] in names: raise ImportError(f"DLL load failed while importing {name}\nand more lines")
        return real(name, *args, **options)
    for name in names: monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", guarded)


def test_it_needs_nothing_but_python():
    "Catches an import at the top that breaks the doctor on the very machines that need one."
    code = "import sys; before = set(sys.modules); import eo_ddpm.doctor; print({m.split('.')[0] for m in set(sys.modules)-before})"
    run = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[1])})
    assert eval(run.stdout) <= {"eo_ddpm", *sys.stdlib_module_names}


@pytest.mark.parametrize("version, bits, level", [((3, 10, 13), 64, "problem"), ((3, 11, 0), 64, "ok"), ((3, 13, 9), 64, "ok"),
                                                  ((3, 14, 0), 64, "note"), ((3, 12, 1), 32, "problem"), ((2, 7, 18), 64, "problem")])
def test_python(version, bits, level):
    "Catches versions compared as text (3.9 > 3.11), and a 32-bit Python, for which there is no PyTorch."
    check = check_python(version, bits)
    assert check.level == level and (level == "ok") == (not check.todo)


def test_this_installation_is_whole():
    "Catches a need in settings.ini that the class set does not fulfil, and extras of developers that are asked of students."
    (check,) = check_packages()
    assert check.level == "ok", check


def test_packages_missing_and_old():
    "Catches a missing library, one that is too old, and a marker that is not for this Python or this extra."
    faults = check_packages(["numpy>=1", "torch>=99", 'easel; extra == "class"', 'brush; extra == "dev"', 'six<1; python_version<"3"'])
    assert [(f.level, f.what) for f in faults] == [("problem", "torch"), ("problem", "easel")]
    assert metadata.version("torch") in faults[0].found and 'pip install "torch>=99"' in faults[0].todo


def test_a_library_that_is_there_in_name_only(monkeypatch):
    "Catches an installation that was cut short, or a missing DLL: pip believes that all is well."
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (check,) = [check for check in check_machine() if check.what == "libraries"]
    assert check.level == "problem" and "rasterio" in check.found and check.todo


def test_colab_and_binder_bring_their_own_jupyterlab(monkeypatch):
    "Catches a doctor that sends students on Colab to install JupyterLab, and a lesson's needs that the extra forgets."
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    needs = ['easel; extra == "lessons"', 'jupyterlab>=99; extra == "class"']
    assert [fault.what for fault in check_packages(needs)] == ["easel"] and check_widgets().level == "ok"
    assert check_packages(["numpy"])[0].level == "ok"


@pytest.mark.parametrize("system, word", [("nt", "Visual C++"), ("posix", "pip install")])
def test_torch_that_does_not_load(monkeypatch, system, word):
    "Catches a DLL that is missing on Windows being reported as a traceback, or the wrong cure."
    block(monkeypatch, "torch")
    monkeypatch.setattr(doctor, "os", SimpleNamespace(name=system, environ={}))
    check = check_torch()
    assert check.level == "problem" and check.found.endswith("importing torch") and word in check.todo


def test_a_card_that_does_not_compute(monkeypatch):
    "Catches a GPU that is only looked for and never asked to compute: too old a driver, a card too new."
    def fails(*shape, device): raise RuntimeError("CUDA error: no kernel image is available\nfor this device")
    monkeypatch.setattr(torch, "ones", fails)
    check = check_torch()
    assert check.level == "problem" and "no kernel image is available" in check.found and "\n" not in check.found


def test_a_card_that_is_not_used(monkeypatch):
    "Catches the classical CPU build on a machine with a GPU; the lessons work, so it is a note."
    monkeypatch.setattr("eo_ddpm.training.best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert check_torch().level == "note"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert check_torch().level == "ok"


@pytest.mark.parametrize("free, level", [(.4, "problem"), (1.5, "note"), (2.5, "ok")])
def test_memory(free, level):
    "Catches bytes taken for gigabytes."
    assert check_memory(free).level == level


@pytest.mark.parametrize("free, level", [(1e8, "problem"), (1e9, "note"), (5e9, "ok")])
def test_a_full_disk(monkeypatch, tmp_path, free, level):
    "Catches a disk that is asked for its size instead of for what is free."
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(total=1e12, free=free))
    assert check_cache(tmp_path/"new/cache").level == level
    assert list((tmp_path/"new/cache").iterdir()) == []  # nothing is left behind


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    "Catches a look that trusts permission bits, which lie for administrators, on network drives and on full quotas."
    (tmp_path/"file").touch()
    assert check_cache(tmp_path/"file/cache").level == "problem"
    def refuses(**options): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    check = check_cache(tmp_path)
    assert check.level == "problem" and str(tmp_path) in check.found and "EO_DDPM_CACHE" in check.todo


def test_the_cache_that_is_looked_at_is_the_one_in_use(monkeypatch, tmp_path):
    "Catches a look at the default folder where another one is set."
    monkeypatch.setenv("EO_DDPM_CACHE", str(tmp_path/"mine"))
    assert str(tmp_path/"mine") in check_cache().found


def test_data_not_here_yet(monkeypatch, tmp_path):
    "Catches Python 3.12 in a room without a network: lesson 01 would stop at its first cell."
    monkeypatch.setenv("EO_DDPM_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert check_sample().level == "note" and "eo-ddpm sample" in check_sample().todo
    (tmp_path/"scene").mkdir()
    assert check_sample().level == "ok"


def test_widgets_from_another_python(monkeypatch, tmp_path):
    "Catches sliders as text: the half of ipywidgets that is missing, and the JupyterLab of another environment."
    monkeypatch.delenv("EO_DDPM_WIDGETS", raising=False)
    beside = Path(sys.executable).parent
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(beside/name))
    assert check_widgets().level == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/elsewhere/bin/{name}")
    assert "python -m jupyterlab" in check_widgets().todo
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *parts: [str(tmp_path)])
    assert "jupyterlab_widgets" in check_widgets().todo
    monkeypatch.setenv("EO_DDPM_WIDGETS", "0")
    assert check_widgets().found == "turned off"


def test_a_kernel_of_another_python(monkeypatch):
    "Catches a kernel left in the home folder by another environment: `No module named eo_ddpm` in a notebook only."
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    def python3(program): monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: SimpleNamespace(argv=[program, "-m"]))
    python3(sys.executable)
    assert check_kernel().level == "ok"
    python3("python")  # as ipykernel writes it: the Python that runs
    assert check_kernel().level == "ok"
    python3(str(Path(sys.executable).parents[1]/"other/bin/python"))
    assert check_kernel().level == "problem"
    def none(self, name): raise NoSuchKernel(name)
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    assert check_kernel().todo == "python -m pip install ipykernel"


def test_no_look_takes_the_others_with_it(monkeypatch):
    "Catches a doctor that ends in a traceback, after which nobody knows what else is wrong."
    def breaks(): raise KeyError("unheard of")
    monkeypatch.setattr(doctor, "check_packages", breaks)
    block(monkeypatch, "torch", "psutil", "jupyter_client")
    checks = check_machine()
    found = {check.what: check for check in checks}
    assert list(found) == ["Python", "libraries", "PyTorch", "memory", "cache", "data", "widgets", "kernel"]
    assert all(found[what].level == "problem" and found[what].todo for what in ("libraries", "PyTorch", "memory", "kernel"))
    assert "unheard of" in found["libraries"].found and found["cache"].level != "problem"


def test_report_counts_problems_only():
    "Catches `ready` beside a problem, and plain ASCII given up, which old Windows terminals can't print."
    ok, note, problem = Check("ok", "a", "b"), Check("note", "c", "d", "do e"), Check("problem", "f", "g", "do h")
    assert report([ok, note]).endswith("ready for the course") and report([ok, note, problem, problem]).endswith("2 to be solved first")
    assert report([note]).splitlines()[1].strip() == "-> do e" and report([ok, note, problem]).isascii()
