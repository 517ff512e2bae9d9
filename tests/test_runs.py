"""Runs that are killed, stopped, damaged or started twice: what they must end as is the run that nobody disturbed."""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset

from eo_ddpm import training
from eo_ddpm.store import read_seal
from eo_ddpm.training import (TrainConfig, fingerprint, fit, held_loss, is_whole, latest_checkpoint, list_checkpoints,
                              load_run, read_epochs, read_metrics)

NET = dict(dim=8, dim_mults=[1], patch=2, attention=["none"])
CONFIG = TrainConfig(model=NET, T=50, size=8, batch_size=4, epochs=3, steps_per_epoch=4, lr=1e-3, warmup=2,
                     precision="float32", seed=1)
PIXELS = torch.randint(256, (6, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HELD = PIXELS.flip(0)

# Imports once, then forks a child for each line it reads: "FOLDER KIND N". The child trains; KIND "-": undisturbed,
# else it kills itself at the N-th call of that function.
NURSERY = f"""
import os, shutil, signal, sys, torch
from eo_ddpm import store, training
CONFIG = training.TrainConfig(**{ {k: getattr(CONFIG, k) for k in CONFIG.__dataclass_fields__}!r})

def deadly(owner, name, n):
    original, calls = getattr(owner, name), []
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, call)

def train(folder, kind, n):
    torch.set_num_threads(1)
    if kind != "-": deadly(dict(os=os, shutil=shutil, training=training)[kind.split(".")[0]], kind.split(".")[1], int(n))
    pixels = torch.randint(256, (6, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = lambda model, schedule, epoch: torch.full((5, 3, 8, 8), epoch/10)
    training.fit(CONFIG, pixels, folder, grey, device="cpu", resume=True, progress=False, held=pixels.flip(0), save_every=0.)

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try: train(*line.split()); code = 0
        except KeyboardInterrupt: code = 130
        except SystemExit as e: code = e.code
        finally: sys.stdout.flush(); os._exit(code)
    print("child", child, flush=True)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    "Starts runs without importing torch for each."
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.said = []

    def answer(self, word):
        "The number after a word; other lines are kept, the run has said them."
        for line in self.process.stdout:
            if line.startswith(word): return int(line.split()[1])
            self.said.append(line)
        raise RuntimeError("the nursery is gone")

    def start(self, folder, kind="-", n=0):
        self.process.stdin.write(f"{folder} {kind} {n}\n")
        self.process.stdin.flush()
        return self.answer("child")

    def run(self, *args):
        "Start and wait; how it ended: exit code, or minus the signal."
        self.start(*args)
        return self.end()

    def end(self): return os.waitstatus_to_exitcode(self.answer("ended"))


@pytest.fixture(scope="module")
def nursery():
    if not hasattr(os, "fork"): pytest.skip("needs fork")
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


def content(folder):
    "All that a run leaves, but for the time it took."
    newest = latest_checkpoint(folder)
    numbers = {f"{p.stem}.{k}": v for p in newest.glob("*.safetensors") for k, v in load_file(p).items()}
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder)]
    pictures = {p.name: p.read_bytes() for p in sorted((folder/"samples").glob("*"))}
    return numbers, dict(rows=rows, epochs=read_epochs(folder), note=read_seal(newest), pictures=pictures)


def assert_same(found, expected):
    "Bit for bit."
    assert found[0].keys() == expected[0].keys()
    assert not [k for k in expected[0] if not torch.equal(found[0][k], expected[0][k])]
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, nursery):
    "The run that nobody disturbs, and how long it takes."
    folder = tmp_path_factory.mktemp("runs")/"calm"
    start = time.perf_counter()
    assert nursery.run(folder) == 0
    return folder, time.perf_counter()-start


# killed

def kill_at_random(nursery, calm, tmp_path, kills, seed):
    "SIGKILL after random times until `kills` have struck; each run that ends is compared."
    rng, expected, struck, number = random.Random(seed), content(calm[0]), 0, 0
    while struck < kills:
        folder, number = tmp_path/f"run{number}", number+1
        while True:
            had = any(map(is_whole, list_checkpoints(folder)))
            child = nursery.start(folder)
            time.sleep(rng.uniform(0, 1.2*calm[1]))
            try: os.kill(child, signal.SIGKILL)
            except ProcessLookupError: pass
            code = nursery.end()
            assert code in (0, -signal.SIGKILL)
            assert not had or any(map(is_whole, list_checkpoints(folder)))
            if code == 0: break
            struck += 1
        assert_same(content(folder), expected)


@pytest.mark.slow
def test_killed_at_random_moments(nursery, calm, tmp_path):
    "Catches a checkpoint that forgets something, a half-written one that is trusted, a log with steps twice or missing."
    kill_at_random(nursery, calm, tmp_path, 3, seed=0)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_at_random_moments_again_and_again(nursery, calm, tmp_path, seed):
    "The same, 100 times."
    kill_at_random(nursery, calm, tmp_path, 25, seed)


CALLS = ("os.replace", "os.rename", "os.fsync", "os.mkdir", "training.save_file", "shutil.rmtree")

def kill_at_call(nursery, calm, tmp_path, kind, points):
    "SIGKILL at the N-th call of one function, for some N until the run gets through; nothing may be lost before."
    expected = content(calm[0])
    for n in points:
        folder = tmp_path/f"{kind}{n}"
        code = nursery.run(folder, kind, n)
        if code == -signal.SIGKILL:
            whole = [f for f in list_checkpoints(folder) if is_whole(f)]
            assert len(whole) >= len(list_checkpoints(folder)) >= (n > 30)  # what has its name is whole
            assert nursery.run(folder) == 0
        assert_same(content(folder), expected)
        shutil.rmtree(folder)
        if code == 0: return n-1
    return n


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
def test_killed_inside_the_checkpoint_write(nursery, calm, tmp_path, kind):
    "Catches a name that is given before the bytes are there, an old checkpoint removed too early, a config half written."
    assert kill_at_call(nursery, calm, tmp_path, kind, (9,)) >= 1


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CALLS)
def test_killed_at_every_call(nursery, calm, tmp_path, kind):
    "The same at every single call."
    assert kill_at_call(nursery, calm, tmp_path, kind, itertools.count(1)) >= 12


# asked to stop

@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(nursery, calm, tmp_path, number, code):
    "Catches a run that dies at once, half a step in a checkpoint, or a stop that is ignored."
    expected, rng, seen = content(calm[0]), random.Random(3), set()
    for attempt in range(3):
        folder = tmp_path/str(attempt)
        child = nursery.start(folder)
        while not list_checkpoints(folder): time.sleep(.01)
        time.sleep(rng.uniform(0, .1))
        try: os.kill(child, number)
        except ProcessLookupError: pass
        seen.add(nursery.end())
        assert is_whole(list_checkpoints(folder)[-1])
        assert nursery.run(folder) == 0
        assert_same(content(folder), expected)
    assert code in seen <= {0, code}
    assert any("is saved, resume=True goes on" in line for line in nursery.said)


# damaged

def spoil(path, how):
    "One way in which a file goes bad."
    if how == "flipped": path.write_bytes(path.read_bytes()[:-1]+bytes([path.read_bytes()[-1] ^ 1]))
    if how == "cut": path.write_bytes(path.read_bytes()[:100])
    if how == "gone": path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "seal.json"])
def test_a_damaged_checkpoint_is_passed_over(calm, tmp_path, capfd, name, how):
    "Catches damage that is loaded, a run that gives up though an older checkpoint is whole, a silent fallback."
    folder = shutil.copytree(calm[0], tmp_path/"run")
    newest, before = list_checkpoints(folder)[-1], list_checkpoints(folder)[-2]
    spoil(newest/name, how)
    assert latest_checkpoint(folder) == before
    assert f"{newest.name}/{name}" in capfd.readouterr().err.replace(os.sep, "/")
    fit(CONFIG, PIXELS, folder, lambda model, schedule, epoch: torch.full((5, 3, 8, 8), epoch/10), device="cpu", resume=True,
        progress=False, held=HELD, save_every=0.)
    assert latest_checkpoint(folder) == newest
    rows = [[row["loss"] for row in read_metrics(f)] for f in (folder, calm[0])]
    torch.testing.assert_close(*map(torch.tensor, rows))  # this process may use other threads than the nursery's


def test_all_checkpoints_damaged(calm, tmp_path):
    "Catches a run that begins afresh in silence, over the remains of the old one."
    folder = shutil.copytree(calm[0], tmp_path/"run")
    for checkpoint in list_checkpoints(folder): spoil(checkpoint/"model.safetensors", "cut")
    with pytest.raises(ValueError, match="none of . checkpoints is whole"):
        fit(CONFIG, PIXELS, folder, device="cpu", resume=True, progress=False)
    with pytest.raises(ValueError, match="none of . checkpoints is whole"): load_run(folder)
    assert len(read_metrics(folder)) == 12


def test_disk_full(tmp_path, monkeypatch):
    "Catches an error from deep inside a writer, an older checkpoint lost, remains that fill the disk further."
    original, calls = training.save_file, []
    def full(values, path):
        calls.append(1)
        if len(calls) == 8:  # in the third checkpoint
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(values, path)
    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="step_0000012 could not be written, the checkpoints before it are whole.*No space left"):
        fit(CONFIG, PIXELS, tmp_path/"full", device="cpu", progress=False)
    assert [f.name for f in list_checkpoints(tmp_path/"full")] == ["step_0000004", "step_0000008"]
    assert all(map(is_whole, list_checkpoints(tmp_path/"full")))
    assert not (tmp_path/"full/checkpoints/unfinished").exists()
    fit(CONFIG, PIXELS, tmp_path/"full", device="cpu", progress=False, resume=True)
    fit(CONFIG, PIXELS, tmp_path/"calm", device="cpu", progress=False)
    assert str(content(tmp_path/"full")[1]) == str(content(tmp_path/"calm")[1])  # str: nan is not nan


def test_disk_too_small(tmp_path, monkeypatch):
    "Catches a checkpoint that is begun though it cannot fit."
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9-10, 10))
    with pytest.raises(OSError, match="needs [0-9,]+ bytes, only 10 are free"):
        fit(CONFIG, PIXELS, tmp_path, device="cpu", progress=False)


# other data, other config

OTHERS = {"one pixel": lambda p: torch.cat([p[:-1], p[-1:] ^ 1]), "order": lambda p: p.flip(0), "one less": lambda p: p[:-1],
          "type": lambda p: p.to(torch.int32).to(torch.uint16), "part": lambda p: Subset(p, torch.arange(5))}

@pytest.mark.parametrize("change", OTHERS)
def test_other_data(calm, tmp_path, change):
    "Catches a run that goes on with other patches: no curve would show it."
    folder = shutil.copytree(calm[0], tmp_path/"run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(ValueError, match="another run's folder .data was 6 x 3 x 12 x 10 uint8 [0-9a-f]{16}, is "):
        fit(CONFIG, OTHERS[change](PIXELS), folder, device="cpu", resume=True, progress=False)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_the_same_data_in_other_clothes():
    "Catches a fingerprint of the container: a part of a memory map holds the same patches as a copy of them."
    index = torch.tensor([5, 0, 3])
    assert fingerprint(Subset(PIXELS, index)) == fingerprint(PIXELS[index]) == fingerprint(PIXELS[index].to(memory_format=torch.channels_last))


@pytest.mark.parametrize("change, text", [(dict(lr=2e-3), "lr was 0.001, is 0.002"), (dict(pieces=2), "pieces was 1, is 2"),
                                          (dict(model=NET | dict(dim=16)), "model was {'dim': 8.*is {'dim': 16"),
                                          (dict(model=NET | dict(attention=["full"])), r"\['none'\].*\['full'\]")])
def test_another_config_or_architecture(calm, change, text):
    "Catches weights of another network, or a run whose record says something else than it did."
    with pytest.raises(ValueError, match=text):
        fit(replace(CONFIG, **change), PIXELS, calm[0], device="cpu", resume=True, progress=False)


def test_two_programs_in_one_folder(nursery, calm, tmp_path):
    "Catches a job that was started twice and writes into its own twin's folder; a lock that outlives a kill."
    child = nursery.start(tmp_path/"run")
    while not list_checkpoints(tmp_path/"run"): time.sleep(.01)
    try:
        with pytest.raises(RuntimeError, match="another program is training into this folder"):
            fit(CONFIG, PIXELS, tmp_path/"run", device="cpu", resume=True, progress=False)
    finally: os.kill(child, signal.SIGKILL); nursery.end()
    assert nursery.run(tmp_path/"run") == 0


# the best, and held-out patches

def test_the_newest_and_the_best_stay(tmp_path, monkeypatch):
    "Catches the best hour of a run pruned away, or a stop in the middle of an epoch taken for the best."
    planted = iter([.5, .2, .4, .3, .6, .7])
    monkeypatch.setattr(training, "held_loss", lambda *args: next(planted))
    fit(replace(CONFIG, epochs=6), PIXELS, tmp_path, device="cpu", progress=False, held=HELD, keep=2, save_every=0.)
    assert [f.name for f in list_checkpoints(tmp_path)] == ["step_0000008", "step_0000023", "step_0000024"]
    assert [row["held_loss"] for row in read_epochs(tmp_path)] == [.5, .2, .4, .3, .6, .7]
    assert latest_checkpoint(tmp_path, best=True).name == "step_0000008"
    best = load_file(tmp_path/"checkpoints/step_0000008/ema.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in load_run(tmp_path, best=True)[0].state_dict().items())


def test_without_held_out_patches_the_training_loss_decides(tmp_path):
    "Catches nan as the best, or no best at all."
    fit(replace(CONFIG, epochs=5), PIXELS, tmp_path, device="cpu", progress=False, keep=1)
    rows = read_epochs(tmp_path)
    best = min(rows, key=lambda row: row["loss"])
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert [row["loss"] for row in rows] == pytest.approx([sum(losses[4*i:4*i+4])/4 for i in range(5)])
    assert latest_checkpoint(tmp_path, best=True).name == f"step_{best['step']:07d}"


def test_held_loss_asks_the_same_questions(tmp_path):
    "Catches questions that change from time to time, and an exam that disturbs the run."
    state, schedule = training.new_state(CONFIG), training.get_schedule("cosine", 50)
    first, again = (held_loss(state.ema, HELD, CONFIG, schedule, "float32") for _ in range(2))
    assert first == again and held_loss(state.ema, PIXELS[:3], CONFIG, schedule, "float32") != first
    for name, held in (("with", HELD), ("without", None)):
        fit(CONFIG, PIXELS, tmp_path/name, device="cpu", progress=False, held=held)
    assert not [k for k, v in content(tmp_path/"with")[0].items() if not torch.equal(v, content(tmp_path/"without")[0][k])]


def test_held_loss_by_hand():
    "A network that always answers 0 on grey patches: v is sqrt(abar) noise, so the loss is the mean of abar."
    grey, schedule = torch.full((3, 3, 32, 32), 127, dtype=torch.uint8), training.get_schedule("cosine", 50)
    class Zero(torch.nn.Linear):
        def forward(self, xt, timesteps): return 0*xt
    expected = schedule.alphas_cumprod[torch.linspace(0, 49, 64).long()].mean().item()
    assert held_loss(Zero(1, 1), grey, replace(CONFIG, size=32), schedule, "float32") == pytest.approx(expected, rel=.02)


def test_tables_of_a_run_that_goes_on(calm, tmp_path):
    "Catches a reader that chokes on a line that is just being written, or on a folder of an older version."
    folder = shutil.copytree(calm[0], tmp_path/"run")
    with open(folder/"metrics.csv", "a", encoding="utf-8") as f: f.write("13,0.5,0.1")
    assert len(read_metrics(folder)) == 12
    (folder/"epochs.csv").unlink()
    assert read_epochs(folder) == [] and load_run(folder, best=True)[0] is not None


def test_watching(tmp_path):
    "Catches a live curve that never comes, or shows other losses than the log."
    seen = []
    fit(CONFIG, PIXELS, tmp_path, device="cpu", progress=False, watch=lambda losses: seen.append([*losses]))
    assert len(seen) >= CONFIG.epochs and seen[-1] == [row["loss"] for row in read_metrics(tmp_path)]


def test_config_says_which_data(calm):
    "Catches a result that nobody can trace: fingerprint and number of processes belong to the record."
    info = json.loads((calm[0]/"config.json").read_text(encoding="utf-8"))
    assert info["fingerprint"] == fingerprint(PIXELS) and info["processes"] == 1
    assert info["machine"]["git_commit"] is not None
