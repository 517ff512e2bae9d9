"""Files of denoising-diffusion-pytorch 1.10.12: the same numbers, the same pictures, the same next step."""
import copy
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from eo_ddpm.interop import (LEVEL_PARTS, load_lucidrains, lucidrains_adam, lucidrains_settings, rename_key, schedule_from_betas,
                             unet_arguments)
from eo_ddpm.sampling import ddim_sample, ddpm_sample
from eo_ddpm.schedules import SCHEDULES
from eo_ddpm.training import OBJECTIVES, loss_weight, train_step
from eo_ddpm.unet import UNet


def shaken(module):
    "All weights random, norm gains and biases too: in fresh networks a swapped pair of equal tensors would hide."
    with torch.no_grad():
        for p in module.parameters():
            spread = p.std() if p.numel() > 1 and p.std() > 0 else torch.tensor(.5)
            p.add_(.5*spread*torch.randn_like(p))
    return module.eval()


@pytest.fixture(scope="module")
def oracle(lucidrains):
    "A small network of the library, every weight random."
    torch.manual_seed(7)
    return shaken(lucidrains.Unet(16, dim_mults=(1, 2, 4)))


def same_outputs(theirs, ours, shape):
    "Both networks on the same noise, steps 0 and 999 among them: within 1e-5 of the largest output."
    x, timesteps = torch.randn(shape), torch.tensor([0, 999, 137, 500, 1])[:shape[0]]
    with torch.inference_mode(): a, b = theirs(x, timesteps), ours(x, timesteps)
    assert a.shape == b.shape == x.shape
    assert (a-b).abs().amax() <= 1e-5*max(1, a.abs().amax().item())


@pytest.mark.parametrize("dim, mults, shape", [
    (16, (1, 2), (3, 3, 16, 24)), (16, (1, 2, 4), (5, 3, 20, 12)), (16, (1, 2, 4, 8), (1, 3, 16, 32)),
    (32, (1, 2), (1, 3, 10, 8)), (32, (1, 2, 4), (3, 3, 24, 16)), (32, (1, 2, 4, 8), (3, 3, 8, 16)),
    (64, (1, 2), (3, 3, 8, 12)), (64, (1, 2, 4), (1, 3, 16, 24)), (64, (1, 2, 4, 8), (1, 3, 16, 24)),
    (16, (2, 3), (3, 3, 6, 8)), (16, (1,), (3, 3, 5, 7)),
])
def test_same_outputs_as_the_library(lucidrains, dim, mults, shape):
    "Catches any difference in the network or any name that leads to another tensor of the same shape."
    theirs = shaken(lucidrains.Unet(dim, dim_mults=mults))
    ours = load_lucidrains(theirs.state_dict()).eval()
    assert ours.config["dim_mults"] == list(mults)
    same_outputs(theirs, ours, shape)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels(lucidrains, channels):
    "Catches a 3 that is written into the code: near infrared, or all 13 bands."
    theirs = shaken(lucidrains.Unet(16, dim_mults=(1, 2), channels=channels))
    same_outputs(theirs, load_lucidrains(theirs.state_dict()).eval(), (3, channels, 8, 12))


@pytest.mark.parametrize("full", [(True, True), (True, False)])
def test_other_attention(lucidrains, full):
    "Catches a guess of the attention from the level instead of from the weights."
    theirs = shaken(lucidrains.Unet(16, dim_mults=(1, 2), full_attn=full))
    ours = load_lucidrains(theirs.state_dict()).eval()
    assert ours.config["attention"] == ["full" if f else "linear" for f in full]
    same_outputs(theirs, ours, (3, 3, 8, 12))


