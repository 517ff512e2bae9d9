"""Runs under fire: killed at every line, stopped twice, checkpoints spoilt bit by bit, disks full.

Whatever happens to a run: resumed, it must end as the run that nobody disturbed, to the last bit."""
import itertools
import json
import math
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
from eo_ddpm.runs import fingerprint, is_whole, latest_checkpoint, list_checkpoints, read_epochs, read_metrics
from eo_ddpm.store import read_seal
from eo_ddpm.training import TrainConfig, fit, held_loss, load_run

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
NET = dict(dim=8, dim_mults=[1], patch=2, attention=["none"])
CONFIG = TrainConfig(model=NET, T=50, size=8, batch_size=4, epochs=3, steps_per_epoch=4, lr=1e-3, warmup=2,
                     precision="float32", seed=1)
PIXELS = torch.randint(256, (6, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HELD = PIXELS.flip(0)
FILES = ("ema.safetensors", "model.safetensors", "optimizer.safetensors", "seal.json")

# A process that has everything imported reads one task a line, and trains in a child that may be killed. `setup` is Python
# that runs in the child before `fit`; `fault` is a number it may use.
NURSERY = """
import itertools, json, math, os, resource, shutil, signal, sys, time, traceback
import torch
import torch._dynamo  # the optimizer would import it in each child: a second
from eo_ddpm import runs, store, training

def paint(model, schedule, epoch):
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(epoch))
    with torch.no_grad(): return (20*model(x, torch.full((5,), 3))).clamp(-1, 1)

def at_call(owner, name, n, act):
    "Before the n-th call of a function, act."
    original, calls = getattr(owner, name), itertools.count(1)
    def call(*args, **kwargs):
        if next(calls) == n: act()
        return original(*args, **kwargs)
    setattr(owner, name, call)

def at_change(act):
    "Before and after each change of the disk, act; its number is given, and what will change."
    numbers, busy = itertools.count(1), []
    def event(what):
        if busy: return
        busy.append(1)
        try: act(next(numbers), what)
        finally: busy.clear()
    def hook(name, args):
        if name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"): event(name+" "+str(args[0]))
        if name == "open" and args[2] & (os.O_WRONLY | os.O_RDWR): event("open "+str(args[0]))
    sync, save = os.fsync, training.save_file
    def fsync(file): event("fsync"); sync(file)
    def save_file(values, path):
        event("save_file")
        save(values, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole)//2])
        event("half of save_file")
        path.write_bytes(whole)
    os.fsync, training.save_file = fsync, save_file
    sys.addaudithook(hook)

def die(): os.kill(os.getpid(), signal.SIGKILL)

def train(task):
    torch.set_num_threads(1)
    config = training.TrainConfig(**task["config"])
    pixels = torch.randint(256, (6, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = dict(on_epoch=paint, resume=True, held=pixels.flip(0), save_every=0.) | task["options"]
    names = globals() | dict(folder=task["folder"], fault=task["fault"], options=options)
    exec(task["setup"], names)
    training.fit(config, pixels, task["folder"], device="cpu", progress=False, **options)

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(task["log"]+name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        code = 1
        try: train(task); code = 0
        except KeyboardInterrupt: code = 130
        except SystemExit as e: code = e.code
        except BaseException:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))  # room for the last words
            traceback.print_exc()
        sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    "Starts runs without importing torch for each; what the last one said is in `out` and `err`."
    def __init__(self, folder):
        self.log, self.child = str(folder/"said."), None
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})

    def start(self, folder, setup="", fault=0, config=CONFIG, **options):
        "Begin; returns the child's process id."
        if self.child: os.kill(self.child, signal.SIGKILL); self.end()  # of a test that failed
        for name in ("out", "err"): open(self.log+name, "w").close()
        task = dict(folder=str(folder), setup=setup, fault=fault, config=vars(config), options=options, log=self.log)
        self.process.stdin.write(json.dumps(task)+"\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())
        return self.child

    def end(self):
        "How it ended: exit code, or minus the signal."
        self.child, code = None, os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
        self.out, self.err = (open(self.log+name, encoding="utf-8").read() for name in ("out", "err"))
        return code

    def run(self, *args, **kwargs):
        self.start(*args, **kwargs)
        return self.end()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


def numbers(checkpoint): return {f"{p.stem}.{k}": v for p in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(p).items()}


def content(folder):
    "All that a run leaves, but for the time it took."
    newest = latest_checkpoint(folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder)]
    pictures = {p.name: p.read_bytes() for p in sorted((folder/"samples").glob("*"))}
    return numbers(newest), dict(name=newest.name, rows=str(rows), epochs=str(read_epochs(folder)), note=read_seal(newest), pictures=pictures)


def assert_same(folder, expected):
    "Bit for bit."
    found = content(folder)
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys() and not [k for k in expected[0] if not torch.equal(found[0][k], expected[0][k])]


def snapshot(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def whole(folder): return [f.name for f in list_checkpoints(folder) if is_whole(f)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, nursery):
    "The run that nobody disturbs: 12 steps, a checkpoint after each."
    folder = tmp_path_factory.mktemp("runs")/"calm"
    assert nursery.run(folder.with_name("warm")) == 0, nursery.err
    start = time.perf_counter()
    assert nursery.run(folder) == 0, nursery.err
    nursery.seconds = time.perf_counter()-start
    assert whole(folder)[-2:] == ["step_0000011", "step_0000012"] and len(read_epochs(folder)) == 3
    assert sorted(p.name for p in (folder/"samples").iterdir()) == [f"epoch_00{i}.png" for i in (1, 2, 3)]
    assert len({p.read_bytes() for p in (folder/"samples").iterdir()}) == 3
    return folder


@pytest.fixture(scope="module")
def expected(calm): return content(calm)


SHORT = replace(CONFIG, epochs=2, steps_per_epoch=3)

@pytest.fixture(scope="module")
def short(tmp_path_factory, nursery):
    "Six steps, undisturbed; with the number of changes to the disk."
    folder = tmp_path_factory.mktemp("runs")/"short"
    count = folder.with_name("count")
    assert nursery.run(folder, f"at_change(lambda n, what: open({str(count)!r}, 'a').write(what+chr(10)))", config=SHORT) == 0, nursery.err
    return content(folder), count.read_text(encoding="utf-8").splitlines()


# --- killed at any moment ---

@unix
@pytest.mark.parametrize("kills,keep,save_every", [
    (6, 2, 0.), *(pytest.param(15, keep, every, marks=pytest.mark.heavy) for keep in (1, 2, 3) for every in (0., .05, 600.))])
def test_killed_at_any_moment(nursery, calm, expected, tmp_path, kills, keep, save_every):
    """Catches state that a checkpoint forgets, a half-written one that is trusted, steps twice or missing in the log, pictures
    or epochs lost between a checkpoint and its log, a lock or an `unfinished` folder that stops the next start."""
    rng, struck, steps = random.Random(kills*keep), 0, set()
    for number in itertools.count():
        folder = tmp_path/str(number)
        while True:
            had = whole(folder)
            child = nursery.start(folder, keep=keep, save_every=save_every)
            time.sleep(rng.uniform(0, 1.1*nursery.seconds))
            try: os.kill(child, signal.SIGKILL)
            except ProcessLookupError: pass
            code = nursery.end()
            assert code in (0, -signal.SIGKILL), nursery.err
            assert not had or whole(folder)[-1:] >= had[-1:], "work was lost that had been saved"
            assert len(whole(folder)) == len(list_checkpoints(folder)), "a name was given to an unfinished checkpoint"
            struck += code != 0
            if whole(folder): steps.add(whole(folder)[-1])
            if code == 0: break
        assert_same(folder, expected)
        if struck >= kills: break
    assert len(steps) > 2, "no kill came after a checkpoint: this test tests nothing"


# --- killed at a given change of the disk ---

def kill_at(nursery, folder, n, expected):
    "SIGKILL before the n-th change to the disk; then to the end."
    code = nursery.run(folder, "at_change(lambda n, what: die() if n == fault else None)", n, SHORT)
    assert code in (0, -signal.SIGKILL), nursery.err
    assert len(whole(folder)) == len(list_checkpoints(folder)), "a name was given to an unfinished checkpoint"
    assert nursery.run(folder, config=SHORT) == 0, nursery.err
    assert_same(folder, expected)


@unix
def test_killed_at_each_kind_of_change(nursery, short, tmp_path):
    "Catches a name given before the bytes, an old checkpoint removed before the new one stands, a table half written."
    expected, changes = short
    last = lambda *words: max(n for n, what in enumerate(changes, 1) if all(word in what for word in words))
    for n in (last("half of save_file"), last("open", "seal.json"), last("rename", "unfinished")-2, last("rename", "unfinished"),
              last("remove ema"), last("rename", "epochs.csv"), 3): kill_at(nursery, tmp_path/str(n), n, expected)


@unix
@pytest.mark.heavy
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_change(nursery, short, tmp_path, part):
    "The same at every single one."
    for n in range(1+part, len(short[1])+2, 4):
        kill_at(nursery, tmp_path/"run", n, short[0])
        shutil.rmtree(tmp_path/"run")


WATCHMAN = """
had = []
def act(n, what):
    from pathlib import Path
    found = [f.name for f in training.list_checkpoints(folder) if training.is_whole(f)]
    if had and not found: open(fault, "a").write(f"{n}: {what}" + chr(10))
    had.extend(found)
at_change(act)
"""

@unix
@pytest.mark.parametrize("keep", [1, 2])
def test_never_without_a_whole_checkpoint(nursery, calm, expected, tmp_path, keep):
    "Looks before each change to the disk. Catches an old checkpoint that goes before the new one stands."
    assert nursery.run(tmp_path/"run", WATCHMAN, str(tmp_path/"bare"), keep=keep) == 0, nursery.err
    assert not (tmp_path/"bare").exists(), (tmp_path/"bare").read_text(encoding="utf-8")
    assert_same(tmp_path/"run", expected)


@unix
@pytest.mark.parametrize("before,keep,spoilt", [(1, 1, [12]), (2, 1, [4, 12]), (2, 2, [12]), (2, 2, [8, 12])])
def test_damaged_checkpoints_are_not_among_those_that_stay(nursery, tmp_path, before, keep, spoilt):
    """The best is step 4, the newest are damaged; resumed, killed before step 11. Catches a damaged one that counts as one of
    the newest or as the best: what is saved after the resume would go at once in its favour, and a second kill costs it all."""
    folder, worse = tmp_path/"run", "held = itertools.count(1)\ntraining.held_loss = lambda *args: next(held)/10\n"
    assert nursery.run(folder, worse, keep=before, save_every=600.) == 0, nursery.err
    for step in spoilt: (folder/f"checkpoints/step_{step:07d}/ema.safetensors").write_bytes(b"")
    begun = int(whole(folder)[-1][5:])
    code = nursery.run(folder, f"{worse}at_call(training, 'train_step', {11-begun}, die)\n"+WATCHMAN, str(tmp_path/"bare"), keep=keep)
    assert code == -signal.SIGKILL and whole(folder)[-1:] == ["step_0000010"]
    assert not (tmp_path/"bare").exists(), (tmp_path/"bare").read_text(encoding="utf-8")


@unix
def test_no_remains(nursery, tmp_path):
    "Catches a checkpoint half removed that stays for ever, after a kill at the very end."
    code = nursery.run(tmp_path/"run", "rmtree = shutil.rmtree\ndef act(folder, **kwargs):\n"
                       "    if os.path.isdir(folder) and str(folder).endswith('removed') and os.path.isdir(str(folder)+'/../step_0000012'): die()\n"
                       "    rmtree(folder, **kwargs)\nshutil.rmtree = act")
    assert code == -signal.SIGKILL
    assert nursery.run(tmp_path/"run") == 0, nursery.err
    assert sorted(p.name for p in (tmp_path/"run/checkpoints").iterdir()) == ["step_0000011", "step_0000012"]


@unix
def test_killed_while_a_picture_is_written(nursery, expected, tmp_path):
    "Catches half a picture that passes for a whole one after the resume."
    code = nursery.run(tmp_path/"run", """
import matplotlib.pyplot as plt
original = plt.imsave
def half(path, page):
    original(path, page)
    if "epoch_002" not in str(path): return
    os.truncate(path, os.path.getsize(path)//2)
    die()
plt.imsave = half
""")
    assert code == -signal.SIGKILL
    assert nursery.run(tmp_path/"run") == 0, nursery.err
    assert_same(tmp_path/"run", expected)


# --- damaged checkpoints ---

def change(path, how):
    "One way in which a file goes bad."
    raw = path.read_bytes()
    if how == "empty": path.write_bytes(b"")
    if how == "half": path.write_bytes(raw[:len(raw)//2])
    if how == "last byte": path.write_bytes(raw[:-1])
    if how == "longer": path.write_bytes(raw+b"\0")
    if how == "zeros": path.write_bytes(bytes(len(raw)))
    if how in ("first bit", "bit", "last bit"):
        place = dict([("first bit", 0), ("bit", len(raw)//2), ("last bit", len(raw)-1)])[how]
        path.write_bytes(raw[:place]+bytes([raw[place] ^ 1])+raw[place+1:])
    if how in ("gone", "folder"): path.unlink()
    if how == "folder": path.mkdir()


HOW = ("empty", "half", "last byte", "longer", "zeros", "first bit", "bit", "last bit", "gone", "folder")

@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_seen_and_named(calm, tmp_path, capsys, name, how):
    "Catches damage that is loaded, a silent fallback, a run that gives up though an older checkpoint is whole."
    folder = shutil.copytree(calm, tmp_path/"run")
    newest, before = list_checkpoints(folder)[:-3:-1]
    if name == "seal.json" and how in ("longer", "bit"): pytest.skip("see the tests of the seal")
    change(newest/name, how)
    assert latest_checkpoint(folder) == before
    assert str(newest/name) in capsys.readouterr().err
    model = load_run(folder)[0]
    ema = load_file(before/"ema.safetensors")
    assert all(torch.equal(v, ema[k]) for k, v in model.state_dict().items())
    assert str(newest/name) in capsys.readouterr().err


SEALS = {"list": [], "text": "seal", "number": 1, "null": None, "empty": {}, "hashes are a list": dict(sha256=[]),
         "hashes are null": dict(sha256=None), "hashes are text": dict(sha256="0"*64), "no file": dict(sha256={}, step=12),
         "a hash is a number": dict(sha256={"ema.safetensors": 1}), "no hash": dict(step=12, skipped=0, scaler={}),
         "another file": dict(sha256={"../../config.json": "0"*64})}

def reseal(checkpoint, **changes):
    note = json.loads((checkpoint/"seal.json").read_text(encoding="utf-8"))
    (checkpoint/"seal.json").write_text(json.dumps({k: v for k, v in (note | changes).items() if v != "gone"}), encoding="utf-8")


@unix
@pytest.mark.parametrize("shape", [*SEALS, "no step", "no scaler", "no skipped", "other step", "one file less", "a line of zeros"])
def test_a_seal_of_another_shape(nursery, calm, expected, tmp_path, shape):
    "Catches KeyError, AttributeError or TypeError from a seal that is JSON but no seal, and trust in one that seals nothing."
    folder = shutil.copytree(calm, tmp_path/"run")
    newest, before = list_checkpoints(folder)[:-3:-1]
    if shape in SEALS: (newest/"seal.json").write_text(json.dumps(SEALS[shape]), encoding="utf-8")
    elif shape.startswith("no "): reseal(newest, **{shape[3:]: "gone"})
    elif shape == "other step": reseal(newest, step=10)
    elif shape == "one file less":
        hashes = json.loads((newest/"seal.json").read_text(encoding="utf-8"))["sha256"]
        reseal(newest, sha256={k: hashes[k] for k in ("ema.safetensors", "model.safetensors")})
        (newest/"optimizer.safetensors").unlink()
    else: (newest/"seal.json").write_bytes(bytes(800))
    assert nursery.run(folder) == 0, nursery.err[-1000:]
    assert str(newest) in nursery.err
    assert_same(folder, expected)


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.heavy)])
def test_every_byte_of_the_seal(calm, tmp_path, bits):
    "Catches a number in the seal (step, skipped, the scaler's factor) that one flipped bit turns into another, unseen."
    checkpoint, rng = shutil.copytree(list_checkpoints(calm)[-1], tmp_path/"step_0000012"), random.Random(0)
    raw, note, unseen = (checkpoint/"seal.json").read_bytes(), read_seal(checkpoint), []
    for place, bit in itertools.product(range(len(raw)), range(bits)):
        if bits == 1: bit = rng.randrange(6)
        (checkpoint/"seal.json").write_bytes(raw[:place]+bytes([raw[place] ^ 1 << bit])+raw[place+1:])
        try: found = read_seal(checkpoint)
        except ValueError: continue
        except Exception as e: unseen.append(f"{type(e).__name__} at {place}: {raw[max(0, place-12):place+12]}")
        else:
            differ = {k: v for k, v in found.items() if k != "config" and v != note.get(k)}
            if differ or found.keys() != note.keys(): unseen.append(str(differ or found.keys() ^ note.keys()))
    assert not unseen, f"{len(unseen)} of {bits*len(raw)}: {unseen[:10]}"


@unix
@pytest.mark.parametrize("how", ["empty folder", *(f"{how} {name}" for name, how in zip(FILES, ("bit", "half", "gone", "empty"))),
                                 *(pytest.param(f"{how} {name}", marks=pytest.mark.heavy) for name in FILES for how in HOW)])
def test_resumed_from_the_one_before(nursery, calm, expected, tmp_path, how):
    "Catches a fallback that leaves the log, the epochs or the pictures of the steps that are done again, or a name that is taken."
    folder = shutil.copytree(calm, tmp_path/"run")
    newest = list_checkpoints(folder)[-1]
    if how == "empty folder":
        shutil.rmtree(newest)
        newest.mkdir()
    elif how in ("longer seal.json", "bit seal.json"): pytest.skip("see the tests of the seal")
    else: change(newest/how.split()[-1], how.rpartition(" ")[0])
    assert nursery.run(folder) == 0, nursery.err
    assert str(newest) in nursery.err
    assert_same(folder, expected)
    assert len(whole(folder)) == len(list_checkpoints(folder))


@unix
def test_all_damaged_nothing_is_touched(nursery, calm, tmp_path):
    "Catches a run that begins afresh in silence over the remains of the old one, or removes what a repair could save."
    folder = shutil.copytree(calm, tmp_path/"run")
    for checkpoint, name in zip(list_checkpoints(folder), FILES): change(checkpoint/name, "half")
    before = snapshot(folder)
    assert nursery.run(folder) == 1 and "ValueError" in nursery.err and "checkpoints is whole" in nursery.err
    after = snapshot(folder)
    differ = {name for name in before | after if before.get(name) != after.get(name)}-{"config.json", ".lock"}
    assert not differ
    for best in (False, True):
        with pytest.raises(ValueError, match="none of . checkpoints is whole"): load_run(folder, best=best)


@unix
def test_the_best_is_damaged(nursery, tmp_path, capsys):
    "Catches load_run(best=True) that gives up, or takes the newest where a better one is whole."
    setup = "held = iter([.3, .1, .2, .5])\ntraining.held_loss = lambda *args: next(held)"
    folder, config = tmp_path/"run", replace(CONFIG, epochs=4, steps_per_epoch=2)
    assert nursery.run(folder, setup, config=config, keep=4, save_every=600.) == 0, nursery.err
    assert [f.name for f in list_checkpoints(folder)] == [f"step_000000{n}" for n in (2, 4, 6, 8)]
    for n, damaged in ((4, None), (6, 4), (2, 6), (8, 2)):
        if damaged: change(folder/f"checkpoints/step_000000{damaged}/ema.safetensors", "bit")
        ema = load_file(folder/f"checkpoints/step_000000{n}/ema.safetensors")
        assert all(torch.equal(v, ema[k]) for k, v in load_run(folder, best=True)[0].state_dict().items())
        assert (f"step_000000{damaged}" in capsys.readouterr().err) == bool(damaged)


@unix
@pytest.mark.parametrize("name", ["step_0000008 (copy)", "step_best", "step_0000008.zip"])
def test_a_strangers_folder_among_the_checkpoints(nursery, calm, tmp_path, name):
    "Catches ValueError: invalid literal for int, hours into a run, because somebody copied a checkpoint to be safe."
    folder = shutil.copytree(calm, tmp_path/"run")
    newest = list_checkpoints(folder)[-1]
    if name.endswith("zip"): (folder/"checkpoints"/name).write_bytes(b"PK")
    else: shutil.copytree(newest, folder/"checkpoints"/name)
    change(newest/"ema.safetensors", "half")
    assert nursery.run(folder) == 0, nursery.err[-500:]
    assert (folder/"checkpoints"/name).exists() and is_whole(newest)


# --- asked to stop ---

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
PLACES = {"train_step": "at_call(training, 'train_step', 6, stop)", "average": "at_call(training, 'update_ema', 6, stop)",
          "log": "at_call(training.Log, 'add', 6, stop)", "save_file": "at_call(training, 'save_file', 16, stop)",
          "seal": "at_call(store, 'sha256', 19, stop)", "prune": "at_call(runs, 'remove_folder', 4, stop)",
          "epoch": "at_call(training.Log, 'add_epoch', 2, stop)", "held_loss": "at_call(training, 'held_loss', 2, stop)",
          "confirm": "at_call(training.Log, 'confirm', 6, stop)", "picture": "at_call(training, 'save_grid', 2, stop)",
          "on_epoch": "paint_ = paint\ndef act(*args):\n    if args[2] == 2: stop()\n    return paint_(*args)\noptions['on_epoch'] = act"}

@unix
@pytest.mark.parametrize("place", [p if p in ("train_step", "seal", "on_epoch") else pytest.param(p, marks=pytest.mark.heavy) for p in PLACES])
@pytest.mark.parametrize("save_every", [0., 600.], ids=["each", "epochs"])
@pytest.mark.parametrize("number,code", SIGNALS, ids=["term", "int"])
def test_stopped_at_a_given_line(nursery, calm, expected, tmp_path, number, code, place, save_every):
    "Catches half a step in a checkpoint, a step that is lost, a stop that is swallowed or leaves no word, the wrong exit code."
    folder = tmp_path/"run"
    found = nursery.run(folder, f"def stop(): signal.raise_signal({number})\n{PLACES[place]}", save_every=save_every)
    if found == 0 and save_every: pytest.skip("not often enough")
    assert found == code, nursery.err
    rows, newest = read_metrics(folder), whole(folder)[-1]
    assert f"stopped; {newest} is saved, resume=True goes on" in nursery.out
    assert int(newest[5:]) == rows[-1]["step"] and sorted(p.name for p in (folder/"checkpoints").glob("unfinished")) == []
    assert nursery.run(folder, save_every=save_every) == 0, nursery.err
    assert_same(folder, expected)


@unix
@pytest.mark.parametrize("number,code", SIGNALS, ids=["term", "int"])
def test_stopped_before_the_first_step(nursery, expected, tmp_path, number, code):
    "Catches a checkpoint of nothing (no moments yet) that cannot be read again."
    assert nursery.run(tmp_path/"run", f"at_call(training, 'take_step', 1, lambda: signal.raise_signal({number}))") == code, nursery.err
    assert nursery.run(tmp_path/"run") == 0, nursery.err
    assert_same(tmp_path/"run", expected)
    assert nursery.run(tmp_path/"other", "def act(job, progress):\n    raise KeyboardInterrupt\ntraining.train_epochs = act") == 130
    assert whole(tmp_path/"other") == ["step_0000000"]
    assert nursery.run(tmp_path/"other") == 0, nursery.err
    assert_same(tmp_path/"other", expected)


@unix
@pytest.mark.parametrize("save_every", [0., 600.], ids=["each", "epochs"])
@pytest.mark.parametrize("tries,gaps", [(3, [None]), (3, [0, .003]), *(
    pytest.param(25, gaps, marks=pytest.mark.heavy) for gaps in ([None], [0], [.001], [.003], [.01], [.03], [.001]*5))], ids=str)
def test_stopped_at_any_moment(nursery, calm, expected, tmp_path, tries, gaps, save_every):
    "One signal or several in quick succession. Catches a second Ctrl-C that falls between the first one and the saving."
    rng, seen = random.Random(tries+len(gaps)), set()
    for attempt in range(tries):
        folder = tmp_path/str(attempt)
        child = nursery.start(folder, save_every=save_every)
        while not (folder/"metrics.csv").exists() or not read_metrics(folder): time.sleep(.002)
        time.sleep(rng.uniform(0, .4*nursery.seconds))
        for gap in [0, *(gap for gap in gaps if gap is not None)]:
            time.sleep(gap)
            try: os.kill(child, rng.choice([signal.SIGTERM, signal.SIGINT]))
            except ProcessLookupError: pass
        code = nursery.end()
        assert code in (0, 130, 143, -signal.SIGINT, -signal.SIGTERM), f"{code} {nursery.err}"  # the last two: after `fit`
        seen.add(code)
        steps = read_metrics(folder)[-1]["step"]
        assert whole(folder)[-1:] == [f"step_{steps:07d}"], f"{steps} steps were done, {nursery.out} {nursery.err}"
        assert nursery.run(folder, save_every=save_every) == 0, nursery.err
        assert_same(folder, expected)
    assert seen-{0}


@unix
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.heavy) for part in range(1, 8))])
def test_a_second_signal_at_every_line(nursery, tmp_path, part, first):
    """The first falls into step 6, the second comes N lines of Python later: as a launcher sends SIGTERM to a worker to which the
    terminal has sent SIGINT already. Catches the moment in which the handlers are back but the saving has not begun."""
    setup = f"""
def again():
    count = itertools.count(1)
    def trace(frame, event, arg):
        if event == "line" and next(count) == fault: sys.settrace(None); signal.raise_signal(signal.SIGTERM)
        return trace if sys.gettrace() else None
    original = signal.raise_signal
    def first(number):
        if number == {int(first)}:
            signal.raise_signal, frame = original, sys._getframe()
            while frame: frame.f_trace, frame = trace, frame.f_back
            sys.settrace(trace)
        original(number)
    signal.raise_signal = first
    os.kill(os.getpid(), {int(first)})
at_call(training, 'train_step', 6, again)
"""
    lost = []
    for n in range(1+part, 160, 40 if part == 0 else 8):
        folder = tmp_path/str(n)
        code = nursery.run(folder, setup, n, save_every=600.)
        assert code in (130, 143), nursery.err
        if whole(folder)[-1:] != ["step_0000006"]: lost.append((n, nursery.err[-300:]))
    assert not lost, f"steps lost at {[n for n, _ in lost]}"


# --- a full disk ---

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 4 MB; a checkpoint takes 0.4."
    disk = tmp_path/"disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    made = shutil.which("mount") and subprocess.run(command, capture_output=True, text=True)
    if not made or made.returncode: pytest.skip(f"only root may mount a small disk: {made and made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


LIE = "usage = shutil.disk_usage\nshutil.disk_usage = lambda folder: usage(folder)._replace(free=10**9)\n"
FILL = """
def fill(left):
    "A file takes all room but some KB."
    free = os.statvfs(folder).f_bavail*os.statvfs(folder).f_bsize
    with open(folder+"/../filler", "wb") as f: f.write(bytes(max(0, free-1024*left)))
at_call(training, 'train_step', 7, lambda: fill(fault))
"""

def blame(error): return [line for line in error.splitlines() if "Error" in line][-1]


@unix
@pytest.mark.parametrize("lie", ["", LIE], ids=["honest", "lying"])
@pytest.mark.parametrize("left", [0, 500, *(pytest.param(n, marks=pytest.mark.heavy) for n in range(4, 1400, 44))])
@pytest.mark.parametrize("save_every", [0., 600.], ids=["each", "epochs"])
def test_a_disk_that_fills_up(nursery, expected, small_disk, left, lie, save_every):
    """At step 7 only LEFT KB are free; with a lie, writers notice it themselves. Catches older checkpoints lost, remains that fill the
    disk further, an error that does not say which folder, a run that cannot go on after room is made."""
    folder = small_disk/"run"
    code = nursery.run(folder, FILL+lie, left, save_every=save_every)
    if code:
        assert code == 1 and "OSError" in blame(nursery.err), nursery.err
        assert str(folder) in blame(nursery.err), f"does not say where: {blame(nursery.err)}"
    assert whole(folder) == [f.name for f in list_checkpoints(folder)] and whole(folder)
    assert not [p.name for p in (folder/"checkpoints").iterdir() if not p.name.startswith("step_")]
    (small_disk/"filler").unlink()
    assert nursery.run(folder, save_every=save_every) == 0, nursery.err
    assert_same(folder, expected)


@unix
@pytest.mark.parametrize("name", ["metrics.csv", "epochs.csv", "samples", "tensorboard", "config.json"])
def test_a_table_that_cannot_be_written(nursery, expected, tmp_path, name):
    "Catches an error without the name of a file, and a table that is destroyed. The disk is full for one kind of file only."
    setup = f"""
import builtins, errno
from pathlib import Path
def full(): raise OSError(errno.ENOSPC, "No space left on device")
class Full:
    def __init__(self, file): self.file = file
    def __getattr__(self, what): return getattr(self.file, what)
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()
    def write(self, text):
        self.file.write(text[:len(text)//2]); self.file.flush()
        full()
original, count = builtins.open, itertools.count(1)
def act(path, *args, **kwargs):
    file = original(path, *args, **kwargs)
    return Full(file) if str(path).endswith("{name}.tmp") and next(count) == 3 else file
if "{name}" == "samples": at_call(training, 'save_grid', 2, full)
elif "{name}" == "tensorboard": at_call(runs.SummaryWriter, 'add_scalar', 20, full)
elif "{name}" == "config.json": at_call(store.os, 'replace', 1, full)
elif "{name}" == "metrics.csv":
    make = training.Log.__init__
    def init(self, *args):
        make(self, *args)
        self.writer.writer.writerow, real = None, self.writer.writer
    at_call(training.Log, 'add', 6, full)
else: builtins.open = act
"""
    folder = tmp_path/"run"
    assert nursery.run(folder, setup) == 1, nursery.err
    if name != "config.json":
        assert len(whole(folder)) == len(list_checkpoints(folder)) >= 1
    assert nursery.run(folder) == 0, nursery.err
    assert_same(folder, expected)


@unix
def test_no_room_for_a_line_of_the_log(nursery, expected, tmp_path):
    "The file may not grow any more, in the middle of a line. Catches an error that names no file, and the line's first half read as a line."
    limit = "at_call(training.Log, 'add', 6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (fault, -1)))"
    folder = tmp_path/"run"
    assert nursery.run(tmp_path/"try", "at_call(training, 'train_step', 6, die)", save_every=600.) == -signal.SIGKILL
    size = (tmp_path/"try/metrics.csv").stat().st_size
    for more in (0, 20, 60):
        folder = tmp_path/str(more)
        assert nursery.run(folder, limit, size+more, save_every=600.) == 1, nursery.err
        assert "OSError" in blame(nursery.err) and str(folder) in blame(nursery.err), blame(nursery.err)
        assert len(read_metrics(folder)) in (5, 6) and whole(folder) == ["step_0000004"]
        assert nursery.run(folder, save_every=600.) == 0, nursery.err
        assert_same(folder, expected)


# --- another run's folder ---

OTHERS = {"one bit": (lambda p: torch.where(torch.arange(p.numel()).view(p.shape) == 1234, p ^ 1, p), "6 x 3 x 12 x 10 uint8 "),
          "order": (lambda p: p[[1, 0, 2, 3, 4, 5]], "6 x 3 x 12 x 10 uint8 "), "one less": (lambda p: p[:-1], "5 x 3 x 12 x 10 uint8 "),
          "uint16": (lambda p: p.to(torch.int32).to(torch.uint16), "6 x 3 x 12 x 10 uint16 "),
          "shape": (lambda p: p.view(6, 3, 10, 12), "6 x 3 x 10 x 12 uint8 "),
          "subset": (lambda p: Subset(p, [0, 1, 2, 3, 5, 4]), "6 x 3 x 12 x 10 uint8 "),
          "subset twice": (lambda p: Subset(p, [0, 1, 2, 3, 4, 4]), "6 x 3 x 12 x 10 uint8 "),
          "smaller subset": (lambda p: Subset(p, torch.arange(5)), "5 x 3 x 12 x 10 uint8 ")}

def refused(run, config, pixels, text, held=HELD):
    before = snapshot(run)
    with pytest.raises(ValueError, match=text) as error:
        fit(config, pixels, run, device="cpu", resume=True, progress=False, held=held)
    assert str(run) in str(error.value) and snapshot(run) == before
    return str(error.value)


@pytest.mark.parametrize("what", OTHERS)
def test_other_data_is_refused(calm, tmp_path, what):
    "Catches a run that goes on with other patches, which no curve would show, or changes the folder before it refuses."
    change, new = OTHERS[what]
    said = refused(shutil.copytree(calm, tmp_path/"run"), CONFIG, change(PIXELS), "data was 6 x 3 x 12 x 10 uint8 [0-9a-f]{16}, is "+new)
    assert said.count(" was ") == 1


@pytest.mark.parametrize("held, now", [(PIXELS, "6 x 3 x 12 x 10 uint8 [0-9a-f]{16}"), (None, "None")])
def test_other_held_out_patches_are_refused(calm, tmp_path, held, now):
    "Catches an exam that changes in the middle: the best checkpoint would be the one with the easier questions."
    refused(shutil.copytree(calm, tmp_path/"run"), CONFIG, PIXELS, "held was 6 x 3 x 12 x 10 uint8 [0-9a-f]{16}, is "+now, held)


@unix
@pytest.mark.parametrize("same", ["tensor", "subset", "turned", "indices as a list", "channels last"])
def test_the_same_data_goes_on(calm, tmp_path, same):
    "Catches a fingerprint of the container instead of what is in it."
    folder, back = shutil.copytree(calm, tmp_path/"run"), torch.tensor([5, 4, 3, 2, 1, 0])
    pixels = {"tensor": PIXELS.clone(), "subset": Subset(torch.cat([PIXELS[:1], PIXELS]), torch.arange(1, 7)), "turned": Subset(PIXELS.flip(0), back),
              "indices as a list": Subset(PIXELS, list(range(6))), "channels last": PIXELS.to(memory_format=torch.channels_last)}[same]
    fit(CONFIG, pixels, folder, device="cpu", resume=True, progress=False, held=HELD)
    assert fingerprint(pixels) == fingerprint(PIXELS)


CHANGES = [(dict(model=NET | dict(dim=16)), "model was .*'dim': 8.* is .*'dim': 16"), (dict(model=NET | dict(attention=["full"])), r"\['none'\].*\['full'\]"),
           (dict(model=NET | dict(dim_mults=[2])), r"\[1\].*\[2\]"), (dict(model=NET | dict(patch=1)), "'patch': 2.*'patch': 1"),
           (dict(seed=2, ema=.5), "ema was 0.998, is 0.5.*seed was 1, is 2"), (dict(epochs=4), "epochs was 3, is 4"), (dict(T=51), "T was 50, is 51"),
           (dict(objective="noise"), "objective was v, is noise"), (dict(precision="bfloat16"), "precision was float32, is bfloat16")]

@pytest.mark.parametrize("change,text", CHANGES, ids=str)
def test_another_config_is_refused(calm, tmp_path, change, text):
    "Catches weights of another network, or a run whose record says something else than it did; names all that differs, no more."
    said = refused(shutil.copytree(calm, tmp_path/"run"), replace(CONFIG, **change), PIXELS, text)
    assert said.count(" was ") == len(change)


def test_config_and_data_differ(calm, tmp_path):
    "Catches a message that stops at the first difference."
    refused(shutil.copytree(calm, tmp_path/"run"), replace(CONFIG, lr=.5), PIXELS[1:], "lr was 0.001, is 0.5.*data was 6 .*is 5 ")


@pytest.mark.parametrize("gone", ["fingerprints", "input_scale", "pieces"])
def test_a_run_of_an_older_version_is_refused(calm, tmp_path, gone):
    "Catches a KeyError, or a run that goes on with a setting it never had: runs outlive the package that made them."
    run = shutil.copytree(calm, tmp_path/"run")
    info = json.loads((run/"config.json").read_text(encoding="utf-8"))
    (info if gone in info else info["config"]).pop(gone)
    (run/"config.json").write_text(json.dumps(info), encoding="utf-8")
    refused(run, CONFIG, PIXELS, f"another version of the course .no {gone}.: choose another folder")


# --- two programs ---

@unix
def test_two_programs_in_one_folder(nursery, calm, expected, tmp_path):
    "Catches a second start that writes into the first one's folder, and a lock that outlives a kill."
    folder, second = tmp_path/"run", Nursery(tmp_path)
    try:
        child = nursery.start(folder, "at_call(training, 'train_step', 6, lambda: time.sleep(60))")
        while not (folder/"metrics.csv").exists() or len(read_metrics(folder)) < 5 or whole(folder)[-1:] != ["step_0000005"]: time.sleep(.01)
        time.sleep(.3)  # it falls asleep
        before = snapshot(folder)
        for resume in (True, False):
            assert second.run(folder, resume=resume) == 1
            assert "RuntimeError" in blame(second.err) and str(folder) in blame(second.err) and "another program" in blame(second.err)
        assert snapshot(folder) == before
        os.kill(child, signal.SIGKILL)
        start = time.perf_counter()
        assert nursery.end() == -signal.SIGKILL
        assert second.run(folder) == 0, second.err
        assert time.perf_counter()-start < 30
        assert_same(folder, expected)
    finally:
        second.process.stdin.close()
        second.process.wait(10)


@unix
@pytest.mark.heavy
def test_both_start_at_once(nursery, calm, expected, tmp_path):
    "Catches a race for the folder: one of them must get it, the other an error or, later, a finished run."
    second = Nursery(tmp_path)
    second.run(tmp_path/"warm")
    try:
        for attempt in range(4):
            folder = tmp_path/str(attempt)
            for it in (nursery, second): it.start(folder)
            codes = [it.end() for it in (nursery, second)]
            assert 0 in codes and set(codes) <= {0, 1}
            assert all("another program" in it.err for it, code in zip((nursery, second), codes) if code)
            assert_same(folder, expected)
    finally:
        second.process.stdin.close()
        second.process.wait(10)


# --- the newest and the best ---

def plant(monkeypatch, values):
    planted = iter(values)
    monkeypatch.setattr(training, "held_loss", lambda *args: next(planted))


@pytest.mark.parametrize("keep,save_every,values,stay", [
    (1, 600., [.2, .3, .4, .5], [4, 16]), (2, 0., [.5, .2, .4, .3], [8, 15, 16]), (1, 0., [.5, .4, .3, .2], [16]),
    *(pytest.param(*values, marks=pytest.mark.heavy) for values in (
        (1, 600., [.5, .4, .3, .2], [16]), (2, 600., [.2, .3, .4, .5], [4, 12, 16]), (2, 600., [.5, .2, .4, .3], [8, 12, 16]),
        (3, 600., [.5, .2, .4, .3], [8, 12, 16]), (1, 0., [.2, .3, .4, .5], [4, 16]), (2, 0., [.3, .3, .3, .3], [4, 15, 16]),
        (2, 600., [math.inf, .3, .4, .5], [8, 12, 16])))], ids=str)
def test_which_checkpoints_stay(tmp_path, monkeypatch, keep, save_every, values, stay):
    "Catches a best that is pruned, a stop in the middle of an epoch taken for the best, old best ones that pile up."
    plant(monkeypatch, values)
    fit(replace(CONFIG, epochs=4), PIXELS, tmp_path, device="cpu", progress=False, held=HELD, keep=keep, save_every=save_every)
    assert [int(f.name[5:]) for f in list_checkpoints(tmp_path)] == stay
    best = min(range(4), key=lambda i: values[i])
    ema = load_file(tmp_path/f"checkpoints/step_{4*best+4:07d}/ema.safetensors")
    assert all(torch.equal(v, ema[k]) for k, v in load_run(tmp_path, best=True)[0].state_dict().items())


def test_the_best_stays_through_stops(tmp_path, monkeypatch):
    "Catches a best that is forgotten at the resume: epochs.csv must be read again, and a stop inside an epoch has no score."
    plant(monkeypatch, [.5, .1, .4, .3, .2])
    config = replace(CONFIG, epochs=5)
    for epoch in (1, 2, 3, 4):
        def stop(model, schedule, e):
            if e == epoch: raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            fit(config, PIXELS, tmp_path, stop, device="cpu", progress=False, held=HELD, keep=1, save_every=0., resume=True)
        assert list_checkpoints(tmp_path)[-1].name == f"step_{4*epoch:07d}"
        if epoch == 2: monkeypatch.setattr(training, "held_loss", lambda *args: .1+.01*len(read_epochs(tmp_path)))
    fit(config, PIXELS, tmp_path, device="cpu", progress=False, held=HELD, keep=1, save_every=0., resume=True)
    assert latest_checkpoint(tmp_path, best=True).name in ("step_0000004", "step_0000008")
    assert read_epochs(tmp_path)[int(latest_checkpoint(tmp_path, best=True).name[5:])//4-1]["held_loss"] == min(row["held_loss"] for row in read_epochs(tmp_path))


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_at_least_one(tmp_path, keep):
    "Catches keep=0 taken for `all` in silence, and a negative number that removes the newest."
    with pytest.raises(ValueError, match="keep"): fit(CONFIG, PIXELS, tmp_path, device="cpu", progress=False, keep=keep)


# --- held-out patches ---

def test_the_exam_does_not_disturb_the_run(tmp_path):
    "Catches an exam that draws from the run's randomness, leaves gradients or the wrong mode behind."
    for name, held in (("with", HELD), ("without", None), ("other", Subset(PIXELS, [3, 1]))):
        torch.manual_seed(len(name))
        fit(CONFIG, PIXELS, tmp_path/name, device="cpu", progress=False, held=held)
    found = [numbers(latest_checkpoint(tmp_path/name)) for name in ("with", "without", "other")]
    assert all(torch.equal(v, other[k]) for other in found[1:] for k, v in found[0].items())
    assert [row["loss"] for row in read_metrics(tmp_path/"with")] == [row["loss"] for row in read_metrics(tmp_path/"without")]


class Constant(torch.nn.Linear):
    "Answers one number."
    def forward(self, xt, timesteps): return self.weight[0, 0].expand(xt.shape)


@pytest.mark.parametrize("objective", ["v", "noise", "x0"])
def test_held_loss_of_a_constant_network(objective):
    "By hand, on patches that are all 255 (x0 = 1). Catches a mean over the wrong axis, questions that are not spread over all noise steps."
    white, schedule = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8), training.get_schedule("cosine", 50)
    net, c = Constant(1, 1), .25
    torch.nn.init.constant_(net.weight, c)
    a = schedule.alphas_cumprod[torch.linspace(0, 49, 64).long()].double()
    mean = {"noise": 1+c*c, "x0": (1-c)**2, "v": (a+((1-a).sqrt()+c)**2).mean().item()}[objective]
    config = replace(CONFIG, size=64, objective=objective)
    found = [held_loss(net, white, config, schedule, "float32") for _ in range(2)]
    assert found[0] == found[1] == pytest.approx(mean, rel=.02)
    torch.nn.init.constant_(net.weight, c+.5)
    assert held_loss(net, white, config, schedule, "float32") != found[0]


# --- tables ---

def test_a_last_line_cut_anywhere(calm, tmp_path):
    "Somebody plots while a line is being written. Catches an error, and half a number read as a number: 1.2 instead of 1.234e-05."
    folder = shutil.copytree(calm, tmp_path/"run")
    for name, read in (("metrics.csv", read_metrics), ("epochs.csv", read_epochs)):
        raw, rows = (folder/name).read_bytes(), read(folder)
        last, wrong = raw[:-1].rindex(b"\n")+1, []
        for cut in range(last, len(raw)):
            (folder/name).write_bytes(raw[:cut])
            try: found = read(folder)
            except Exception as e: wrong.append(f"{type(e).__name__}: {e} after {raw[last:cut]}")
            else:
                if found not in (rows, rows[:-1]): wrong.append(f"{found[-1]} from {raw[last:cut]}")
        (folder/name).write_bytes(raw)
        assert read(folder) == rows and not wrong, f"{name}: {len(wrong)} of {len(raw)-last}: {wrong[0]} ... {wrong[-1]}"


def test_tables_that_are_missing(nursery, calm, expected, tmp_path):
    "Catches a run that cannot be read or resumed because epochs.csv, metrics.csv or TensorBoard's files were removed."
    folder = shutil.copytree(calm, tmp_path/"run")
    (folder/"epochs.csv").unlink()
    assert read_epochs(folder) == [] and load_run(folder, best=True) and latest_checkpoint(folder).name == "step_0000012"
    shutil.rmtree(folder/"tensorboard")
    (folder/"metrics.csv").unlink()
    with pytest.raises(FileNotFoundError, match="metrics.csv: not there"): read_metrics(folder)
    assert nursery.run(folder) == 0, nursery.err
    found = content(folder)
    assert all(torch.equal(v, found[0][k]) for k, v in expected[0].items())


# --- bad steps ---

@unix
@pytest.mark.parametrize("save_every", [0., 600.], ids=["each", "epochs"])
def test_bad_steps_are_counted_through_kills(nursery, tmp_path, save_every):
    "Catches a count that is lost or doubled: steps done again after a kill must not be counted twice."
    plan = """
from dataclasses import replace
original, advance = training.diffusion_loss, training.advance
now = []
def remember(state, *args): now[:] = [state.step]; return advance(state, *args)
def loss(model, *args):
    bad = now and now[0] in (2, 3, 6, 9, 10) and model.training
    return original(model, *args)*(math.nan if bad else 1)
training.advance, training.diffusion_loss = remember, loss
"""
    assert nursery.run(tmp_path/"calm", plan, save_every=save_every) == 0, nursery.err
    assert read_seal(latest_checkpoint(tmp_path/"calm"))["skipped"] == 5
    for n in (3, 4, 5, 3, 2): assert nursery.run(tmp_path/"run", f"{plan}at_call(training, 'train_step', {n}, die)", save_every=save_every) in (0, -9)
    assert nursery.run(tmp_path/"run", plan, save_every=save_every) == 0, nursery.err
    assert_same(tmp_path/"run", content(tmp_path/"calm"))
