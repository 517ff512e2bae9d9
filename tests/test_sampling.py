"""Samplers against two other libraries, against exact Gaussian answers, and against planted faults."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eo_ddpm.forward import at
from eo_ddpm.sampling import (SPACINGS, VARIANCES, ddim_sample, ddim_step, ddpm_sample, ddpm_step, denoise, dpm_solver_sample,
                              draw_like, noise_from, paint_seeds, seeded_noise, spaced_steps, steps_to_visit)
from eo_ddpm.schedules import SCHEDULES, NoiseSchedule, get_schedule, zero_terminal_snr
from tiny import SHAPE, T, close, seeded_generator

SAMPLERS = [ddpm_sample, ddim_sample, dpm_solver_sample]
OBJECTIVES = ["noise", "x0", "v"]
PREDICTION = dict(noise="epsilon", x0="sample", v="v_prediction")  # Diffusers' words for the objectives


# ---- denoising-diffusion-pytorch

def their_diffusion(lucidrains, tiny, name, objective, **options):
    return lucidrains.GaussianDiffusion(tiny, image_size=8, timesteps=T, beta_schedule=name, auto_normalize=False,
                                        objective=f"pred_{objective}", **options)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddpm_equals_lucidrains_step_by_step(lucidrains, tiny, start, name, objective):
    "A wrong coefficient, a variance for a standard deviation, an index shifted by one, a missing clip."
    theirs = their_diffusion(lucidrains, tiny, name, objective)
    torch.manual_seed(11)
    xt, chain = start, []
    for t in reversed(range(T)):
        chain.append(xt)
        xt, _ = theirs.p_sample(xt, t)
    torch.manual_seed(11)  # our sampler without a generator draws from the same global source, in the same order
    ours, film = ddpm_sample(tiny, get_schedule(name, T), start, objective, trajectory=True)
    close(film[:, 0], torch.stack(chain))
    close(ours, xt.clamp(-1, 1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps, eta", [(T, 0.), (10, 0.), (T, 1.), (10, .5)])
def test_ddim_equals_lucidrains(lucidrains, tiny, monkeypatch, name, objective, steps, eta):
    """A wrong sigma, noise that is not derived again from the clipped x0_pred, steps that miss T-1.

    The numbers of steps divide T, because they cut their linspace where we round."""
    theirs = their_diffusion(lucidrains, tiny, name, objective, sampling_timesteps=steps, ddim_sampling_eta=eta)
    torch.manual_seed(11)
    expected = theirs.ddim_sample(SHAPE, return_all_timesteps=True)  # (B,steps+1,C,H,W)
    torch.manual_seed(11)
    start = torch.randn(SHAPE)
    ours, film = ddim_sample(tiny, get_schedule(name, T), start, objective, trajectory=True, steps=steps, eta=eta)
    close(film[:, 0], expected[:, :-1].transpose(0, 1))
    close(ours, expected[:, -1])


# ---- Diffusers

def diffusers_scheduler(kind, schedule, objective, **options):
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, kind)(num_train_timesteps=T, trained_betas=schedule.exact["betas"].tolist(),
                                    prediction_type=PREDICTION[objective], timestep_spacing="trailing", **options)


def their_chain(scheduler, tiny, xt, steps, **options):
    "Every xt of a Diffusers chain, the end included."
    scheduler.set_timesteps(steps)
    chain = [xt]
    for t in scheduler.timesteps:
        output = tiny(chain[-1], torch.full((len(xt),), int(t)))
        chain.append(scheduler.step(output, t, chain[-1], **options).prev_sample.float())
    return torch.stack(chain)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_equals_diffusers(tiny, start, name, objective, variance):
    "The same faults as above, against a second implementation that shares no code with the first; and either variance."
    schedule = get_schedule(name, T)
    scheduler = diffusers_scheduler("DDPMScheduler", schedule, objective, variance_type=f"fixed_{variance}", clip_sample=True)
    expected = their_chain(scheduler, tiny, start, T, generator=seeded_generator())
    ours, film = ddpm_sample(tiny, schedule, start, objective, generator=seeded_generator(), trajectory=True, variance=variance)
    close(film[:, 0], expected[:-1])
    close(ours, expected[-1].clamp(-1, 1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps, eta", [(T, 0.), (5, 0.), (T, 1.), (10, 1.)])
def test_ddim_equals_diffusers(tiny, start, name, objective, steps, eta):
    "Another sigma, another end of the chain (abar = 1 after the last step), leading instead of trailing steps."
    schedule = get_schedule(name, T)
    scheduler = diffusers_scheduler("DDIMScheduler", schedule, objective, clip_sample=True, set_alpha_to_one=True)
    expected = their_chain(scheduler, tiny, start, steps, eta=eta, use_clipped_model_output=True,
                           generator=seeded_generator())
    ours, film = ddim_sample(tiny, schedule, start, objective, generator=seeded_generator(), trajectory=True,
                             steps=steps, eta=eta)
    close(film[:, 0], expected[:-1])
    close(ours, expected[-1].clamp(-1, 1))


class AsNoise(nn.Module):
    "A network of x0 (float64), asked as one of the noise: what 1/sqrt(abar) = 10^4 does to rounding is not the question here."
    def __init__(self, tiny, abars):
        super().__init__()
        self.tiny, self.abars = tiny, abars

    def forward(self, xt, timesteps):
        abar = self.abars[timesteps][:, None, None, None]
        return (xt.double() - abar.sqrt()*self.tiny(xt.float(), timesteps).double())/(1-abar).sqrt()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25])
def test_dpm_solver_equals_diffusers(tiny, start, name, objective, steps):
    """A wrong ratio in the extrapolation, a second-order first or last step, log-SNR without its half.

    Unclipped, because Diffusers has no plain clip here; so the noise objective has a network whose x0_pred stays finite."""
    schedule = get_schedule(name, T)
    model = AsNoise(tiny, schedule.exact["alphas_cumprod"]) if objective == "noise" else tiny
    scheduler = diffusers_scheduler("DPMSolverMultistepScheduler", schedule, objective, algorithm_type="dpmsolver++",
                                    solver_order=2, final_sigmas_type="zero", lower_order_final=True)
    expected = their_chain(scheduler, model, start, steps)
    ours, film = dpm_solver_sample(model, schedule, start, objective, clip=False, trajectory=True, steps=steps)
    size = expected.abs().max().clamp(min=1)  # an untrained network leads away from [-1,1]
    close(film[:, 0]/size, expected[:-1]/size)
    rounding = 1e-6/schedule.exact["alphas_cumprod"][-1].sqrt().item()  # of xt, divided by sqrt(abar): up to 1e-3 for one step
    close(ours, expected[-1].clamp(-1, 1), max(1e-4, rounding) if objective == "noise" and steps == 1 else 1e-4)


# ---- zero terminal SNR

def to_zero(name):
    return NoiseSchedule(zero_terminal_snr(get_schedule(name, T).exact["betas"]), f"{name} to zero")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", ["x0", "v"])
@pytest.mark.parametrize("kind, sampler, steps, options", [
    ("DDPMScheduler", ddpm_sample, T, {}), ("DDIMScheduler", ddim_sample, T, {}), ("DDIMScheduler", ddim_sample, 10, {})])
def test_zero_terminal_snr_equals_diffusers(tiny, start, name, objective, kind, sampler, steps, options):
    "0/0 or log 0 at the first step, a schedule that was shifted in another way (Diffusers shifts by itself here)."
    plain = get_schedule(name, T)
    scheduler = diffusers_scheduler(kind, plain, objective, clip_sample=True, rescale_betas_zero_snr=True)
    close(scheduler.alphas_cumprod.double(), to_zero(name).exact["alphas_cumprod"], 1e-5)
    expected = their_chain(scheduler, tiny, start, steps, **({} if sampler is ddpm_sample else dict(use_clipped_model_output=True)),
                           generator=seeded_generator())
    options = {} if sampler is ddpm_sample else dict(steps=steps)
    ours, film = sampler(tiny, to_zero(name), start, objective, generator=seeded_generator(), trajectory=True, **options)
    close(film[:, 0], expected[:-1])
    close(ours, expected[-1].clamp(-1, 1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", ["x0", "v"])
def test_dpm_solver_from_zero(tiny, start, name, objective):
    "An infinite h that becomes NaN. The first jump must be DDIM's, and the second must not lean on a slope over an infinite way."
    schedule = to_zero(name)
    ours, film = dpm_solver_sample(tiny, schedule, start, objective, trajectory=True, steps=10)
    theirs, their_film = ddim_sample(tiny, schedule, start, objective, trajectory=True, steps=10)
    close(film[:3, 0], their_film[:3, 0])
    assert ours.isfinite().all() and (film[4:, 0]-their_film[4:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_says_nothing_at_zero(tiny, start, sampler):
    "Black or NaN patches in silence: from a noise prediction at abar = 0 there is no x0."
    with pytest.raises(ValueError, match=f"cosine to zero.*step {T-1} is noise alone.*x0 or v"):
        sampler(tiny, to_zero("cosine"), start, "noise")


# ---- exact answers

MEAN, STD = .1, .25


def gaussian_denoiser(schedule):
    "The exact E[x0 | xt] for pixels from N(MEAN, STD^2), by Bayes' rule."
    def ideal(xt, timesteps):
        abar = at(schedule.alphas_cumprod, timesteps, xt)
        return MEAN + abar.sqrt()*STD**2/(abar*STD**2 + 1-abar)*(xt - abar.sqrt()*MEAN)
    return ideal


def many_pixels(count=20_000):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler, options", [
    (ddpm_sample, {}), (ddim_sample, dict(steps=500)), (ddim_sample, dict(steps=500, eta=1.)),
    (dpm_solver_sample, dict(steps=250))])
def test_gaussian_data_come_back(name, sampler, options):
    "Whatever two libraries may both have wrong: the samples must have the mean and the spread of the data."
    schedule = get_schedule(name, 500)
    x0 = sampler(gaussian_denoiser(schedule), schedule, many_pixels(), "x0", False, seeded_generator(), **options)
    assert abs(x0.mean()-MEAN) < 4*STD/141  # four standard errors
    assert abs(x0.std()-STD) < .03*STD      # sampling error .5 %, the rest is the length of the steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("factor", [lambda variance: variance, lambda variance: 0*variance],
                         ids=["variance instead of standard deviation", "no fresh noise"])
def test_gaussian_data_catch_a_wrong_sigma(name, factor):
    "Planted faults, the first of them the report's misprint: the test above must be able to fail."
    schedule, xt = get_schedule(name, 500), many_pixels(2000)
    for t in reversed(range(500)):
        x0_pred = denoise(gaussian_denoiser(schedule), xt, t, schedule, "x0", False)
        xt = ddpm_step(x0_pred, xt, t, schedule, torch.zeros_like(xt))
        xt = xt + factor(schedule.posterior_variance[t])*torch.randn(xt.shape)
    assert xt.std() < .1*STD


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_spread_follows_its_recursion(name):
    "For a linear denoiser the variance obeys a recursion of plain numbers: any wrong weight at any step shifts it."
    exact, variance = get_schedule(name, 500).exact, 1.
    for t in reversed(range(500)):
        abar, abar_prev, beta = (exact[k][t].item() for k in ("alphas_cumprod", "alphas_cumprod_prev", "betas"))
        trust = abar**.5*STD**2/(abar*STD**2 + 1-abar)
        slope = (beta*abar_prev**.5*trust + (1-abar_prev)*(1-beta)**.5)/(1-abar)
        variance = slope**2*variance + (1-abar_prev)/(1-abar)*beta
    schedule = get_schedule(name, 500)
    x0 = ddpm_sample(gaussian_denoiser(schedule), schedule, many_pixels(), "x0", False, generator=seeded_generator())
    assert abs(x0.std()/variance**.5 - 1) < .02


def test_mean_by_hand():
    "Eq. 7 with numbers worked out on paper: betas .1 and .2, so abar .9 and .72; x0 = 1, xt = .5, noise = 2."
    schedule = NoiseSchedule(torch.tensor([.1, .2]))
    mean = (.9**.5*.2*1 + .8**.5*.1*.5)/.28
    sigma = (.1/.28*.2)**.5
    one = torch.ones(1, 1, 1, 1)
    close(ddpm_step(one, .5*one, 1, schedule, 2*one), (mean + 2*sigma)*one, 1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 7, 25, 48])
def test_three_forms_of_the_mean(name, t):
    "Eq. 7 (x0), eq. 11 (noise) and the score must be one mean."
    schedule = get_schedule(name, T)
    x0, noise = torch.rand(SHAPE)*2-1, torch.randn(SHAPE)
    alpha, beta, abar = schedule.alphas[t], schedule.betas[t], schedule.alphas_cumprod[t]
    xt = abar.sqrt()*x0 + (1-abar).sqrt()*noise
    mean = ddpm_step(x0, xt, t, schedule, torch.zeros(SHAPE))
    close(mean, (xt - beta/(1-abar).sqrt()*noise)/alpha.sqrt())
    close(mean, (xt - beta*(xt - abar.sqrt()*x0)/(1-abar))/alpha.sqrt())


# ---- properties

def test_last_step_adds_no_noise(start):
    "Algorithm 2: z = 0 at the last step. Adding sqrt(beta_0) leaves grain in every picture."
    for name in SCHEDULES:
        schedule = get_schedule(name, T)
        close(ddpm_step(start, torch.randn(SHAPE), 0, schedule, 1000*torch.randn(SHAPE)), start, 1e-4)
        abar, clean = schedule.alphas_cumprod[5], torch.tensor(1.)
        close(ddim_step(start, torch.randn(SHAPE), abar, clean, 1., 1000*torch.randn(SHAPE)), start, 1e-6)


@pytest.mark.parametrize("sampler, frames", [(ddpm_sample, T), (ddim_sample, 10), (dpm_solver_sample, 10)])
def test_trajectory(tiny, start, sampler, frames):
    "A film that is shifted by a frame, shares memory between frames, or changes the result."
    options = {} if sampler is ddpm_sample else dict(steps=10)
    schedule = get_schedule("cosine", T)
    run = lambda **more: sampler(tiny, schedule, start, "v", generator=seeded_generator(), **options, **more)
    x0, film = run(trajectory=True)
    assert film.shape == (frames, 2, *SHAPE) and film.device.type == "cpu"
    assert torch.equal(film[0, 0], start)
    close(film[-1, 1], x0, 1e-6)  # the last guess is the result
    assert torch.equal(run(), x0)
    assert not torch.equal(film[0, 0], film[1, 0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_result_and_start_untouched(tiny, start, sampler):
    "Randomness from outside the generator, or an in-place change of the caller's noise."
    schedule, before = get_schedule("linear", T), start.clone()
    options = {} if sampler is ddpm_sample else dict(steps=10)
    a, b = (sampler(tiny, schedule, start, generator=seeded_generator(), **options) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(start, before)
    assert a.min() >= -1 and a.max() <= 1


@pytest.mark.parametrize("sampler, options", [(ddim_sample, dict(steps=10)), (dpm_solver_sample, dict(steps=10))])
def test_nothing_is_drawn_without_eta(tiny, start, sampler, options):
    "A deterministic sampler that still uses up random numbers makes whatever comes after it depend on it."
    state = torch.get_rng_state()
    sampler(tiny, get_schedule("cosine", T), start, "v", **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_eta_one_depends_on_the_generator(tiny, start):
    "A generator that is accepted and ignored."
    def run(sampler, seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return sampler(tiny, get_schedule("cosine", T), start, "v", generator=generator, **options)
    assert not torch.equal(run(ddim_sample, 1, eta=1.), run(ddim_sample, 2, eta=1.))
    assert not torch.equal(run(ddpm_sample, 1), run(ddpm_sample, 2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip(start, sampler):
    "A clip at the wrong place: with it every guess lies in [-1,1], without it guesses may leave, the result never."
    loud = lambda xt, timesteps: 5*torch.ones_like(xt)
    for clip, limit in ((True, 1.), (False, 5.)):
        x0, film = sampler(loud, get_schedule("cosine", T), start, "x0", clip, trajectory=True)
        assert film[:, 1].max() == limit and x0.max() == 1.


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 50])
def test_far_jumps_stay_finite(tiny, start, name, steps):
    """With eta = 1 a far jump has 1 - abar - sigma^2 = 0 up to rounding: a root of -1e-8 would be NaN.

    And the log-SNR at the clean end is infinite."""
    schedule = get_schedule(name, T)
    assert ddim_sample(tiny, schedule, start, "v", steps=steps, eta=1.).isfinite().all()
    assert dpm_solver_sample(tiny, schedule, start, "v", steps=steps).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_network(tiny, start, sampler):
    "Under autocast the network answers in bfloat16. A chain kept in bfloat16 would lose its small steps."
    half = lambda xt, timesteps: tiny(xt, timesteps).bfloat16()
    x0 = sampler(half, get_schedule("cosine", T), start, "v", generator=seeded_generator())
    assert x0.dtype == torch.float32
    close(x0, sampler(tiny, get_schedule("cosine", T), start, "v", generator=seeded_generator()), .05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_result_can_be_trained_on(tiny, start, sampler):
    "No graph of T network calls behind the result, and none of torch's inference tensors, which autograd refuses."
    x0 = sampler(tiny, get_schedule("cosine", T), start, "v")
    assert not x0.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (weight*x0).square().sum().backward()
    assert weight.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1200).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_spaced_steps(case):
    "Steps that miss the pure noise at T-1, repeat, or leave the range, where steps does not divide T."
    total, steps = case
    ts = spaced_steps(total, steps)
    assert len(ts) == steps and ts[0] == total-1 and ts[-1] >= 0
    assert all(a > b for a, b in zip(ts, ts[1:]))
    gaps = [a-b for a, b in zip(ts, ts[1:])] or [1]
    assert max(gaps)-min(gaps) <= 1  # even


@settings(max_examples=30, deadline=None)
@given(st.integers(0, T-1), st.sampled_from(sorted(SCHEDULES)))
def test_noise_from_is_the_way_back(t, name):
    "x0 and the noise found from it must mix to xt again."
    abar, x0, xt = get_schedule(name, T).alphas_cumprod[t], torch.rand(SHAPE)*2-1, torch.randn(SHAPE)
    close(abar.sqrt()*x0 + (1-abar).sqrt()*noise_from(x0, xt, abar), xt, 1e-5)


# ---- errors

@pytest.mark.parametrize("sampler", [ddim_sample, dpm_solver_sample])
@pytest.mark.parametrize("steps", [0, -1, T+1, 1000])
def test_bad_steps(tiny, start, sampler, steps):
    "More steps than the schedule has would ask for a step twice; none at all would return noise as a picture."
    with pytest.raises(ValueError, match=rf"steps = {steps}: expected 1 to {T}"):
        sampler(tiny, get_schedule("cosine", T), start, steps=steps)


@pytest.mark.parametrize("eta", [-.1, 1.5, float("nan")])
def test_bad_eta(tiny, start, eta):
    "Beyond 1 the old noise would get a negative share: a silent NaN."
    with pytest.raises(ValueError, match=rf"eta = {eta}: expected 0 to 1"):
        ddim_sample(tiny, get_schedule("cosine", T), start, eta=eta)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unknown_objective(start, sampler):
    "Another library's word (epsilon, pred_v) taken for one of ours; found before the first network call is paid for."
    def never(xt, timesteps): raise AssertionError("the network was called")
    with pytest.raises(ValueError, match="unknown objective 'epsilon': expected one of noise, x0, v"):
        sampler(never, get_schedule("cosine", T), start, "epsilon")


@pytest.mark.parametrize("steps", [[], [3, 7], [7, 7], [T], [3, -1], [5, 3, 4]])
@pytest.mark.parametrize("sampler", [ddim_sample, dpm_solver_sample])
def test_bad_lists_of_steps(tiny, start, sampler, steps):
    "Steps that rise, repeat or lie outside: -1 would be taken for the last one."
    with pytest.raises(ValueError, match=rf"expected falling numbers from {T-1} to 0"):
        sampler(tiny, get_schedule("cosine", T), start, "v", steps=steps)


def test_unknown_words(tiny, start):
    "A word that is taken for the default."
    with pytest.raises(ValueError, match="unknown variance 'fixed_small': expected one of small, large"):
        ddpm_sample(tiny, get_schedule("cosine", T), start, "v", variance="fixed_small")
    with pytest.raises(ValueError, match="unknown spacing 'even': expected one of trailing, leading, linspace"):
        spaced_steps(T, 5, "even")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("xt", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_bad_start(tiny, sampler, xt):
    "A patch without its batch would be cut into bands; bytes would be noised as they are."
    with pytest.raises(ValueError, match=r"xt is \(.*expected \(B,C,H,W\), floating point"):
        sampler(tiny, get_schedule("cosine", T), xt, "v")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_network(start, sampler):
    "A network with one band (or with a variance in its answer) would be broadcast without a word."
    for channels in (1, 6):
        with pytest.raises(ValueError, match=rf"the network answers \(2, {channels}, 8, 8\) to \(2, 3, 8, 8\)"):
            sampler(lambda xt, timesteps: torch.zeros(2, channels, 8, 8), get_schedule("cosine", T), start, "v")


# ---- steps

@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total, steps", [(1000, 50), (500, 20), (50, 10), (50, 7), (1000, 3)])
def test_spacings_equal_diffusers(spacing, total, steps):
    "Another reading of the words in table 2 of Lin et al. 2023."
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    theirs, ours = scheduler.timesteps.tolist(), spaced_steps(total, steps, spacing)
    assert len(theirs) == len(ours) and max(abs(a-b) for a, b in zip(theirs, ours)) <= (0 if total % steps == 0 else 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_leading_chain_equals_diffusers(tiny, start, name):
    "A list of steps that is not walked as given, or whose last stride does not end at clean."
    schedule = get_schedule(name, T)
    scheduler = diffusers_scheduler("DDIMScheduler", schedule, "v", clip_sample=True, set_alpha_to_one=True)
    scheduler.register_to_config(timestep_spacing="leading")
    expected = their_chain(scheduler, tiny, start, 10, use_clipped_model_output=True)
    ours, film = ddim_sample(tiny, schedule, start, "v", trajectory=True, steps=spaced_steps(T, 10, "leading"))
    close(film[:, 0], expected[:-1])
    close(ours, expected[-1].clamp(-1, 1))


@pytest.mark.parametrize("sampler", [ddim_sample, dpm_solver_sample])
def test_a_list_of_steps_is_a_number_of_steps(tiny, start, sampler):
    "A list that is treated in another way than the number that stands for it."
    schedule = get_schedule("cosine", T)
    assert steps_to_visit(T, 7) == spaced_steps(T, 7)
    assert torch.equal(sampler(tiny, schedule, start, "v", steps=7), sampler(tiny, schedule, start, "v", steps=spaced_steps(T, 7)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [5, 20, 45])
def test_a_chain_may_begin_in_the_middle(name, t):
    "Noised real patches, taken up at their own step: a perfect network must bring them home, whatever the steps before."
    schedule, world = get_schedule(name, T), torch.rand(1, 3, 8, 8)*2-1
    abar = schedule.alphas_cumprod[t]
    xt = abar.sqrt()*world + (1-abar).sqrt()*torch.randn(SHAPE)
    perfect = lambda xt, timesteps: world.expand_as(xt)
    for sampler in (ddim_sample, dpm_solver_sample):
        close(sampler(perfect, schedule, xt, "x0", steps=list(range(t, -1, -1))), world.expand(SHAPE), 1e-5)


# ---- the film

@pytest.mark.parametrize("sampler, count", [(ddpm_sample, T), (ddim_sample, 10), (dpm_solver_sample, 10)])
@pytest.mark.parametrize("every", [1, 3, 7, 10])
def test_thinned_film(tiny, start, sampler, count, every):
    "A thinned film that loses its last frame, or keeps others than every n-th."
    options = {} if sampler is ddpm_sample else dict(steps=count)
    run = lambda every: sampler(tiny, get_schedule("cosine", T), start, "v", generator=seeded_generator(), trajectory=every, **options)
    (x0, film), (thin_x0, thin) = run(1), run(every)
    assert torch.equal(thin_x0, x0) and torch.equal(thin, film.flip(0)[::every].flip(0))


# ---- seeds

SEEDED = [(ddpm_sample, {}), (ddim_sample, dict(steps=10, eta=1.)), (ddim_sample, dict(steps=10)), (dpm_solver_sample, dict(steps=10))]


@pytest.mark.parametrize("sampler, options", SEEDED)
def test_alone_or_in_a_batch(tiny, sampler, options):
    "Fresh noise that is dealt out to the batch as a whole: a seed would name another picture in another company."
    def run(seeds):
        xt, generators = seeded_noise(seeds, SHAPE[1:])
        return sampler(tiny, get_schedule("cosine", T), xt, "v", generator=generators, **options)
    together = run([5, 6, 7, 8])
    for i, seed in enumerate([5, 6, 7, 8]): close(run([seed])[0], together[i], 1e-5)
    close(run([8, 5]), together[[3, 0]], 1e-5)
    assert (together[0]-together[1]).abs().max() > .1


def test_one_generator_each():
    "One seed too few, which zip would pass over."
    with pytest.raises(ValueError, match="3 generators for 2 patches: expected one for each"):
        draw_like(torch.zeros(SHAPE), [torch.Generator()]*3)
    xt, (first, _) = seeded_noise([1, 2], SHAPE[1:])
    again = torch.Generator().manual_seed(1)
    assert torch.equal(xt[0], torch.randn(SHAPE[1:], generator=again))
    assert torch.equal(draw_like(xt, [first, first])[0], torch.randn(SHAPE[1:], generator=again))  # it draws on, it does not begin anew


@pytest.mark.parametrize("sampler, options", SEEDED)
def test_paint_seeds_is_the_sampler(tiny, sampler, options):
    "A batch that is lost, doubled or out of order, whatever the batch size."
    schedule, seeds = get_schedule("cosine", T), [3, 1, 4, 15, 9]
    xt, generators = seeded_noise(seeds, SHAPE[1:])
    expected = sampler(tiny, schedule, xt, "v", generator=generators, **options)
    for batch_size in (1, 2, 5, 100):
        painted = paint_seeds(sampler, tiny, schedule, seeds, SHAPE[1:], "v", batch_size, progress=False, **options)
        close(painted, expected, 1e-5)


def test_interrupt_keeps_what_is_done(tiny, capsys):
    "Ctrl-C after minutes of painting that throws everything away; and one before anything is done that is swallowed."
    def stops_at(batch):
        calls = []
        def sampler(*args, **options):
            calls.append(1)
            if len(calls) == batch: raise KeyboardInterrupt
            return dpm_solver_sample(*args, steps=2, **options)
        return sampler
    schedule = get_schedule("cosine", T)
    run = lambda sampler: paint_seeds(sampler, tiny, schedule, list(range(6)), SHAPE[1:], "v", 2, progress=False)
    assert len(run(stops_at(3))) == 4
    assert "stopped: 4 of 6 patches are painted" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt): run(stops_at(1))


@pytest.mark.parametrize("seeds, options, words", [([], {}, "no seeds"), ([1], dict(trajectory=True), "keeps no films")])
def test_paint_seeds_refuses(tiny, seeds, options, words):
    "An error from deep inside torch for an empty list, or for a film that nobody has asked to keep."
    with pytest.raises(ValueError, match=words):
        paint_seeds(ddim_sample, tiny, get_schedule("cosine", T), seeds, SHAPE[1:], "v", progress=False, **options)
