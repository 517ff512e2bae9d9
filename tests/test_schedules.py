"""Noise schedules against closed forms, two libraries and Bayes' rule."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eo_ddpm.forward import add_noise
from eo_ddpm.schedules import (SCHEDULES, NoiseSchedule, betas_from, cosine_betas, derive, get_schedule, linear_betas,
                               sigmoid_betas, unit_time, zero_terminal_snr)

COUNTS = (21, 50, 500, 1000)
any_schedule = st.tuples(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 1500)).map(
    lambda pair: (pair[0], max(pair[1], 21) if pair[0] == "linear" else pair[1]))
any_betas = st.lists(st.floats(1e-6, .999), min_size=1, max_size=30).map(lambda b: torch.tensor(b, dtype=torch.float64))


def same(ours, theirs, eps):
    "Two lists of numbers agree to eps, in float64."
    torch.testing.assert_close(*(torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs)), rtol=0, atol=eps)


# the curves

@pytest.mark.parametrize("T", COUNTS)
def test_same_betas_as_lucidrains(lucidrains, T):
    """The report's library. Catches a missing 1000/T, an offset other than .008, the sigmoid on betas, a lost clip.

    It takes the sigmoid's end points in float32, so that one agrees to 1e-5 only; the next test is exact."""
    same(linear_betas(T), lucidrains.linear_beta_schedule(T), 1e-12)
    same(cosine_betas(T), lucidrains.cosine_beta_schedule(T), 1e-12)
    same(sigmoid_betas(T), lucidrains.sigmoid_beta_schedule(T), 1e-5)


@pytest.mark.parametrize("T", (1, 2, *COUNTS))
def test_sigmoid_closed_form(T):
    "Written again with plain Python floats. Catches end points rounded to float32, which shift betas by up to 7e-6."
    s = lambda x: 1/(1+math.exp(-x))
    abar = [(s(3)-s(6*i/T-3))/(s(3)-s(-3)) for i in range(T+1)]
    assert abar[0] == 1
    same(sigmoid_betas(T), [min(.999, 1-b/a) for a, b in zip(abar, abar[1:])], 1e-12)


@pytest.mark.parametrize("T", (1, 2, *COUNTS))
def test_cosine_closed_form(T):
    "Written again with numpy. Catches a time grid of T instead of T+1 points."
    f = np.cos((np.arange(T+1)/T+.008)/1.008*np.pi/2)**2
    same(cosine_betas(T), np.minimum(1-f[1:]/f[:-1], .999), 1e-12)


def chen(curve, t, start, end, tau):
    "Chen 2023 (arXiv 2301.10972), algorithm 1, in plain floats: gamma(t), before it is clipped."
    f = {"cosine": lambda x: math.cos(x*math.pi/2)**(2*tau), "sigmoid": lambda x: 1/(1+math.exp(-x/tau))}[curve]
    return (f(end)-f(start+t*(end-start)))/(f(end)-f(start))


@pytest.mark.parametrize("curve, betas", [("cosine", cosine_betas), ("sigmoid", sigmoid_betas)])
@pytest.mark.parametrize("start, end, tau", [(0., 1., 1.), (.2, 1., 1.), (.2, 1., 2.), (0., 1., .5), (-3., 3., .9), (0., 3., .3), (-3., 0., 1.1)])
def test_start_end_tau_are_chens(curve, betas, start, end, tau):
    "tau beside the wrong bracket, a curve that is not brought to 1 and 0, a power forgotten."
    if curve == "cosine" and not 0 <= start < end <= 1: start, end = .1, .9
    gamma = [chen(curve, i/500, start, end, tau) for i in range(501)]
    same((1-betas(500, start, end, tau)).cumprod(0)[:-1], gamma[1:-1], 1e-9)


@pytest.mark.parametrize("betas", [cosine_betas, sigmoid_betas])
@pytest.mark.parametrize("wheels", [dict(start=2., end=1.), dict(start=1., end=1.), dict(tau=0.), dict(tau=-1.), dict(tau=float("nan"))])
def test_bad_wheels(betas, wheels):
    "A curve that rises, or 0/0: betas below 0 or NaN."
    with pytest.raises(ValueError, match="expected start < end, tau > 0"): betas(500, **wheels)


