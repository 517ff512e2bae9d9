"""The U-Net on its own: shapes, properties, errors. Weight for weight against the oracle: test_interop.py."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from eo_ddpm.unet import (DIM_HEAD, HEADS, MEMORY, Attention, Block, LinearAttention, ResnetBlock, RMSNorm,
                          TimeEmbedding, UNet, level_attention)


def shaken(module, amount=.3):
    "Random everywhere: norms at 1 and biases at 0 would hide a part that is not used."
    with torch.no_grad():
        for p in module.parameters():
            spread = p.std() if p.numel() > 1 and p.std() > 0 else torch.tensor(1.)
            p.add_(amount*spread*torch.randn_like(p))
    return module.eval()


@pytest.fixture(scope="module")
def small():
    "A network with linear and full attention, three levels."
    torch.manual_seed(1)
    return shaken(UNet(16))


# the time step

@pytest.mark.parametrize("dim", [4, 16, 64, 130])
def test_time_embedding_is_the_oracles(lucidrains, dim):
    "Catches another base, half-1 against half, sines and cosines interleaved: to the last bit."
    timesteps = torch.tensor([0, 1, 2, 137, 499, 999])
    assert torch.equal(TimeEmbedding(dim)(timesteps), lucidrains.SinusoidalPosEmb(dim)(timesteps))


def test_time_embedding_by_hand():
    "Catches a wrong frequency range: the first is 1, the last 1/10000, computed here without torch."
    t, half = 7, 5
    freqs = [10000**(-i/(half-1)) for i in range(half)]
    expected = [math.sin(t*f) for f in freqs] + [math.cos(t*f) for f in freqs]
    torch.testing.assert_close(TimeEmbedding(10)(torch.tensor([t]))[0], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [-2, 0, 2, 7])
def test_time_embedding_refuses(dim):
    "Catches a division by zero (dim 2) or a vector that is one too short (odd dim)."
    with pytest.raises(ValueError, match=f"dim = {dim}"): TimeEmbedding(dim)


def test_each_patch_hears_its_own_step(small):
    "Catches a step that is shared over the batch, or not used at all."
    x, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([3, 250, 499])
    with torch.inference_mode():
        together = small(x, timesteps)
        alone = torch.cat([small(x[i:i+1], timesteps[i:i+1]) for i in range(3)])
        frozen = small(x, torch.full((3,), 3))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (together[1:]-frozen[1:]).abs().amax() > 1e-2
    torch.testing.assert_close(together[0], frozen[0])


# blocks

def test_scale_shift_by_hand():
    "Catches x*scale instead of x*(1+scale), or time after SiLU."
    block, x = shaken(Block(4, 16)), torch.randn(2, 4, 5, 7)
    scale, shift = torch.randn(2, 2, 16, 1, 1)
    h = block.conv(x).reshape(2, 8, -1)  # 8 groups
    h = (h-h.mean(-1, keepdim=True))/(h.var(-1, keepdim=True, correction=0)+1e-5).sqrt()
    h = h.reshape(2, 16, 5, 7)*block.norm.weight[:, None, None]+block.norm.bias[:, None, None]
    h = h*(1+scale)+shift
    torch.testing.assert_close(block(x, (scale, shift)), h*torch.sigmoid(h), atol=1e-5, rtol=1e-4)


def test_silent_resnet_block_is_its_shortcut():
    "Catches a lost shortcut: with the second block's output at zero, the input comes through untouched."
    block, x = ResnetBlock(16, 16, 32), torch.randn(2, 16, 6, 6)
    torch.nn.init.zeros_(block.block2.norm.weight), torch.nn.init.zeros_(block.block2.norm.bias)
    assert torch.equal(block(x, torch.randn(2, 32)), x)


def test_rms_norm_lengths():
    "Catches a norm over pixels instead of channels: every pixel's vector has length sqrt(C)."
    lengths = RMSNorm(24)(5*torch.randn(2, 24, 3, 5)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((2, 3, 5), 24**.5))


# attention

def naive(layer, x):
    "q, k, v of one patch in numpy: each (heads, n, 32), memory first in k and v."
    x = x.double().numpy()
    c, n = x.shape[0], x.shape[1]*x.shape[2]
    x = x.reshape(c, n)
    x = x/np.sqrt((x**2).sum(0))*np.sqrt(c)*layer.norm.gain.detach().double().numpy().reshape(c, 1)
    qkv = layer.qkv.weight.detach().double().numpy().reshape(-1, c) @ x
    q, k, v = [part.reshape(HEADS, DIM_HEAD, n).transpose(0, 2, 1) for part in np.split(qkv, 3)]
    memory = layer.memory.detach().double().numpy()
    if isinstance(layer, LinearAttention): memory = memory.transpose(0, 1, 3, 2)
    return q, np.concatenate([memory[0], k], axis=1), np.concatenate([memory[1], v], axis=1)


def softmax(a, axis):
    e = np.exp(a-a.max(axis, keepdims=True))
    return e/e.sum(axis, keepdims=True)


def project(conv, mixed):
    "(heads, n, 32) -> (C, n) by the 1x1 convolution."
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    flat = mixed.transpose(0, 2, 1).reshape(HEADS*DIM_HEAD, -1)
    return weight.reshape(-1, HEADS*DIM_HEAD) @ flat + bias[:, None]


def test_full_attention_naively():
    "Catches mixed-up heads, a missing 1/sqrt(d), a softmax over the wrong axis, a lost residual."
    layer, x = shaken(Attention(24)), torch.randn(1, 24, 3, 5)
    q, k, v = naive(layer, x[0])
    mixed = np.stack([softmax(q[h] @ k[h].T/np.sqrt(DIM_HEAD), axis=1) @ v[h] for h in range(HEADS)])
    expected = x[0].numpy() + project(layer.out, mixed).reshape(24, 3, 5)
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), expected, atol=1e-5)


def test_linear_attention_naively():
    "Catches the two softmaxes on swapped axes and the context transposed (32 x 32 hides it from shape checks)."
    layer, x = shaken(LinearAttention(24)), torch.randn(1, 24, 3, 5)
    q, k, v = naive(layer, x[0])
    mixed = np.zeros_like(q)
    for h in range(HEADS):
        share, summary = softmax(k[h], axis=0), np.zeros((DIM_HEAD, DIM_HEAD))
        for i in range(len(share)): summary += np.outer(share[i], v[h][i])  # key entry by value entry
        mixed[h] = softmax(q[h], axis=1)/np.sqrt(DIM_HEAD) @ summary
    out = project(layer.out[0], mixed)
    out = out/np.sqrt((out**2).sum(0))*np.sqrt(24)*layer.out[1].gain.detach().double().numpy().reshape(24, 1)
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), x[0].numpy()+out.reshape(24, 3, 5), atol=1e-5)


@pytest.mark.parametrize("kind", [Attention, LinearAttention])
def test_attention_commutes_with_a_shuffle_of_pixels(kind):
    "Catches height and width, or pixels and channels, mixed up in a reshape."
    layer, x, order = shaken(kind(16)), torch.randn(2, 16, 4, 6), torch.randperm(24)
    shuffle = lambda x: x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(layer(shuffle(x)), shuffle(layer(x)), atol=1e-5, rtol=1e-4)


def test_attention_weights_are_shares():
    "Catches a softmax over the askers: each row, memory included, sums to 1."
    weights = shaken(Attention(16)).weights(torch.randn(2, 16, 4, 6))
    assert weights.shape == (2, HEADS, 24, MEMORY+24)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 24))


def test_fused_attention_is_weights_times_values():
    "Catches a fused call that scales otherwise than the weights that the lesson shows, in values and in gradients."
    layer, x = shaken(Attention(16)), torch.randn(2, 16, 4, 6)
    def by_hand(x):
        mixed = layer.weights(x) @ layer.parts(x)[2]  # (B,heads,24,32)
        return x + layer.out(mixed.transpose(-1, -2).reshape(2, -1, 4, 6))
    torch.testing.assert_close(layer(x), by_hand(x), atol=1e-5, rtol=1e-4)
    inputs, pull = [x.requires_grad_(), *layer.parameters()], torch.randn_like(x)
    for ours, theirs in zip(torch.autograd.grad(layer(x), inputs, pull), torch.autograd.grad(by_hand(x), inputs, pull)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype):
    "Against F.normalize in float64, values and gradients: huge, tiny and zero vectors. Catches NaN at 0 and lost digits."
    x = torch.randn(2, 24, 4, 5)*torch.logspace(-6, 6, 5)
    x[0, :, 0] = 0
    x, norm, pull = x.to(dtype), shaken(RMSNorm(24)), torch.randn(2, 24, 4, 5, dtype=torch.float64)
    gain = norm.gain.detach().double()
    def gradient(f, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((f(x).double()*pull).sum(), x)[0].double()
    def theirs(x): return F.normalize(x, dim=1)*gain*24**.5
    near = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(x).double(), theirs(x.double()), **near)
    assert norm(x).dtype == dtype and not norm(x)[0, :, 0].any()
    ours, expected = gradient(norm, x), gradient(theirs, x.double())
    size = x.double().norm(dim=1, keepdim=True).clamp(min=1e-12)  # a short vector has a large gradient
    seen = (size > 1e-9).expand_as(ours)
    assert ours.isfinite().all()
    torch.testing.assert_close((ours*size)[seen], (expected*size)[seen], rtol=5e-2, atol=24*near["atol"])


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 16, 24)])
def test_memory_order_changes_nothing(shape):
    "Catches a view that mixes pixels and channels when the input is not in channels_last order; gradients too."
    model, (x, timesteps) = shaken(UNet(16)), (torch.randn(shape), torch.arange(shape[0]))
    def gradients(x):
        (model(x, timesteps)**2).sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found
    expected = gradients(x)
    for ours, theirs in zip(gradients(x.to(memory_format=torch.channels_last)), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_compiles_whole():
    "Catches a graph break: fullgraph raises at anything that Python must decide while the network runs."
    model, x, timesteps = shaken(UNet(8, (1, 2))), torch.randn(2, 3, 8, 8), torch.tensor([3, 9])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, timesteps), model(x, timesteps), atol=1e-5, rtol=1e-4)
    expected = torch.autograd.grad(model(x, timesteps).sum(), list(model.parameters()))
    for ours, theirs in zip(torch.autograd.grad(compiled(x, timesteps).sum(), list(model.parameters())), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_level_attention():
    "Catches kinds given innermost first, a short list that is padded in silence, a misspelt kind."
    assert level_attention(None, 1) == ("full",)
    assert level_attention(None, 4) == ("linear", "linear", "linear", "full")
    assert level_attention(["none", "full"], 2) == ("none", "full")
    with pytest.raises(ValueError, match="each of 3 levels"): level_attention(("none", "full"), 3)
    with pytest.raises(ValueError, match="unknown attention fast, slow: expected one of full, linear, none"):
        level_attention(("slow", "full", "fast"), 3)
    with pytest.raises(ValueError, match="at least one level"): level_attention(None, 0)


def test_attention_kinds_go_to_their_levels():
    "Catches the list read backwards: on the way up the order of levels is reversed."
    model = UNet(8, (1, 2, 4), attention=("none", "linear", "full"))
    names = ["Identity", "LinearAttention", "Attention"]
    assert [type(level.attention).__name__ for level in model.body.downs] == names
    assert [type(level.attention).__name__ for level in model.body.ups] == names[::-1]


# the whole network

def test_the_reports_size_and_work():
    "Catches any layer more or less: 9,908,483 parameters, 49.7 GFLOP (2 x multiply-add) for 128 px."
    with torch.device("meta"):
        model, x, timesteps = UNet(), torch.zeros(1, 3, 128, 128), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter: model(x, timesteps)
    assert sum(p.numel() for p in model.parameters()) == 9_908_483
    assert counter.get_total_flops() == 49_715_314_688


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_patch_is_fold_network_unfold(patch, channels):
    "Catches a fold that is not undone, or undone in another order."
    model = shaken(UNet(8, (1, 2), channels, patch))
    x, timesteps = torch.randn(2, channels, 4*patch, 6*patch), torch.tensor([1, 9])
    plain = UNet(8, (1, 2), channels*patch**2).eval()  # the same network for the folded picture
    plain.stem = torch.nn.Conv2d(channels*patch**2, 8, 3, padding=1)  # a folding network's stem is 3x3
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        folded = x.reshape(2, channels, 4, patch, 6, patch).permute(0, 1, 3, 5, 2, 4).reshape(2, -1, 4, 6)
        answer = plain(folded, timesteps).reshape(2, channels, patch, patch, 4, 6)
        expected = answer.permute(0, 1, 4, 2, 5, 3).reshape(x.shape)
        assert model(x, timesteps).shape == x.shape
        torch.testing.assert_close(model(x, timesteps), expected)


def test_patches_of_a_batch_do_not_mix(small):
    "Catches a norm or an attention over the batch."
    x, timesteps = torch.randn(3, 3, 8, 12), torch.tensor([5, 100, 400])
    other = x.clone()
    other[1] = 50*torch.randn(3, 8, 12)
    with torch.inference_mode(): a, b = small(x, timesteps), small(other, timesteps)
    torch.testing.assert_close(a[[0, 2]], b[[0, 2]], atol=1e-6, rtol=1e-6)
    assert (a[1]-b[1]).abs().amax() > .1


def test_every_weight_is_used():
    "Catches a layer that is built but never called, and a part cut off from the gradient."
    model = shaken(UNet(8, (1, 2, 4), attention=("none", "linear", "full")))
    model(torch.randn(2, 3, 8, 8), torch.tensor([1, 400])).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().amax() == 0]
    assert dead == []


def test_channels_last_changes_nothing(small):
    "Catches a .view or reshape that reads the memory order instead of the shape."
    x, timesteps = torch.randn(2, 3, 12, 8), torch.tensor([1, 400])
    with torch.inference_mode():
        expected = small(x, timesteps)
        model = UNet(16).eval()
        model.load_state_dict(small.state_dict())
        model = model.to(memory_format=torch.channels_last)
        for stored in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(model(stored, timesteps), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", [None, ("none", "linear", "linear")])
def test_bfloat16_autocast_is_close(attention):
    "Catches a dtype clash (memory against keys, time against features) and a loss of precision beyond rounding."
    model = UNet(16, attention=attention).eval()
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([1, 499])
    with torch.inference_mode():
        expected = model(x, timesteps)
        with torch.autocast("cpu", torch.bfloat16): output = model(x, timesteps).float()
    assert (output-expected).norm() < .05*expected.norm()


def test_autocast_trains():
    "Catches a gradient that is NaN or missing under bfloat16."
    model = UNet(8, (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 8, 8), torch.tensor([1, 499])).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_config_rebuilds_the_network():
    "Catches an argument that is forgotten in `config`, or one that JSON cannot hold."
    model = UNet(8, (1, 3), channels=4, patch=2, attention=("none", "linear"))
    again = UNet(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config and again.factor == model.factor == 4


def test_same_seed_same_network():
    "Catches randomness from another source than torch's seed."
    def build():
        torch.manual_seed(3)
        return UNet(8, (1, 2)).state_dict()
    a, b = build(), build()
    assert all(torch.equal(a[key], b[key]) for key in a)


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), levels=st.integers(1, 3), patch=st.sampled_from([1, 2]))
def test_any_size_is_kept_or_refused(height, width, levels, patch):
    "Catches a size that passes the check and breaks at a skip, or one that is refused although it fits."
    model = UNet(16, (1,)*levels, patch=patch, attention=("none",)*levels).eval()
    x, timesteps = torch.zeros(1, 3, height, width), torch.tensor([0])
    with torch.inference_mode():
        if height % model.factor or width % model.factor:
            text = f"{height} x {width} pixels, expected multiples of {model.factor}"
            with pytest.raises(ValueError, match=text): model(x, timesteps)
        else: assert model(x, timesteps).shape == x.shape


@pytest.mark.parametrize("shape, timesteps, text", [
    ((2, 3, 6, 8), 2, r"6 x 8 pixels, expected multiples of 4"),
    ((2, 4, 8, 8), 2, r"\(2, 4, 8, 8\), expected \(B,3,H,W\)"),
    ((3, 8, 8), 3, r"\(3, 8, 8\), expected \(B,3,H,W\)"),
    ((2, 3, 8, 8), 3, r"timesteps are \(3,\), expected \(2,\)"),
    ((2, 3, 8, 8), None, r"timesteps are \(\), expected \(2,\)"),
])
def test_refused_inputs(small, shape, timesteps, text):
    "Catches an input that would broadcast in silence (one step for two patches) or fail deep inside."
    steps = torch.tensor(5) if timesteps is None else torch.zeros(timesteps, dtype=torch.int64)
    with pytest.raises(ValueError, match=text): small(torch.zeros(shape), steps)


@pytest.mark.parametrize("arguments, text", [
    (dict(dim=20), "20 channels: group norm needs a multiple of 8"),
    (dict(dim=8, dim_mults=()), "dim_mults is empty"),
    (dict(dim=8, patch=0), "patch = 0"),
    (dict(dim=8, attention=("full",)), "each of 3 levels"),
    (dict(dim=8, attention=("linear", "linear", "ful")), "unknown attention ful"),
])
def test_refused_networks(arguments, text):
    "Catches a network that is built and fails only when it is used."
    with pytest.raises(ValueError, match=text): UNet(**arguments)


def test_fold_matches_torch():
    "The hand-written fold of these tests is torch's pixel_unshuffle: else the patch test would prove nothing."
    x = torch.randn(2, 3, 8, 12)
    by_hand = x.reshape(2, 3, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 4, 6)
    assert torch.equal(by_hand, F.pixel_unshuffle(x, 2))
