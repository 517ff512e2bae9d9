"""What lesson 10 says about Hugging Face Diffusers holds in the version installed: folders, schedules, strides, averages."""
import copy
import json
import socket

import pytest
import torch

from eo_ddpm.schedules import get_schedule, linear_betas
from eo_ddpm.training import update_ema

diffusers = pytest.importorskip("diffusers")
from diffusers.training_utils import EMAModel

T = 500


def small_network():
    "The lesson's network, smaller."
    return diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, add_attention=False,
                                 down_block_types=("DownBlock2D",)*2, up_block_types=("UpBlock2D",)*2).eval()


@torch.no_grad()
def paint(network, scheduler, n, calls):
    "The lesson's way back."
    scheduler.set_timesteps(calls)
    chance = torch.Generator().manual_seed(0)
    xt = torch.randn(n, 3, 8, 8, generator=chance)
    for t in scheduler.timesteps: xt = scheduler.step(network(xt, t).sample, t, xt, generator=chance).prev_sample
    return xt.clamp(-1, 1)


def test_a_pipeline_s_folder_paints_the_same(tmp_path, monkeypatch):
    "Catches weights or a setting of the scheduler that the folder loses, and a look at the net on the way."
    def no_net(*args, **kwargs): raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket.socket, "connect", no_net)
    network = small_network()
    scheduler = diffusers.DDPMScheduler(T, beta_start=.1/T, beta_end=20/T, timestep_spacing="trailing", prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert all(torch.equal(value, pipeline.unet.state_dict()[key]) for key, value in network.state_dict().items())
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {key: pipeline.scheduler.config[key] for key in settings} == settings
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(images).movedim(-1, 1)*2-1, paint(network, scheduler, 2, 20), atol=1e-4, rtol=0)


def test_the_folder_says_what_it_was_trained_with(tmp_path):
    "Catches a default that is not written down: whoever opens the folder would get another one with another version."
    diffusers.DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path)
    written = json.loads((tmp_path/"scheduler_config.json").read_text(encoding="utf-8"))
    assert {key: written[key] for key in ("num_train_timesteps", "beta_schedule", "clip_sample", "prediction_type")} == {
        "num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "prediction_type": "epsilon"}


def test_the_noisy_end():
    "The lesson's three numbers: what is left of a patch at T - 1 and the factor on the network's error."
    ours = {name: get_schedule(name, T).exact["alphas_cumprod"][-1].sqrt().item() for name in ("linear", "cosine")}
    left = lambda **options: diffusers.DDPMScheduler(T, **options).alphas_cumprod[-1].double().sqrt().item()
    assert left() == pytest.approx(.0797, abs=5e-5)  # not rescaled
    assert left(beta_start=.1/T, beta_end=20/T) == pytest.approx(ours["linear"], rel=1e-3) == pytest.approx(.0061, abs=5e-5)
    assert 1/left(beta_schedule="squaredcos_cap_v2") == pytest.approx(1/ours["cosine"], rel=1e-2) == pytest.approx(1.01e4, rel=1e-2)


def test_rescaled_line_is_ours():
    "Catches a beta_start or beta_end in the lesson that is not the course's linear schedule."
    theirs = diffusers.DDPMScheduler(T, beta_start=.1/T, beta_end=20/T).betas.double()
    torch.testing.assert_close(theirs, linear_betas(T), atol=1e-7, rtol=1e-5)


def test_only_trailing_strides_begin_at_the_end():
    "Why the lesson asks for them: with Diffusers' default the first of 100 strides begins at step 495."
    begins = {}
    for spacing in ("trailing", "leading"):
        scheduler = diffusers.DDPMScheduler(T, timestep_spacing=spacing)
        scheduler.set_timesteps(100)
        begins[spacing] = int(scheduler.timesteps[0])
    assert begins == {"trailing": T-1, "leading": 495}


def test_the_same_average_as_ours():
    "The lesson averages one network with `EMAModel`, the other with `update_ema`: catches another warm-up in either."
    torch.manual_seed(0)
    raw = torch.nn.Linear(3, 2)
    ours, theirs = copy.deepcopy(raw), EMAModel(raw.parameters())
    for step in range(30):
        with torch.no_grad():
            for p in raw.parameters(): p.add_(torch.randn_like(p))
        update_ema(ours, raw, step, .9999)
        theirs.step(raw.parameters())
    for a, b in zip(ours.parameters(), theirs.shadow_params): torch.testing.assert_close(a, b)


def test_swapped_bands_are_turned_channels():
    "The lesson does not train on swapped bands: turning the channels round commutes with noising and with the way back."
    scheduler, chance = diffusers.DDPMScheduler(T), torch.Generator().manual_seed(0)
    x0, noise = torch.rand(2, 3, 8, 8, generator=chance)*2-1, torch.randn(2, 3, 8, 8, generator=chance)
    timesteps = torch.tensor([10, 400])
    xt = scheduler.add_noise(x0, noise, timesteps)
    assert torch.equal(scheduler.add_noise(x0.flip(1), noise.flip(1), timesteps), xt.flip(1))
    scheduler.set_timesteps(T)
    back = lambda noise, xt: scheduler.step(noise, 0, xt).prev_sample  # the last step adds no noise
    assert torch.equal(back(noise.flip(1), xt.flip(1)), back(noise, xt).flip(1))
