"""Several processes, two on a CPU, started as `accelerate launch` starts them for GPUs: by torch's launcher."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from eo_ddpm.runs import is_whole, latest_checkpoint, list_checkpoints, read_epochs, read_metrics

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and signals to other processes")
pytestmark = pytest.mark.slow

SCRIPT = """
import sys, torch
from eo_ddpm import training
torch.set_num_threads(1)
folder, stop_at, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = training.TrainConfig(model=dict(dim=8, dim_mults=[1], patch=2, attention=["none"]), T=50, size=8, batch_size=batch_size,
                              epochs=3, steps_per_epoch=0, lr=1e-3, warmup=2, precision="float32", seed=1)
pixels = torch.arange(16, dtype=torch.uint8).view(-1, 1, 1, 1).expand(16, 3, 8, 8).contiguous()  # a patch's value is its number
rank, original = int(__import__("os").environ.get("RANK", 0)), training.train_step

def record(model, optimizer, x0, *args):
    mine = x0[args[7]][:, 0, 0, 0]  # this process's share of the batch
    with open(f"{folder}-seen-{rank}", "a") as f: f.write("".join(f"{round((v.item()+1)*255/2)}\\n" for v in mine))
    return original(model, optimizer, x0, *args)

training.train_step = record
def stop(model, schedule, epoch):
    with open(f"{folder}-painted-{rank}", "a") as f: f.write("x")
    if epoch == stop_at: raise KeyboardInterrupt
training.fit(config, pixels, folder, stop, device="cpu", resume=True, progress=False, held=pixels)
"""


def launch(tmp_path, name, processes, stop_at=0, batch_size=4):
    "Run the script; returns the finished process."
    script = tmp_path/"train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script)]
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1",
                   "--master_port", str(port), str(script)]
    return subprocess.run([*command, str(tmp_path/name), str(stop_at), str(batch_size)], capture_output=True, text=True, timeout=150,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(folder): return [row["loss"] for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "One process, not interrupted."
    tmp_path = tmp_path_factory.mktemp("processes")
    done = launch(tmp_path, "alone", 1)
    assert done.returncode == 0, done.stderr
    return tmp_path/"alone"


@pytest.mark.slow
def test_two_processes_are_one(alone, tmp_path):
    "Catches gradients that are summed, noise that differs from one process to two, patches seen twice, two writers."
    done = launch(tmp_path, "two", 2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path/"two") == pytest.approx(losses(alone), rel=1e-5) and len(losses(alone)) == 12
    assert [row["held_loss"] for row in read_epochs(tmp_path/"two")] == pytest.approx([row["held_loss"] for row in read_epochs(alone)], rel=1e-5)
    seen = [(tmp_path/f"two-seen-{rank}").read_text().split() for rank in (0, 1)]
    for epoch in range(3):
        shares = [set(numbers[8*epoch:8*epoch+8]) for numbers in seen]
        assert shares[0].isdisjoint(shares[1]) and shares[0] | shares[1] == {str(n) for n in range(16)}
    assert not (tmp_path/"two-painted-1").exists() and len(list((tmp_path/"two/tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_resume_with_another_number_of_processes(alone, tmp_path):
    "Catches a checkpoint that belongs to a number of processes: one, then two."
    launch(tmp_path, "run", 1, stop_at=1)
    assert [f.name for f in list_checkpoints(tmp_path/"run")] == ["step_0000004"]
    done = launch(tmp_path, "run", 2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path/"run") == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared(tmp_path):
    "Catches patches that are dropped in silence, or a process that waits for ever."
    done = launch(tmp_path, "odd", 2, batch_size=5)
    assert done.returncode != 0 and "batch_size = 5: expected a multiple of 2 processes" in done.stderr


# --- a team in trouble ---

TEAM = """
import itertools, json, math, os, signal, sys, time
import torch
from eo_ddpm import store, training
torch.set_num_threads(1)
folder, config, setup, options = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
rank = int(os.environ.get("RANK", 0))
with open(f"{folder}-pid-{rank}", "w") as f: f.write(str(os.getpid()))
config = training.TrainConfig(**dict(model=dict(dim=8, dim_mults=[1], patch=2, attention=["none"]), T=50, size=8, batch_size=4, epochs=3,
                                     steps_per_epoch=4, lr=1e-3, warmup=2, precision="float32", seed=1) | config)
