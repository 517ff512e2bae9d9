"""Several processes, two on a CPU, started as `accelerate launch` starts them for GPUs: by torch's launcher."""
import os
import socket
import subprocess
import sys

import pytest

from eo_ddpm.training import list_checkpoints, read_epochs, read_metrics

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