@pytest.mark.parametrize("T", (2, *COUNTS))
@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_equals_diffusers(name, T):
    "Lin et al. 2023, algorithm 1, as Diffusers has it: abar shifted instead of its root, a start that moves."
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    if name == "linear" and T <= 20: T = 21
    betas = SCHEDULES[name](T)
    ours = zero_terminal_snr(betas)
    same(ours, ddim.rescale_zero_terminal_snr(betas), 1e-9)
    schedule = NoiseSchedule(ours)
    assert schedule.exact["snr"][-1] == 0 and ours[-1] == 1
    same(schedule.exact["alphas_cumprod"][0], (1-betas)[0], 1e-12)
    assert all(value.isfinite().all() for value in schedule.exact.values())


@pytest.mark.parametrize("betas", [[1., .5], [.1, 1., .5], [.1, 1.1], [.1, float("nan")]])
def test_only_the_last_beta_may_be_one(betas):
    "abar = 0 in the middle: everything after it is 0/0."
    with pytest.raises(ValueError, match="the last may be 1"): NoiseSchedule(torch.tensor(betas))


@pytest.mark.parametrize("T", COUNTS)
def test_linear_ends(T):
    "Catches a line that is rescaled at one end only."
    betas = linear_betas(T)
    assert betas[0].item() == pytest.approx(.1/T) and betas[-1].item() == pytest.approx(20/T)
    same(betas.diff(), betas.diff().mean().expand(T-1), 1e-14)


def test_diffusers_names_other_curves():
    """Cosine is the same in Diffusers; its linear and its sigmoid are not ours.

    Catches the day on which one of them changes, and an import of the wrong sigmoid."""
    diffusers = pytest.importorskip("diffusers")
    theirs = {name: diffusers.DDPMScheduler(500, beta_schedule=name).betas.double() for name in ("linear", "squaredcos_cap_v2", "sigmoid")}
    same(cosine_betas(500), theirs["squaredcos_cap_v2"], 1e-6)
    assert (linear_betas(500)/theirs["linear"]-2).abs().max() < 1e-5  # without the factor 1000/T
    assert (sigmoid_betas(500)-theirs["sigmoid"]).abs().max() > .9


