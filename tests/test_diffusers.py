"""What lesson 10 says about Hugging Face Diffusers holds in the version installed; networks and schedules, there and back."""
import copy
import json
import os
import socket
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from eo_ddpm.interop import (PREDICTIONS, NetworkFromDiffusers, UNetForDiffusers, diffusers_sample, diffusers_scheduler, from_diffusers,
                             schedule_from_diffusers, to_diffusers)
from eo_ddpm.sampling import ddim_sample, ddpm_sample, dpm_solver_sample
from eo_ddpm.schedules import SCHEDULES, NoiseSchedule, cosine_betas, get_schedule, linear_betas, zero_terminal_snr
from eo_ddpm.training import OBJECTIVES, update_ema
from eo_ddpm.unet import UNet
from tiny import SHAPE, Tiny, close, seeded_generator
from tiny import T as SHORT

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


# their schedulers, our network

PURE = NoiseSchedule(zero_terminal_snr(cosine_betas(SHORT)), "pure")
KINDS = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
         "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "PNDMScheduler"]


TRIPLES = [(get_schedule(name, SHORT), objective) for name in SCHEDULES for objective in OBJECTIVES] + [(PURE, "x0"), (PURE, "v")]
each_case = pytest.mark.parametrize("schedule, objective", TRIPLES, ids=[f"{s.name}-{o}" for s, o in TRIPLES])


@each_case
def test_their_ddpm_is_ours(tiny, start, schedule, objective):
    "Catches another variance, a lost clip, a schedule in 32 bits that drifts, an objective under the wrong word."
    theirs = diffusers_sample(tiny, diffusers_scheduler(schedule, objective), start, SHORT, seeded_generator())
    close(theirs, ddpm_sample(tiny, schedule, start, objective, generator=seeded_generator()))


@each_case
@pytest.mark.parametrize("steps", [SHORT, 10, 1])
def test_their_ddim_is_ours(tiny, start, schedule, objective, steps):
    """Catches strides that do not begin at T-1, and noise that is not derived again from the clipped x0_pred.

    Steps that divide T: theirs goes on by T//steps, whatever step comes next."""
    theirs = diffusers_sample(tiny, diffusers_scheduler(schedule, objective, "DDIMScheduler"), start, steps)
    close(theirs, ddim_sample(tiny, schedule, start, objective, steps=steps))