pixels = torch.randint(256, (16, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def at_call(owner, name, n, act):
    "Before the n-th call of a function, act."
    original, calls = getattr(owner, name), itertools.count(1)
    def call(*args, **kwargs):
        if next(calls) == n: act()
        return original(*args, **kwargs)
    setattr(owner, name, call)

def note(what):
    with open(f"{folder}-{what}-{rank}", "a") as f: f.write("x")

def paint(model, schedule, epoch): note("painted"); return torch.full((5, 3, 8, 8), epoch/10)
options = dict(resume=True, save_every=0., on_epoch=paint, watch=lambda losses: note("watched")) | options
exec(setup)
training.fit(config, pixels, folder, device="cpu", progress=False, held=pixels.flip(0), **options)
"""


class Team:
    "One or more processes at work on a run folder."
    def __init__(self, tmp_path, name="run", processes=2, setup="", launcher="torch.distributed.run", config={}, **options):
        script = tmp_path/"team.py"
        script.write_text(TEAM, encoding="utf-8")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        head = {"torch.distributed.run": ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", port],
                "accelerate.commands.launch": ["--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
                                               "--dynamo_backend", "no", "--main_process_port", port]}[launcher]
        self.folder, self.files = tmp_path/name, [open(tmp_path/f"{name}.{end}", "w+") for end in ("out", "err")]
        for old in tmp_path.glob(f"{name}-pid-*"): old.unlink()
        self.process = subprocess.Popen([sys.executable, *(["-m", launcher, *head] if processes > 1 or launcher[0] == "a" else []), str(script),
                                         str(self.folder), json.dumps(config), setup, json.dumps(options)], stdout=self.files[0], stderr=self.files[1],
                                        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})

    def pid(self, rank): return int(self.folder.with_name(f"{self.folder.name}-pid-{rank}").read_text())

    def until(self, ready, seconds=60):
        "Wait until something has happened."
        end = time.monotonic()+seconds
        while not ready():
            assert time.monotonic() < end and self.process.poll() is None, f"{self.process.poll()} {self.said()[1][-2000:]}"
            time.sleep(.02)
        return self

    def steps(self, n): return self.until(lambda: (self.folder/"metrics.csv").exists() and len(read_metrics(self.folder)) >= n)

    def said(self): return [open(f.name, encoding="utf-8").read() for f in self.files]

    def end(self, seconds=120):
        "The launcher's exit code, and no worker is left."
        start = time.monotonic()
        try: self.process.wait(seconds)
        except subprocess.TimeoutExpired: pytest.fail(f"still there after {seconds} s: {self.said()}")
        finally: self.clear()
        self.seconds = time.monotonic()-start
        return self.process.returncode

    def clear(self):
        if self.process.poll() is None: self.process.kill()
        self.left = []
        for rank, path in enumerate(sorted(self.folder.parent.glob(f"{self.folder.name}-pid-*"))):
            try: os.kill(int(path.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError): continue
            self.left.append(rank)
        self.process.wait()
        for f in self.files: f.close()


def well(team):
    assert team.end() == 0, team.said()
    return team


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    "Twelve steps of one process, not interrupted."
    return well(Team(tmp_path_factory.mktemp("team"), processes=1)).folder


def assert_curve(folder, whole_run):
    rows, expected = read_metrics(folder), read_metrics(whole_run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for name in ("loss", "grad_norm", "lr"): assert [r[name] for r in rows] == pytest.approx([r[name] for r in expected], rel=1e-5), name
    assert [r["held_loss"] for r in read_epochs(folder)] == pytest.approx([r["held_loss"] for r in read_epochs(whole_run)], rel=1e-5)
    ours, theirs = (load_file(latest_checkpoint(f)/"ema.safetensors") for f in (folder, whole_run))
    for k in ours: torch.testing.assert_close(ours[k], theirs[k], rtol=1e-3, atol=1e-5)
    assert is_whole(list_checkpoints(folder)[-1]) and latest_checkpoint(folder).name == "step_0000012"
    assert not [p.name for p in (folder/"checkpoints").iterdir() if not p.name.startswith("step_")]


@unix
@pytest.mark.heavy
@pytest.mark.parametrize("processes,pieces,launcher", [(1, 2, "torch.distributed.run"), (2, 1, "torch.distributed.run"), (2, 2, "torch.distributed.run"),
                                                       (4, 1, "torch.distributed.run"), (1, 1, "accelerate.commands.launch")])
def test_pieces_and_processes_change_nothing(whole_run, tmp_path, processes, pieces, launcher):
    "Catches gradients averaged twice or summed, a pieces-th of them lost to no_sync, a launcher's environment that is not understood."
    config = dict(batch_size=4, pieces=pieces)
    team = well(Team(tmp_path, processes=processes, launcher=launcher, config=config))
    assert_curve(team.folder, whole_run)
    assert (tmp_path/"run-painted-0").exists() and (tmp_path/"run-watched-0").exists()
    assert not [p.name for p in tmp_path.iterdir() if re.match("run-(painted|watched)-[1-9]", p.name)]
    assert len(list((team.folder/"tensorboard").iterdir())) == 1


@unix
@pytest.mark.heavy
def test_one_two_one(whole_run, tmp_path):
    "A run that moves: 1 process, killed, then 2, asked to stop, then 1. Catches a checkpoint that belongs to a number of processes."
    team = Team(tmp_path, processes=1, setup="at_call(training, 'train_step', 4, lambda: os.kill(os.getpid(), 9))")
    assert team.end() == -signal.SIGKILL and latest_checkpoint(team.folder).name == "step_0000003"
    team = Team(tmp_path, setup="at_call(training, 'train_step', 4, lambda: rank == 1 and signal.raise_signal(signal.SIGINT))")
    assert team.end() != 0 and latest_checkpoint(team.folder).name == "step_0000007"
    assert_curve(well(Team(tmp_path, processes=1)).folder, whole_run)


SLOW = "at = training.train_step\ndef act(*args, **kwargs): time.sleep(.1); return at(*args, **kwargs)\ntraining.train_step = act\n"

@unix
@pytest.mark.heavy
@pytest.mark.parametrize("save_every", [0., 600.], ids=["each", "epochs"])
@pytest.mark.parametrize("to", ["launcher", "both", "rank 0", "rank 1", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_team_is_asked_to_stop(whole_run, tmp_path, number, to, save_every):
    "Catches processes that wait for ever for one that has gone, different steps in two processes, work that is lost, a launcher that never ends."
    team = Team(tmp_path, setup=SLOW, save_every=save_every).steps(6)
    pids = {"launcher": [team.process.pid], "both": [team.pid(0), team.pid(1)], "rank 0": [team.pid(0)], "rank 1": [team.pid(1)],
            "terminal": [team.process.pid, team.pid(0), team.pid(1)]}[to]
    for pid in pids: os.kill(pid, number)
    assert team.end(60) != 0 and not team.left
    steps = len(read_metrics(team.folder))
    assert steps < 12 and is_whole(list_checkpoints(team.folder)[-1])
    assert latest_checkpoint(team.folder).name == f"step_{steps:07d}", team.said()
    assert "stopped; " in team.said()[0] and team.said()[0].count("is saved, resume=True goes on") == 1
    assert_curve(well(Team(tmp_path)).folder, whole_run)


@unix
@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("to", ["launcher", "rank 0"])
def test_a_team_is_stopped_while_it_paints(whole_run, tmp_path, number, to):
    "The first process paints for 10 s, the others wait for its gradients. Catches a stop that is lost, a worker that never wakes."
    setup = "def act(model, schedule, epoch):\n    note('painting'); time.sleep(10 if epoch == 2 else 0)\noptions['on_epoch'] = act"
    team = Team(tmp_path, setup=setup, save_every=600.)
    team.until(lambda: (tmp_path/"run-painting-0").exists() and len((tmp_path/"run-painting-0").read_text()) == 2)
    os.kill(team.process.pid if to == "launcher" else team.pid(0), number)
    assert team.end(60) != 0 and not team.left
    assert latest_checkpoint(team.folder).name == f"step_{len(read_metrics(team.folder)):07d}" and len(read_metrics(team.folder)) in (8, 9)
    assert_curve(well(Team(tmp_path)).folder, whole_run)


@unix
@pytest.mark.heavy
def test_saving_takes_longer_than_a_launcher_waits(whole_run, tmp_path):
    """Torch's launcher kills what is left 30 s after the first worker has ended. Catches workers that leave while the first one
    still saves a large checkpoint (40 s here)."""
    setup = SLOW+"""
stopped = training.stopped
def act(job):
    save = training.save_file
    def slow(*args): time.sleep(14); save(*args)
    training.save_file = slow
    stopped(job)
training.stopped = act
"""
    team = Team(tmp_path, setup=setup, save_every=600.).steps(6)
    for rank in (0, 1): os.kill(team.pid(rank), signal.SIGINT)
    assert team.end(100) != 0
    assert latest_checkpoint(team.folder).name == f"step_{len(read_metrics(team.folder)):07d}", team.said()


@unix
@pytest.mark.heavy
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("n", [1, 6])
def test_a_worker_is_killed(whole_run, tmp_path, rank, n):
    "Catches processes that wait for ever for one that is dead, a damaged checkpoint, a lock that stays."
    team = Team(tmp_path, setup=f"at_call(training, 'train_step', {n}, lambda: rank == {rank} and os.kill(os.getpid(), 9))")
    assert team.end(90) != 0 and not team.left
    assert all(map(is_whole, list_checkpoints(team.folder)))
    assert_curve(well(Team(tmp_path)).folder, whole_run)


@unix
@pytest.mark.heavy
def test_the_launcher_is_killed(whole_run, tmp_path):
    "Catches a second start into a folder in which orphaned workers still write."
    team = Team(tmp_path, setup=SLOW).steps(5)
    team.process.kill()
    team.process.wait()
    again = Team(tmp_path/"..", name=f"{tmp_path.name}/run")
    code = again.end()
    assert code == 0 or "another program is training" in again.said()[1]
    team.clear()
    assert_curve(well(Team(tmp_path)).folder, whole_run)


FAULTS = {"another config": (dict(config=dict(lr=.5)), "lr was 0.001, is 0.5"), "no resume": (dict(resume=False), "pass resume=True"),
          "disk full": (dict(setup="def full(): raise OSError(28, 'No space left on device')\nat_call(training, 'save_file', 2, full)"), "No space left"),
          "on_epoch": (dict(setup="def act(*args): raise RuntimeError('no paint')\noptions['on_epoch'] = act"), "no paint"),
          "nan": (dict(setup="loss = training.diffusion_loss\ntraining.diffusion_loss = lambda *args: loss(*args)*math.nan"), "bad ones in a row"),
          "nan at one": (dict(setup="loss = training.diffusion_loss\ntraining.diffusion_loss = lambda *args: loss(*args)*(math.nan if rank else 1)"),
                         "bad ones in a row"),
          "all damaged": (dict(), "checkpoints is whole"), "odd batch": (dict(config=dict(batch_size=5)), "multiple of 2 processes"),
          "odd pieces": (dict(config=dict(pieces=4)), "multiple of 2 processes x 4 pieces")}

@unix
@pytest.mark.heavy
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_process_fails(whole_run, tmp_path, fault):
    "Catches a team that hangs because only one of it knows, and a message that is buried: the others wait, the first has gone."
    changes, text = FAULTS[fault]
    if fault in ("another config", "no resume", "all damaged"): shutil.copytree(whole_run, tmp_path/"run")
    if fault == "all damaged":
        for folder in list_checkpoints(tmp_path/"run"): (folder/"ema.safetensors").write_bytes(b"")
    team = Team(tmp_path, **changes)
    assert team.end(60) != 0 and not team.left
    assert text in team.said()[1]
    assert team.seconds < 45


@unix
@pytest.mark.heavy
def test_two_teams_in_one_folder(whole_run, tmp_path):
    "Catches a second team that writes too, or hangs because only its first process was refused."
    team = Team(tmp_path, setup=SLOW+"at_call(training, 'train_step', 8, lambda: time.sleep(30))").steps(5)
    second = Team(tmp_path/"..", name=f"{tmp_path.name}/run")
    assert second.end(60) != 0 and "another program is training into this folder" in second.said()[1]
    assert_curve(well(team).folder, whole_run)
