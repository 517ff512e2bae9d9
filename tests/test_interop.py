"""Weights of denoising-diffusion-pytorch 1.10.12 in our U-Net: the same numbers come out."""
import os
import pickle

import pytest
import torch
from ema_pytorch import EMA

from eo_ddpm.interop import LEVEL_PARTS, load_lucidrains, rename_key, unet_arguments
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


def test_trainer_checkpoint(lucidrains, oracle, tmp_path):
    "Catches a Trainer's file that is loaded in part or fails with a riddle; its two U-Nets can be taken out by hand."
    diffusion = lucidrains.GaussianDiffusion(oracle, image_size=16, timesteps=10)
    averaged = EMA(diffusion)
    file = {"step": 3, "model": diffusion.state_dict(), "opt": {}, "ema": averaged.state_dict(), "version": "1.10.12"}
    torch.save(file, tmp_path/"model-1.pt")
    with pytest.raises(ValueError, match="expected init_conv.weight and more, found step, model, opt, ema"):
        load_lucidrains(tmp_path/"model-1.pt")
    with pytest.raises(ValueError, match="expected init_conv.weight"): load_lucidrains(diffusion.state_dict())
    file = torch.load(tmp_path/"model-1.pt", weights_only=True)
    for part, prefix in (("model", "model."), ("ema", "ema_model.model.")):
        unet = {key.removeprefix(prefix): value for key, value in file[part].items() if key.startswith(prefix)}
        same_outputs(oracle, load_lucidrains(unet).eval(), (1, 3, 8, 8))


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
