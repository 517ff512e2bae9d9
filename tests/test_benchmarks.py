"""The benchmarks measure what they say."""
import argparse
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parents[1]/"benchmarks"
SETTING = argparse.Namespace(device="cuda" if torch.cuda.is_available() else "cpu", dim=8, size=16, batch=16,
                             precision="float32", levers=True, tutorial=False,
                             pixels=torch.arange(16*3*16*16).reshape(16, 3, 16, 16).to(torch.uint8))


@pytest.fixture
def peers(lucidrains, monkeypatch):
    "benchmarks/peers.py; afterwards Accelerate forgets its precision, which holds for a whole process."
    from accelerate.state import AcceleratorState
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield pytest.importorskip("peers")
    AcceleratorState._reset_state(reset_partial_state=True)


def batch(low):
    "What `peers.batches` hands out, again and again."
    return (low+(1-low)*SETTING.pixels/255).to(SETTING.device)


def take(build, steps, **options):
    "The weights after some steps of a peer as the benchmark runs it."
    torch.manual_seed(0)
    step, network = build(SETTING, **options)
    torch.manual_seed(1)
    for _ in range(steps): step()
    return network.state_dict()


def assert_same(found, expected):
    "bfloat16 on the same machine is as repeatable as float32: the same sums in the same order."
    for name, weights in expected.items(): torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_first_peer_is_the_library_s_own_trainer(peers, lucidrains, monkeypatch, tmp_path, precision):
    "Would catch a step that does less or more than Trainer.train: no clipping, another optimizer, autocast elsewhere."
    monkeypatch.setattr(lucidrains, "Dataset", lambda *args, **kwargs: [0]*100)  # its own reads image files
    torch.manual_seed(0)
    network = lucidrains.Unet(8, dim_mults=(1, 2, 4))
    start = {name: weights.clone() for name, weights in network.state_dict().items()}
    diffusion = lucidrains.GaussianDiffusion(network, image_size=16, timesteps=500, beta_schedule="cosine", objective="pred_noise")
    trainer = lucidrains.Trainer(diffusion, "", train_num_steps=12, amp=precision != "no", mixed_precision_type=precision,
                                 calculate_fid=False, results_folder=tmp_path)
    trainer.dl = itertools.repeat(batch(0))
    torch.manual_seed(1)
    trainer.train()
    assert not torch.equal(start["final_conv.weight"], network.state_dict()["final_conv.weight"].cpu())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert_same(take(peers.lucidrains_step, 12, dtype=dtype), network.state_dict())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_second_peer_is_the_tutorial_s_loop(peers, precision):
    "Would catch another order of work or another place of autocast than Accelerate's, in the tutorial's lines."
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    accelerator = Accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    network = UNet2DModel(sample_size=16, block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=8,
                          down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                          up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
    scheduler, optimizer = DDPMScheduler(num_train_timesteps=500), torch.optim.AdamW(network.parameters(), lr=1e-4)
    model, optimizer, rates = accelerator.prepare(network, optimizer, get_cosine_schedule_with_warmup(optimizer, 500, 62_909))
    torch.manual_seed(1)
    for _ in range(3):
        clean = batch(-1)
        noise = torch.randn(clean.shape).to(clean.device)
        timesteps = torch.randint(0, 500, (len(clean),), device=clean.device).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(noisy, timesteps, return_dict=False)[0], noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert_same(take(peers.diffusers_step, 3, dtype=dtype), network.state_dict())


def test_a_lever_changes_the_speed_alone(peers):
    "Would catch a lever that trains something else, as attention without its memory or an average of other weights."
    train = pytest.importorskip("train")
    def losses(lever):
        step, network = train.ours(SETTING, **lever)
        return [float(step()) for _ in range(3)]  # float: a lever may have read the loss already
    expected = losses({})
    for name in train.LEVERS.keys()-{"bfloat16", "torch.compile", "memory given back (CPU)"}:
        assert losses(train.LEVERS[name]) == pytest.approx(expected, rel=1e-4), name


def test_every_contestant_is_in_the_table(lucidrains):
    "Would catch a contestant that is left out or a column that is no number."
    options = "--device cpu --dim 8 --size 16 --batch 2 --cache 8 --rounds 1".split()
    run = subprocess.run([sys.executable, BENCHMARKS/"train.py", *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].removesuffix(" (auto)") for row in rows[1:]]
    assert names == ["eo_ddpm, bfloat16", "eo_ddpm, float32", "denoising-diffusion-pytorch, as shipped",
                     "denoising-diffusion-pytorch, tuned", "Diffusers, as shipped", "Diffusers, tuned"]
    assert sum(row[0].endswith(" (auto)") for row in rows) == 1
    for row in rows[1:]:
        assert len(row) == len(rows[0])
        for column, cell in zip(rows[0][1:], row[1:]):
            value = float(cell.split()[0].rstrip("%"))
            assert 0 < value < math.inf, f"{row[0]}, {column}: {cell}"