def test_same_gradients_as_the_library(oracle):
    "Catches a detach, an in-place edit, a formula that agrees in value only: all weights' gradients, and the input's."
    ours, x = load_lucidrains(oracle.state_dict()).eval(), torch.randn(3, 3, 8, 12)
    timesteps, inputs = torch.tensor([0, 999, 137]), [x.clone().requires_grad_() for _ in range(2)]
    for model, start in zip((oracle, ours), inputs):
        model.zero_grad()
        model(start, timesteps).square().mean().backward()
    theirs = {rename_key(key): p.grad for key, p in oracle.named_parameters()}
    theirs["x"], found = inputs[0].grad, {"x": inputs[1].grad, **{key: p.grad for key, p in ours.named_parameters()}}
    oracle.zero_grad()
    for key, grad in theirs.items():
        assert (grad-found[key]).abs().amax() <= 1e-4*grad.abs().amax().clamp(min=1e-3), key


def test_same_number_of_parameters(lucidrains):
    "Catches a bias more or less: the report's network has 9,908,483 on both sides."
    with torch.device("meta"): theirs, ours = lucidrains.Unet(64, dim_mults=(1, 2, 4)), UNet()
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(theirs) == count(ours) == 9_908_483


@pytest.mark.parametrize("mults", [(1,), (1, 2), (1, 2, 4, 8)])
def test_names_map_one_to_one(lucidrains, mults):
    "Catches two of their names that land on one of ours (the later one would win) and a name left over."
    with torch.device("meta"): theirs, ours = lucidrains.Unet(8, dim_mults=mults), UNet(8, mults)
    renamed = {rename_key(key): tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert renamed == {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert len(renamed) == len(theirs.state_dict())


@pytest.mark.parametrize("one, other", [
    ("downs.0.0.", "downs.0.1."), ("mid_block1.", "mid_block2."), ("downs.0.2.norm.g", "downs.1.2.norm.g"),
    ("block1.norm.weight", "block2.norm.weight"), ("downs.0.2.mem_kv", "ups.2.2.mem_kv"),
])
def test_a_swapped_pair_would_be_seen(oracle, one, other):
    "Planted fault: swap tensors of equal shape. If the outputs stayed the same, the tests above would prove nothing."
    swap = lambda key: key.replace(one, "#").replace(other, one).replace("#", other)
    state = oracle.state_dict()
    swapped = {swap(key): value for key, value in state.items()}
    assert all(swapped[key].shape == value.shape for key, value in state.items())  # nothing else could complain
    x, timesteps = torch.randn(1, 3, 8, 8), torch.tensor([300])
    with torch.inference_mode():
        right, wrong = load_lucidrains(state)(x, timesteps), load_lucidrains(swapped)(x, timesteps)
    assert (right-wrong).abs().amax() > 1e-3*right.abs().amax()


def test_the_source_stays_as_it_is(oracle):
    "Catches weights shared with the dictionary: training our network must not change theirs."
    state = {key: value.clone() for key, value in oracle.state_dict().items()}
    ours = load_lucidrains(state)
    with torch.no_grad():
        for p in ours.parameters(): p.zero_()
    assert all(torch.equal(state[key], value) for key, value in oracle.state_dict().items())


# files

def test_from_a_file(oracle, tmp_path):
    "Catches a path that is taken for a dictionary, as str or as Path."
    torch.save(oracle.state_dict(), tmp_path/"unet.pt")
    for path in (tmp_path/"unet.pt", str(tmp_path/"unet.pt")):
        same_outputs(oracle, load_lucidrains(path).eval(), (1, 3, 8, 8))
    with pytest.raises(FileNotFoundError): load_lucidrains(tmp_path/"nothing.pt")


class Trap:
    "A pickle that makes a folder when it is opened without care."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path):
    "Catches torch.load without weights_only: the planted call must be refused, and must not happen."
    victim, file = tmp_path/"victim", tmp_path/"weights.pt"
    torch.save({"init_conv.weight": Trap(victim)}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"): load_lucidrains(file)
    assert not victim.exists()
    torch.load(file, weights_only=False)  # the trap is real: opened without care it springs
    assert victim.exists()


# the library's own training files

T = 40


@pytest.fixture(scope="module")
def trainer(lucidrains, tmp_path_factory):
    """A real Trainer after two steps on 100 pictures, which has painted one patch and saved model-1.pt.

    dim 16, not 8: with one channel to a group the norm cancels the biases before it, and Adam makes whole steps of rounding errors."""
    folder = tmp_path_factory.mktemp("trainer")
    chance = np.random.default_rng(0)
    for i in range(100): Image.fromarray(chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder/f"{i}.png")
    torch.manual_seed(7)
    diffusion = lucidrains.GaussianDiffusion(shaken(lucidrains.Unet(16, dim_mults=(1, 2))), image_size=16, timesteps=T, beta_schedule="cosine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lucidrains, "cpu_count", lambda: 0)  # no processes to read 100 small files
        trainer = lucidrains.Trainer(diffusion, folder, train_batch_size=16, train_lr=1e-3, train_num_steps=2, save_and_sample_every=2,
                                     num_samples=1, results_folder=folder/"results", calculate_fid=False, augment_horizontal_flip=False)
        trainer.train()
    trainer.file = folder/"results"/"model-1.pt"
    return trainer


def equal_weights(theirs, ours):
    return all(torch.equal(value, ours.state_dict()[rename_key(key)]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("averaged", [True, False])
def test_both_networks_of_a_trainer_s_file(trainer, averaged):
    "Catches the raw weights where the averaged were asked for, and the other way round."
    raw, average = trainer.model.model, trainer.ema.ema_model.model
    assert not torch.equal(raw.init_conv.weight, average.init_conv.weight)  # else there is nothing to mix up
    ours = load_lucidrains(trainer.file, averaged)
    assert equal_weights(average if averaged else raw, ours)
    assert equal_weights(average, load_lucidrains(trainer.file))
    same_outputs(average if averaged else raw, ours.eval(), (3, 3, 16, 16))


def test_every_dictionary_on_the_way_in(trainer):
    "Catches a state dict of one layer of the onion that is taken for another's."
    file = torch.load(trainer.file, weights_only=True)
    raw, average = trainer.model.model, trainer.ema.ema_model.model
    assert equal_weights(average, load_lucidrains(file)) and equal_weights(average, load_lucidrains(file["ema"]))
    for source in (file["model"], trainer.model.state_dict(), raw.state_dict()):
        assert equal_weights(raw, load_lucidrains(source)) and equal_weights(raw, load_lucidrains(source, averaged=False))
    for source in (file, file["ema"], file["model"]): assert lucidrains_settings(source)[1:] == ("v", "noise")


def test_half_a_trainer_s_file(trainer):
    "Catches the silent use of the weights that nobody asked for, and a KeyError."
    file = torch.load(trainer.file, weights_only=True)
    with pytest.raises(ValueError, match="no ema in the file: expected it beside step, model"):
        load_lucidrains({key: file[key] for key in ("step", "model")})
    with pytest.raises(ValueError, match="no model in the file: expected it beside ema"):
        load_lucidrains({"ema": file["ema"]}, averaged=False)
    with pytest.raises(ValueError, match="expected a Trainer's file with model and opt, found step, model"):
        lucidrains_adam({key: file[key] for key in ("step", "model")}, UNet(8, (1, 2)))


def their_picture(diffusion, way):
    "Two pictures of theirs from the noise of seed 11, on our scale."
    torch.manual_seed(11)
    return getattr(diffusion, way[0])(*way[1])*2-1


def test_the_same_pictures_as_theirs(trainer):
    "The whole way from file to picture, both samplers: schedule, objective and average, each wrong in turn, would show."
    ours, (schedule, objective, _) = load_lucidrains(trainer.file), lucidrains_settings(trainer.file)
    average, shape = trainer.ema.ema_model, (2, 3, 16, 16)
    expected = their_picture(average, ("sample", (2,)))
    torch.manual_seed(11)
    found = ddpm_sample(ours, schedule, torch.randn(shape), objective)
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=1e-4, rtol=0)
    average.sampling_timesteps = 10  # as if built so: ten strides of DDIM
    expected = their_picture(average, ("ddim_sample", (shape,)))
    torch.manual_seed(11)
    found = ddim_sample(ours, schedule, torch.randn(shape), objective, steps=10)
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=1e-4, rtol=0)


def test_go_on_training_as_they_would(trainer):
    "One step from one file on both sides: catches Adam's memory at the wrong weights, a lost learning rate, another loss."
    ours = load_lucidrains(trainer.file, averaged=False)
    adam, settings = lucidrains_adam(trainer.file, ours), lucidrains_settings(trainer.file)
    before = copy.deepcopy(ours.state_dict())
    theirs, opt = trainer.model, trainer.opt
    images = torch.rand(16, 3, 16, 16)
    torch.manual_seed(5)
    theirs(images).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.)
    opt.step()
    opt.zero_grad()
    torch.manual_seed(5)  # both draw the steps first, then the noise
    train_step(ours, adam, images*2-1, *settings)
    moved = max((ours.state_dict()[key]-value).abs().amax() for key, value in before.items())
    apart = max((ours.state_dict()[rename_key(key)]-value).abs().amax() for key, value in theirs.model.state_dict().items())
    assert moved > 3e-4 and apart < 1e-3*moved
    trainer.load(1)  # back to where the file is, for the other tests


def test_unsorted_memory_would_be_seen(trainer):
    "Planted fault: the memory in their order. Where shapes differ it is refused only in the step, where they are equal never."
    file = torch.load(trainer.file, weights_only=True)
    ours = load_lucidrains(file, averaged=False)
    right = lucidrains_adam(file, ours).state_dict()["state"]
    theirs = file["opt"]["state"]
    assert len(right) == len(theirs) == len(list(ours.parameters()))
    assert any(right[i]["exp_avg"].shape != theirs[i]["exp_avg"].shape for i in right)
    assert all(right[i]["exp_avg"].shape == p.shape for i, p in enumerate(ours.parameters()))


def test_the_file_s_memory_stays_as_it_is(trainer):
    "Catches an optimizer that shares its memory with the dictionary it came from."
    file = torch.load(trainer.file, weights_only=True)
    ours = load_lucidrains(file, averaged=False)
    adam, before = lucidrains_adam(file, ours), copy.deepcopy(file["opt"]["state"])
    train_step(ours, adam, torch.rand(2, 3, 16, 16), *lucidrains_settings(file))
    assert all(torch.equal(file["opt"]["state"][i]["exp_avg"], memory["exp_avg"]) for i, memory in before.items())


def test_memory_of_another_network(trainer):
    "Catches an Adam whose memory belongs to other weights."
    for model in (UNet(16, (1, 2, 4)), UNet(8, (1, 2))):
        with pytest.raises(ValueError, match="weights in the file, .* in the model: expected the same names and shapes"):
            lucidrains_adam(trainer.file, model)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("steps", [30, 1000])
def test_settings_from_buffers(lucidrains, oracle, name, objective, min_snr, steps):
    "Catches an objective, a weighting or a schedule read off wrongly: all their combinations."
    theirs = lucidrains.GaussianDiffusion(oracle, image_size=16, timesteps=steps, beta_schedule=name, objective=f"pred_{objective}",
                                          min_snr_loss_weight=min_snr)
    schedule, *rest = lucidrains_settings(theirs.state_dict())
    assert (schedule.name, schedule.num_timesteps, *rest) == (name, steps, objective, "min_snr" if min_snr else "noise")
    assert torch.equal(schedule.betas, theirs.betas)
    torch.testing.assert_close(loss_weight(*rest, schedule.snr), theirs.loss_weight, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name, steps", [(name, steps) for name in SCHEDULES for steps in (2, 10, 20, 21, 100, 4000)
                                         if steps > 20 or name != "linear"])
def test_their_betas_are_called_by_our_name(lucidrains, name, steps):
    "Catches a tolerance that fits one T only: 32 bits, and end points of the sigmoid in 32 bits."
    betas = getattr(lucidrains, f"{name}_beta_schedule")(steps).float()
    assert schedule_from_betas(betas).name == name


@pytest.mark.parametrize("options", [dict(beta_schedule="sigmoid", schedule_fn_kwargs=dict(tau=.9)),
                                     dict(beta_schedule="cosine", schedule_fn_kwargs=dict(s=.02))])
def test_another_curve_has_no_name(lucidrains, oracle, options):
    "Catches a name for a curve that is only similar."
    theirs = lucidrains.GaussianDiffusion(oracle, image_size=16, timesteps=100, **options)
    schedule, objective, _ = lucidrains_settings(theirs.state_dict())
    assert schedule.name == "custom" and objective == "v" and torch.equal(schedule.betas, theirs.betas)


def test_no_settings_in_it(lucidrains, oracle):
    "Catches a guess where the file does not say: a Unet alone, and another loss."
    with pytest.raises(ValueError, match="no settings: expected betas and loss_weight of a GaussianDiffusion, found init_conv"):
        lucidrains_settings(oracle.state_dict())
    state = lucidrains.GaussianDiffusion(oracle, image_size=16, timesteps=100, min_snr_loss_weight=True, min_snr_gamma=3).state_dict()
    with pytest.raises(ValueError, match=r"fits no objective: expected noise, x0 or v, weighted by the snr or by min\(snr, 5\)"):
        lucidrains_settings(state)


# other files

@pytest.mark.parametrize("options", [
    dict(self_condition=True), dict(learned_variance=True), dict(random_fourier_features=True),
    dict(learned_sinusoidal_cond=True), dict(attn_heads=2), dict(attn_dim_head=16), dict(init_dim=8), dict(out_dim=1),
], ids=lambda options: next(iter(options)))
def test_other_settings_are_refused(lucidrains, options):
    "Catches weights of another network that fit in part and are loaded in part, or end in torch's own error."
    state = lucidrains.Unet(16, dim_mults=(1, 2), **options).state_dict()
    with pytest.raises(ValueError, match="weights of another network"): load_lucidrains(state)


@pytest.mark.parametrize("source", [{}, {"weight": torch.zeros(1)}, {0: 1}])
def test_not_a_unet(source):
    "Catches an IndexError or KeyError from deep inside for a file of something else."
    with pytest.raises(ValueError, match="not a Unet state dict: expected init_conv.weight"): load_lucidrains(source)


def test_a_file_that_holds_no_dictionary(tmp_path):
    "Catches a TypeError: a saved tensor or list is no state dict."
    for i, content in enumerate((torch.zeros(3), [1, 2])):
        torch.save(content, tmp_path/f"{i}.pt")
        with pytest.raises(ValueError, match="found (Tensor|list)"): load_lucidrains(tmp_path/f"{i}.pt")


@pytest.mark.parametrize("lost", ["mid_attn", "downs.", "ups.0.0.", "final_conv.bias"])
def test_missing_weights(oracle, lost):
    "Catches a truncated file that loads and leaves random weights behind."
    state = {key: value for key, value in oracle.state_dict().items() if not key.startswith(lost)}
    with pytest.raises(ValueError, match="weights of another network"): load_lucidrains(state)


def test_unknown_level_part(oracle):
    "Catches a part of a level that we do not know: an IndexError in the table of names."
    state = {**oracle.state_dict(), "downs.0.7.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="weights of another network"): load_lucidrains(state)


def test_arguments_from_shapes(lucidrains):
    "Catches dim_mults read in the wrong order: the way up counts levels from the inside."
    with torch.device("meta"): state = lucidrains.Unet(8, dim_mults=(1, 2, 2, 3), channels=5).state_dict()
    assert unet_arguments(state) == dict(dim=8, dim_mults=[1, 2, 2, 3], channels=5, attention=["linear"]*3+["full"])
    assert {len(parts) for parts in LEVEL_PARTS.values()} == {4}