@each_case
@pytest.mark.parametrize("steps", [SHORT, 7])
def test_their_dpm_solver_is_ours(tiny, start, schedule, objective, steps):
    """Catches a missing clip (under their other name for it), a last stride that is not first order.

    Where the last step is noise alone they put a little of the patch back, to be able to divide."""
    theirs = diffusers_sample(tiny, diffusers_scheduler(schedule, objective, "DPMSolverMultistepScheduler"), start, steps)
    close(theirs, dpm_solver_sample(tiny, schedule, start, objective, steps=steps), 5e-3 if schedule is PURE else 1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", ["x0", "v"])
def test_euler_is_ddim_without_a_clip(tiny, start, name, objective):
    "Catches a start that is not blown up and an input that is not shrunk, for kinds that count noise in another unit."
    schedule = get_schedule(name, SHORT)
    theirs = diffusers_sample(tiny, diffusers_scheduler(schedule, objective, "EulerDiscreteScheduler"), start, 10)
    close(theirs, ddim_sample(tiny, schedule, start, objective, clip=False, steps=10))


def knows_the_answer(x0, schedule):
    "The perfect network for a world of one patch, asked for v, between whole steps too."
    roots = schedule.exact["alphas_cumprod"].sqrt().float()
    def network(xt, timesteps):
        low = timesteps.long().clamp(max=len(roots)-1)
        signal = torch.lerp(roots[low], roots[(low+1).clamp(max=len(roots)-1)], timesteps.float()-low)[:, None, None, None]
        spread = (1-signal**2).sqrt()
        return signal*(xt - signal*x0)/spread - spread*x0
    return network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_finds_the_only_patch(start, kind, name):
    "Catches a kind that runs and paints something else: wrong betas, wrong question, wrong unit of noise, no clean end."
    schedule, x0 = get_schedule(name, T), start.clamp(-1, 1)
    found = diffusers_sample(knows_the_answer(x0, schedule), diffusers_scheduler(schedule, "v", kind), torch.randn(SHAPE), 25, seeded_generator())
    close(found, x0, .15 if kind == "DEISMultistepScheduler" else .05)  # that one stops at the noise of step 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_that_ends_in_noise_alone(tiny, start, kind):
    "Catches NaN patches: it works, or it is refused with the way out."
    try: scheduler = diffusers_scheduler(PURE, "v", kind)
    except ValueError as e:
        assert f"{kind} would divide by 0: expected a kind with rescale_betas_zero_snr" in str(e)
        assert "rescale_betas_zero_snr" not in getattr(diffusers, kind)().config
    else: assert diffusers_sample(tiny, scheduler, start, 10, seeded_generator()).isfinite().all()
    with pytest.raises(ValueError, match="ends in noise alone, which says nothing of x0: expected objective x0 or v"):
        diffusers_scheduler(PURE, "noise", kind)


@pytest.mark.parametrize("kind", ["DDPM", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "UNet2DModel", "__name__", "", "utils"])
def test_unknown_kinds(kind):
    "Catches an AttributeError or TypeError from inside Diffusers."
    with pytest.raises(ValueError, match=f"unknown kind '{kind}': expected a scheduler of Diffusers that takes trained_betas"):
        diffusers_scheduler(get_schedule("cosine", SHORT), kind=kind)


def test_options_come_before_our_choices():
    "Catches an option that is overruled, and their word taken for an objective."
    scheduler = diffusers_scheduler(get_schedule("cosine", SHORT), "v", "DDPMScheduler", clip_sample=False, variance_type="fixed_large")
    assert (scheduler.config.clip_sample, scheduler.config.variance_type) == (False, "fixed_large")
    with pytest.raises(ValueError, match="unknown objective 'epsilon': expected one of noise, x0, v"):
        diffusers_scheduler(get_schedule("cosine", SHORT), "epsilon")


def test_sampling_in_sixteen_bits_and_with_a_list_of_generators(tiny, start):
    "Catches a chain kept in 16 bits, and generators that are not one for each patch."
    schedule = get_schedule("cosine", SHORT)
    half = lambda xt, timesteps: tiny(xt, timesteps).bfloat16()
    found = diffusers_sample(half, diffusers_scheduler(schedule, "v"), start, SHORT, [seeded_generator(), seeded_generator()])
    assert found.dtype == torch.float32
    one = ddpm_sample(tiny, schedule, start[1:], "v", generator=seeded_generator())
    close(found[1:], one, .05)


# their schedulers as our schedules

@pytest.mark.parametrize("kind", KINDS)
@each_case
def test_there_and_back(kind, schedule, objective):
    "Catches betas that come back in 32 bits, another T, another objective, a lost name."
    if schedule is PURE and "rescale_betas_zero_snr" not in getattr(diffusers, kind)().config: pytest.skip("refused, see above")
    if kind == "PNDMScheduler" and objective == "x0": pytest.skip("a kind without it")
    back, question = schedule_from_diffusers(diffusers_scheduler(schedule, objective, kind))
    assert torch.equal(back.exact["betas"], schedule.exact["betas"]) and question == objective
    assert back.name == ("custom" if schedule is PURE else schedule.name)


@pytest.mark.parametrize("options, name", [
    (dict(beta_schedule="squaredcos_cap_v2"), "cosine"), (dict(beta_start=.1/T, beta_end=20/T), "linear"), ({}, "custom"),
    (dict(beta_schedule="scaled_linear"), "custom"), (dict(beta_schedule="sigmoid"), "custom")])
def test_schedules_they_name(options, name):
    "Catches their words taken for ours: their sigmoid acts on betas, their line does not shrink with T."
    scheduler = diffusers.DDPMScheduler(T, **options)
    schedule, objective = schedule_from_diffusers(scheduler)
    assert (schedule.name, schedule.num_timesteps, objective) == (name, T, "noise")
    assert torch.equal(schedule.betas, scheduler.betas)


def test_a_bent_schedule():
    "Catches the betas that were given where the scheduler has bent them to end in noise alone."
    given = cosine_betas(SHORT).tolist()
    scheduler = diffusers.DDIMScheduler(SHORT, trained_betas=given, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule, _ = schedule_from_diffusers(scheduler)
    assert schedule.exact["betas"][-1] == 1
    close(schedule.betas, PURE.betas, 1e-5)


@pytest.mark.parametrize("scheduler, message", [
    (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler: expected a scheduler with betas"),
    (lambda: diffusers.EDMEulerScheduler(), "EDMEulerScheduler: expected a scheduler with betas"),
    (lambda: diffusers.ScoreSdeVeScheduler(), "ScoreSdeVeScheduler: expected a scheduler with betas"),
    (lambda: None, "NoneType: expected a scheduler with betas"),
    (lambda: diffusers.DDPMScheduler(variance_type="learned_range"), "variance_type 'learned_range': expected a fixed variance"),
    (lambda: diffusers.DDPMScheduler(prediction_type="else"), "prediction_type 'else', .*expected one of epsilon, sample, v_prediction"),
    (lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "expected one of epsilon"),
    (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "without flow sigmas"),
])
def test_schedulers_that_are_no_schedule_of_ours(scheduler, message):
    "Catches a schedule made up for a network that was trained another way."
    with pytest.raises(ValueError, match=message): schedule_from_diffusers(scheduler())


# pipelines

def our_network(**options):
    "A small network, all weights random."
    network = UNet(**{**dict(dim=8, dim_mults=(1, 2), channels=3), **options}).eval()
    with torch.no_grad():
        for p in network.parameters(): p.add_(.1*torch.randn_like(p))
    return network


def same(a, b, channels=3, size=8):
    "Equal answers, one step for each patch."
    x, timesteps = torch.randn(2, channels, size, size), torch.tensor([3, 40])
    with torch.inference_mode(): return torch.equal(a(x, timesteps), b(x, timesteps))


@pytest.mark.parametrize("options", [{}, dict(channels=13), dict(patch=2), dict(attention=("none", "full"))], ids=str)
@pytest.mark.parametrize("schedule, objective", [(get_schedule("cosine", SHORT), "noise"), (PURE, "v"), (get_schedule("linear", SHORT), "x0")])
def test_our_network_through_a_folder(tmp_path, options, schedule, objective):
    "Catches a setting of the network that the folder loses, weights in a pickle, betas in 32 bits."
    model = our_network(**options)
    to_diffusers(model, schedule, objective, 8).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["config.json", "diffusion_pytorch_model.safetensors", "model_index.json",
                                                                   "scheduler_config.json"]
    for source in (tmp_path, str(tmp_path), diffusers.DDPMPipeline.from_pretrained(tmp_path)):
        back, found, question = from_diffusers(source)
        assert type(back) is UNet and back.config == model.config and not back.training and question == objective
        assert torch.equal(found.exact["betas"], schedule.exact["betas"])
        assert same(back, model, model.channels)


def test_a_stranger_opens_the_folder(tmp_path):
    "Another process, no net, plain Diffusers and one import: the same patches as our sampler paints from the same noise."
    model, schedule = our_network(), get_schedule("cosine", SHORT)
    to_diffusers(model, schedule, "v", (8, 16)).save_pretrained(tmp_path/"folder")
    code = f"""
import eo_ddpm.interop, numpy, torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained({str(tmp_path/"folder")!r})
images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps={SHORT}, output_type="np").images
numpy.save({str(tmp_path/"images.npy")!r}, images)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    images = torch.from_numpy(np.load(tmp_path/"images.npy")).movedim(-1, 1)*2-1
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, 3, 8, 16, generator=generator)
    close(images, ddpm_sample(model, schedule, xt, "v", generator=generator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_opened_in_sixteen_bits(tmp_path, dtype):
    "Catches the clock of our network, which counts in 32 bits, in a network of 16."
    model = our_network()
    pipeline = to_diffusers(model, get_schedule("cosine", SHORT), "v", 8).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, num_inference_steps=5, output_type="pt").images.isfinite().all()
    x, timesteps = torch.randn(SHAPE), torch.tensor([3, 40])
    with torch.inference_mode():
        found, expected = pipeline.unet(x.to(dtype), timesteps).sample, model(x, timesteps)
    assert found.dtype == dtype and (found-expected).abs().max() < .05*expected.abs().max()


def test_the_coat():
    "Catches a step that is not spread over the batch, and a tuple where an object is expected."
    model = our_network()
    coat = to_diffusers(model, get_schedule("cosine", SHORT), "v", 8).unet
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        expected = model(x, torch.tensor([7, 7]))
        for t in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])): assert torch.equal(coat(x, t).sample, expected)
        assert torch.equal(coat(x, 7, return_dict=False)[0], expected)


def test_the_pipeline_is_a_copy():
    "Catches a pipeline that changes when training goes on."
    model = our_network()
    pipeline, before = to_diffusers(model, get_schedule("cosine", SHORT), "v", 8), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    assert same(from_diffusers(pipeline)[0], before)


def test_a_plain_pipeline(tmp_path):
    "A UNet2DModel for our samplers, from memory and from a folder, and back into a pipeline."
    network, scheduler = small_network(), diffusers.DDPMScheduler(SHORT, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipeline = diffusers.DDPMPipeline(unet=network, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    x = torch.randn(SHAPE)
    for source in (pipeline, tmp_path):
        model, schedule, objective = from_diffusers(source)
        assert isinstance(model, NetworkFromDiffusers) and (schedule.name, objective) == ("cosine", "noise")
        with torch.inference_mode(): assert torch.equal(model(x, torch.tensor([5, 40])), network(x, torch.tensor([5, 40])).sample)
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, 3, 8, 8, generator=generator)
    close(ddpm_sample(model, schedule, xt, objective, generator=generator), paint(network, scheduler, 2, SHORT))
    again = to_diffusers(model, schedule, objective, 16)
    assert type(again.unet) is diffusers.UNet2DModel and again.unet.config.sample_size == 16 and network.config.sample_size == 8
    assert same(from_diffusers(again)[0], model)


def test_pipelines_that_are_not_ours(tmp_path):
    "Catches a network that would be asked without its class, or whose second half, a variance, would be taken for colours."
    scheduler = diffusers.DDPMScheduler(SHORT)
    options = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, add_attention=False,
                   down_block_types=("DownBlock2D",)*2, up_block_types=("UpBlock2D",)*2)
    for more, message in ((dict(num_class_embeds=10), "num_class_embeds 10: expected a network without classes"),
                          (dict(class_embed_type="timestep"), "class_embed_type timestep"),
                          (dict(out_channels=6), "6 channels out for 3 in: expected as many; twice as many are a learned variance")):
        pipeline = diffusers.DDPMPipeline(unet=diffusers.UNet2DModel(**options, **more), scheduler=scheduler)
        with pytest.raises(ValueError, match=message): from_diffusers(pipeline)
    with pytest.raises(ValueError, match="Linear: expected UNetForDiffusers or UNet2DModel"):
        from_diffusers(type("Odd", (), dict(components=dict(unet=0, scheduler=0), unet=nn.Linear(1, 1), scheduler=scheduler))())
    with pytest.raises(ValueError, match="parts vqvae, unet, scheduler: expected unet and scheduler, and nothing else"):
        from_diffusers(diffusers.LDMPipeline(vqvae=diffusers.VQModel(block_out_channels=(8,), norm_num_groups=8), unet=small_network(),
                                             scheduler=diffusers.DDIMScheduler(SHORT)))


def test_folders_that_are_not_ours(tmp_path):
    "Catches a look at the net for a path that does not exist, weights from a pickle, parts that are not known."
    with pytest.raises(FileNotFoundError, match="no folder .*google/ddpm-cat-256: open a pipeline of the hub with Diffusers"):
        from_diffusers("google/ddpm-cat-256")
    with pytest.raises(FileNotFoundError, match="model_index.json"): from_diffusers(tmp_path)
    to_diffusers(our_network(), get_schedule("cosine", SHORT), "v", 8).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"): from_diffusers(tmp_path)
    index = json.loads((tmp_path/"model_index.json").read_text(encoding="utf-8"))
    for part, kind, message in (("unet", "Trap", "expected a scheduler and a unet of UNetForDiffusers or UNet2DModel"),
                                ("vae", "AutoencoderKL", "expected a scheduler and a unet"), ("scheduler", "Trap", "unknown kind 'Trap'")):
        changed = {**index, part: ["os", kind]}
        (tmp_path/"model_index.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises((ValueError, OSError), match=message if part != "scheduler" else f"{message}|safetensors"): from_diffusers(tmp_path)


def test_networks_that_do_not_go_in():
    "Catches a pipeline that fails only when it paints."
    schedule = get_schedule("cosine", SHORT)
    with pytest.raises(ValueError, match="Tiny: expected a UNet, or a network from from_diffusers"): to_diffusers(Tiny(), schedule, "v", 8)
    for size in (9, 0, -2, (8, 9)):
        with pytest.raises(ValueError, match="size = .*: expected a multiple of 2"): to_diffusers(our_network(), schedule, "v", size)
    with pytest.raises(ValueError, match="noise alone"): to_diffusers(our_network(), PURE, "noise", 8)