GOLDEN = {  # T = 500: abar at T/4, T/2, 3T/4, T, then sqrt(abar) at T, as printed in the course
    "linear": (".5245", ".0781", ".0033", "3.8e-5", ".0061"), "linear in Diffusers": (".7246", ".2807", ".0579", "6.4e-3", ".0797"),
    "cosine": (".8470", ".4938", ".1443", "9.7e-9", "9.9e-5"), "sigmoid": (".8509", ".5000", ".1491", "6.0e-7", "7.8e-4"),
    "sigmoid in Diffusers": (".9508", ".5498", ".0757", "6.3e-3", ".0794"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    "To half a unit of the last digit printed. Catches a shift by one step, and a sum of alphas (numbers above 1)."
    if name in SCHEDULES: betas = SCHEDULES[name](500)
    else: betas = pytest.importorskip("diffusers").DDPMScheduler(500, beta_schedule=name.split()[0]).betas.double()
    abar = derive(betas)["alphas_cumprod"]
    found = [*abar[[124, 249, 374, 499]].tolist(), abar[-1].sqrt().item()]  # code t = 124 is the paper's t = 125 = T/4
    for value, printed in zip(found, GOLDEN[name]):
        digits, _, exponent = printed.partition("e")
        unit = 10.**(int(exponent or 0)-len(digits.split(".")[1]))
        assert abs(value-float(printed)) <= .5001*unit, (value, printed)


@settings(max_examples=60, deadline=None)
@given(any_schedule)
def test_any_number_of_steps(pair):
    "Catches T that silently does not fit: betas at 1, a patch that is not clean at the start or not gone at the end."
    name, T = pair
    s = get_schedule(name, T)
    betas, abar, snr = (s.exact[key] for key in ("betas", "alphas_cumprod", "snr"))
    assert s.num_timesteps == len(betas) == T
    assert ((betas > 0) & (betas < 1)).all()
    assert (abar.diff() < 0).all() and (snr.diff() < 0).all()
    assert 1-abar[0] < (.51 if T == 2 else 1/T)  # small, the smaller the more there are; of two, cosine's first brings .5062
    assert abar[-1].sqrt() < .04  # next to nothing is left
    assert all(getattr(s, key).isfinite().all() for key in s.exact)  # in float32, too


# what follows from the betas

@settings(max_examples=60, deadline=None)
@given(any_betas)
def test_derive_is_consistent(betas):
    """Relations that any betas must satisfy. Catches a sum for the product, abar for abar_prev, a lost square root.

    The last one: without noise, xt = sqrt(abar) x0 must lead back to sqrt(abar_prev) x0 exactly."""
    d = derive(betas)
    assert all(value.shape == betas.shape and value.dtype == torch.float64 for value in d.values())
    same(d["alphas"], 1-betas, 0)
    same(d["alphas_cumprod"], d["alphas_cumprod_prev"]*d["alphas"], 1e-15)
    same(d["alphas_cumprod_prev"], torch.cat([torch.ones(1).double(), d["alphas_cumprod"][:-1]]), 0)
    same(d["snr"]*(1-d["alphas_cumprod"]), d["alphas_cumprod"], 1e-12)
    assert d["posterior_variance"][0] == 0 and (d["posterior_variance"][1:] > 0).all()
    assert (d["posterior_variance"] <= betas*(1+1e-9)).all()  # the clue from x0 can only help
    back = d["posterior_mean_x0"] + d["posterior_mean_xt"]*d["alphas_cumprod"].sqrt()
    same(back, d["alphas_cumprod_prev"].sqrt(), 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", (1, 5, 250, 498))
def test_posterior_by_bayes_rule(name, t):
    """Two densities multiplied on a grid of a million points, no formula of the paper involved.

    Catches swapped weights, beta for beta-tilde, and a standard deviation in place of a variance."""
    d = get_schedule(name, 500).exact
    abar_prev, alpha, beta, x0, xt = (*(d[k][t].item() for k in ("alphas_cumprod_prev", "alphas", "betas")), .4, -.7)
    centre, width = d["posterior_mean_x0"][t].item()*x0+d["posterior_mean_xt"][t].item()*xt, 12*math.sqrt(beta)
    x = np.linspace(centre-width, centre+width, 1_000_001)
    log_p = -(x-math.sqrt(abar_prev)*x0)**2/(2*(1-abar_prev)) - (xt-math.sqrt(alpha)*x)**2/(2*beta)
    p = np.exp(log_p-log_p.max())
    mean = (p*x).sum()/p.sum()
    assert centre == pytest.approx(mean, abs=1e-7)
    assert d["posterior_variance"][t].item() == pytest.approx((p*(x-mean)**2).sum()/p.sum(), rel=1e-6)


def test_posterior_variance_by_hand():
    "The two numbers in Diffusers' own tests (1000 steps, linear) and one done by hand: betas .1, .2 -> .2*.1/.28."
    variance = get_schedule("linear", 1000).exact["posterior_variance"]
    same(variance[[487, 999]], [.00979, .02], 1e-5)
    assert derive(torch.tensor([.1, .2]).double())["posterior_variance"][1].item() == pytest.approx(.2*.1/.28)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", (21, 500))
def test_same_steps_as_diffusers(name, T):
    """DDPMScheduler with our betas: the same xt, posterior variance and step back, at every step.

    Its alphas_cumprod are replaced by float64 ones: in float32 1-abar loses digits, and the comparison with it.
    Catches posterior weights of the wrong step, noise of variance beta, noise added at the last step."""
    diffusers = pytest.importorskip("diffusers")
    s = get_schedule(name, T)
    oracle = diffusers.DDPMScheduler(T, trained_betas=s.betas.tolist(), prediction_type="sample", clip_sample=False)
    oracle.alphas_cumprod = s.exact["alphas_cumprod"]
    x0, noise = torch.rand(1, 3, 4, 4).double()*2-1, torch.randn(1, 3, 4, 4).double()
    for t in range(T):
        xt = add_noise(x0, noise, torch.tensor([t]), s.exact["alphas_cumprod"])
        same(xt, oracle.add_noise(x0, noise, torch.tensor([t])), 1e-12)
        if t > 0: assert oracle._get_variance(t).item() == pytest.approx(s.exact["posterior_variance"][t].item(), rel=1e-6)
        step = oracle.step(x0, t, xt, generator=torch.Generator().manual_seed(t)).prev_sample
        fresh = torch.randn(xt.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        mean = s.exact["posterior_mean_x0"][t]*x0 + s.exact["posterior_mean_xt"][t]*xt
        same(mean + s.exact["posterior_variance"][t].sqrt()*fresh, step, 1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", COUNTS)
def test_same_buffers_as_lucidrains(lucidrains, name, T):
    "Every number that GaussianDiffusion registers, from its own betas. Catches abar for abar_prev, snr upside down."
    class Model(torch.nn.Module):
        channels, out_dim, self_condition = 3, 3, False
    oracle = lucidrains.GaussianDiffusion(Model(), image_size=4, timesteps=T, beta_schedule=name, objective="pred_x0")
    ours = NoiseSchedule(getattr(lucidrains, f"{name}_beta_schedule")(T))
    pairs = dict(betas="betas", alphas_cumprod="alphas_cumprod", alphas_cumprod_prev="alphas_cumprod_prev",
                 posterior_variance="posterior_variance", posterior_mean_x0="posterior_mean_coef1",
                 posterior_mean_xt="posterior_mean_coef2", snr="loss_weight")
    for mine, theirs in pairs.items():
        torch.testing.assert_close(getattr(ours, mine), getattr(oracle, theirs), rtol=1e-6, atol=0, msg=lambda m: f"{mine}: {m}")


# the module

def test_buffers_move_and_round():
    "Catches a plain tensor that stays behind on `.to(device)`, float32 arithmetic, and a schedule saved in checkpoints."
    s = get_schedule("cosine", 500)
    exact = copy.deepcopy(s.exact)
    assert set(dict(s.named_buffers())) == set(exact) and not s.state_dict() and not list(s.parameters())
    for key, value in exact.items(): assert torch.equal(getattr(s, key), value.float())
    s.to("meta")
    assert all(b.is_meta for b in s.buffers())
    assert all(torch.equal(s.exact[key], value) and value.dtype == torch.float64 for key, value in exact.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    "The same xt on the GPU as on the CPU, from buffers moved with `.to`."
    x0, noise, timesteps = torch.rand(4, 3, 8, 8)*2-1, torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 250, 499])
    s = get_schedule("linear", 500)
    here = add_noise(x0, noise, timesteps, s.alphas_cumprod)
    there = add_noise(x0.cuda(), noise.cuda(), timesteps.cuda(), s.to("cuda").alphas_cumprod)
    torch.testing.assert_close(there.cpu(), here)


def test_copies():
    "Worker processes and EMA copies need it: catches an attribute that cannot be pickled."
    s = get_schedule("sigmoid", 50)
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert repr(other) == "NoiseSchedule(sigmoid, T=50)" and torch.equal(other.exact["snr"], s.exact["snr"])


def test_accepts_lists_and_float32():
    "A colleague's betas come as a list or as float32 numbers; both must give a float64 schedule."
    for betas in ([.1, .2, .3], np.float32([.1, .2, .3]), torch.tensor([.1, .2, .3])):
        s = NoiseSchedule(betas)
        assert s.exact["alphas_cumprod"].dtype == torch.float64 and s.name == "custom"
        same(s.exact["alphas_cumprod"], [.9, .72, .504], 1e-7)


@pytest.mark.parametrize("function,words", [
    (lambda: linear_betas(20), "T = 20 gives a last beta of 1, it must stay below 1; take T > 20"),
    (lambda: linear_betas(10), "T = 10 gives a last beta of 2"),
    (lambda: linear_betas(0), "T = 0"),
    (lambda: cosine_betas(0), "T = 0"),
    (lambda: sigmoid_betas(-3), "T = -3"),
    (lambda: cosine_betas(2.5), "T = 2.5: a schedule needs a whole number"),
    (lambda: get_schedule("quadratic"), "unknown schedule 'quadratic': expected one of linear, cosine, sigmoid"),
    (lambda: get_schedule("linear", 5), "T = 5"),
    (lambda: NoiseSchedule(torch.tensor([0., .1])), "found 0 to 0.1"),
    (lambda: NoiseSchedule(torch.tensor([1., .1])), "found 0.1 to 1"),
    (lambda: NoiseSchedule(torch.tensor([-.1, .1])), "found -0.1 to 0.1"),
    (lambda: NoiseSchedule(torch.tensor([.1, math.nan])), "found nan to nan"),
    (lambda: NoiseSchedule(torch.zeros(2, 3)), r"got \(2, 3\)"),
    (lambda: NoiseSchedule([]), r"got \(0,\)"),
    (lambda: zero_terminal_snr(torch.tensor([.5])), "1 betas: expected two or more"),
])
def test_refuses(function, words):
    "Each of these would give NaN or a wrong schedule later; the message holds the value."
    with pytest.raises(ValueError, match=words): function()


def test_time_and_betas_helpers():
    "By hand. Catches a grid without 0 or 1, and a clip at 1 (division by sqrt(abar) = 0 later)."
    assert unit_time(4).tolist() == [0, .25, .5, .75, 1]
    same(betas_from(torch.tensor([1, .9, .45, 0], dtype=torch.float64)), [.1, .5, .999], 1e-12)
