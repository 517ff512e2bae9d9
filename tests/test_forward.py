"""The forward process: one step, many steps, one jump."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eo_ddpm.forward import add_noise, at, forward_step

T = 500
BETAS = torch.linspace(2e-4, .04, T, dtype=torch.float64)
ABAR = (1-BETAS).cumprod(0)

betas_lists = st.lists(st.floats(1e-5, .99), min_size=1, max_size=8)


def walk(x0, noises, betas):
    "Step by step, with given noises."
    for t, noise in enumerate(noises): x0 = forward_step(x0, noise, torch.full((len(x0),), t), betas)
    return x0


def test_one_step_by_hand():
    "Catches beta used where its square root belongs, and the two weights swapped: sqrt(.64)*2 + sqrt(.36)*10 = 7.6."
    xt = forward_step(torch.full((1, 1, 1, 1), 2.), torch.full((1, 1, 1, 1), 10.), torch.tensor([0]), torch.tensor([.36]))
    assert xt.item() == pytest.approx(7.6)


def test_one_jump_by_hand():
    "Catches 1-sqrt(abar) in place of sqrt(1-abar): abar .36 gives .6*2 + .8*10 = 9.2."
    xt = add_noise(torch.full((1, 1, 1, 1), 2.), torch.full((1, 1, 1, 1), 10.), torch.tensor([0]), torch.tensor([.36]))
    assert xt.item() == pytest.approx(9.2)


@settings(max_examples=30, deadline=None)
@given(betas_lists)
def test_walk_is_a_jump_with_the_noises_combined(betas):
    """Exact, no statistics: noise i reaches the end with weight sqrt(beta_i abar_t/abar_i).

    Catches any other product (a sum, a product that starts one step late) in either function."""
    betas = torch.tensor(betas, dtype=torch.float64)
    abar = (1-betas).cumprod(0)
    x0, noises = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(len(betas), 2, 3, 2, 2, dtype=torch.float64)
    weights = (betas*abar[-1]/abar).sqrt()
    combined = (weights[:, None, None, None, None]*noises).sum(0)/weights.square().sum().sqrt()
    assert weights.square().sum().item() == pytest.approx(1-abar[-1].item(), abs=1e-12)
    jump = add_noise(x0, combined, torch.full((2,), len(betas)-1), abar)
    torch.testing.assert_close(walk(x0, noises, betas), jump, rtol=0, atol=1e-12)


def test_walk_and_jump_agree_in_distribution():
    """Mean, variance and the covariance of two pixels over 20,000 draws, each within 5 standard errors.

    Catches noise that is reused between steps (variance too large) or shared between pixels (covariance not 0)."""
    draws, steps = 20_000, 60
    x0 = torch.tensor([.8, -.3]).view(1, 1, 1, 2).expand(draws, -1, -1, -1)
    abar = ABAR[steps-1].item()
    walked = walk(x0, (torch.randn(x0.shape) for _ in range(steps)), BETAS)
    jumped = add_noise(x0, torch.randn(x0.shape), torch.full((draws,), steps-1), ABAR)
    for xt in (walked.view(draws, 2), jumped.view(draws, 2)):
        assert (xt.mean(0)-math.sqrt(abar)*x0[0].flatten()).abs().max() < 5*math.sqrt((1-abar)/draws)
        assert (xt.var(0)-(1-abar)).abs().max() < 5*(1-abar)*math.sqrt(2/draws)
        assert torch.cov(xt.T)[0, 1].abs() < 5*(1-abar)/math.sqrt(draws)


@pytest.mark.parametrize("t", [0, 50, 129, 300, T-1])
def test_variance_is_preserved(t):
    "A patch of variance 1 keeps it at every step. Catches weights whose squares do not add up to 1."
    n = 200_000
    xt = add_noise(torch.randn(1, 1, 1, n), torch.randn(1, 1, 1, n), torch.tensor([t]), ABAR)
    assert abs(xt.var().item()-1) < 5*math.sqrt(2/n)


def test_code_step_0_is_the_papers_step_1():
    "Catches an index that is off by one: t = 0 must be one step of noise, neither none nor two."
    x0, noise, t = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([0])
    torch.testing.assert_close(add_noise(x0, noise, t, ABAR), forward_step(x0, noise, t, BETAS))
    assert not torch.equal(add_noise(x0, noise, t, ABAR), x0)


def test_limits():
    "Catches signal and noise swapped: abar 1 gives x0, abar 0 gives the noise."
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    xt = add_noise(x0, noise, torch.tensor([0, 1]), torch.tensor([1., 0.]))
    torch.testing.assert_close(xt, torch.stack([x0[0], noise[1]]))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 5), (3, 3, 8, 6), (3, 2, 3, 4, 5)])
def test_each_patch_has_its_own_step(shape):
    "Catches coefficients spread over channels or columns (3 patches and 3 channels would hide it), for any number of dims."
    x0, noise, timesteps = torch.randn(shape), torch.randn(shape), torch.tensor([7, 0, 480])
    together = add_noise(x0, noise, timesteps, ABAR)
    alone = [add_noise(x0[i:i+1], noise[i:i+1], timesteps[i:i+1], ABAR) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_inputs_stay_as_they_are():
    "Catches an in-place multiplication, which would ruin the cached training patch."
    x0, noise, timesteps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([3, 400])
    before = [x0.clone(), noise.clone(), ABAR.clone()]
    add_noise(x0, noise, timesteps, ABAR)
    forward_step(x0, noise, timesteps, BETAS)
    assert all(torch.equal(a, b) for a, b in zip(before, (x0, noise, ABAR)))


@pytest.mark.parametrize("dtype,eps", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_dtype_is_kept(dtype, eps):
    "Catches half-precision patches that come back as float32 (or float64 ones rounded), and coefficients taken in fp16."
    x0, noise, timesteps = torch.rand(4, 3, 8, 8).double()*2-1, torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 10, 250, 499])
    for f, numbers in ((add_noise, ABAR), (forward_step, BETAS)):
        xt = f(x0.to(dtype), noise.to(dtype), timesteps, numbers)
        assert xt.dtype == dtype
        torch.testing.assert_close(xt.double(), f(x0, noise, timesteps, numbers), rtol=eps, atol=4*eps)


def test_float32_schedule_is_good_enough():
    "1-abar loses digits in float32 at small t: the noise must still be right to 1e-4 of its size."
    one = torch.ones(1, 1, 1, 1)
    for t in range(T):
        weight = add_noise(0*one, one, torch.tensor([t]), ABAR.float()).item()
        assert weight == pytest.approx((1-ABAR[t]).sqrt().item(), rel=2e-4)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_same_as_lucidrains(lucidrains, name):
    "The oracle's q_sample, every step. Catches any difference in the formula or in the index."
    class Model(torch.nn.Module):
        channels, out_dim, self_condition = 3, 3, False
    oracle = lucidrains.GaussianDiffusion(Model(), image_size=4, timesteps=100, beta_schedule=name)
    x0, noise, timesteps = torch.rand(100, 3, 4, 4)*2-1, torch.randn(100, 3, 4, 4), torch.arange(100)
    theirs = oracle.q_sample(x0, timesteps, noise)
    torch.testing.assert_close(add_noise(x0, noise, timesteps, oracle.alphas_cumprod), theirs, rtol=1e-6, atol=2e-6)


def test_steps_on_another_device_are_not_looked_at():
    "Catches a range check that reads timesteps back from a GPU in every training step (`meta` has nothing to read)."
    x0, timesteps = torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert add_noise(x0, x0, timesteps, ABAR.to("meta")).shape == (2, 3, 4, 4)


X = torch.zeros(2, 3, 4, 4)
GOOD = torch.tensor([0, 1])
FAULTS = {  # what is passed -> words of the message
    "noise of one channel": (X, X[:, :1], GOOD, r"noise \(2, 1, 4, 4\) and x\w+ \(2, 3, 4, 4\) differ in shape"),
    "noise of one patch": (X, X[:1], GOOD, r"noise \(1, 3, 4, 4\)"),
    "too many steps": (X, X, torch.tensor([0, 1, 2]), r"timesteps \(3,\) torch.int64: expected int64, one for each of 2 patches"),
    "a single number": (X, X, torch.tensor(5), r"timesteps \(\) "),
    "a column": (X, X, GOOD[:, None], r"timesteps \(2, 1\)"),
    "fractions": (X, X, torch.tensor([0., .5]), "torch.float32"),
    "a mask": (X, X, torch.tensor([True, False]), "torch.bool"),  # would select rows without a word
    "beyond the end": (X, X, torch.tensor([0, T]), f"timesteps 0 to {T}: expected 0 to {T-1}"),
    "before the start": (X, X, torch.tensor([-1, 3]), f"timesteps -1 to 3: expected 0 to {T-1}"),  # would mean the last
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("function,numbers", [(add_noise, ABAR), (forward_step, BETAS)])
def test_refuses(function, numbers, fault):
    "Each of these would otherwise broadcast or wrap around to a wrong picture; the message holds the value."
    x, noise, timesteps, words = FAULTS[fault]
    with pytest.raises(ValueError, match=words): function(x, noise, timesteps, numbers)


def test_no_patches_is_fine():
    "An empty batch (the last one of a loader) has no smallest timestep; the range check must not stumble over it."
    assert at(BETAS, torch.zeros(0, dtype=torch.int64), X[:0]).shape == (0, 1, 1, 1)
