"""Gap filling, redrawing and inversion against another library, exact Gaussian answers, and planted faults."""
import math

import pytest
import torch

from eo_ddpm.control import check_gap, cloud_mask, ddim_invert, interpolate_gap, redraw, repaint_sample, score_gap, slerp
from eo_ddpm.sampling import ddim_sample, seeded_noise
from eo_ddpm.schedules import SCHEDULES, get_schedule
from tiny import SHAPE, T, close, seeded_generator

STD = .25


@pytest.fixture
def known():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(4))*2-1


@pytest.fixture
def seen():
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, 2:6, 3:7] = False
    mask[1, :, :, 4:] = False
    return mask


# ---- RePaint

@pytest.mark.parametrize("name", SCHEDULES)
def test_one_walk_equals_diffusers(tiny, start, known, seen, name):
    """Known pixels noised to the wrong step, an upside-down mask, another jump.

    With eta = 0 and no clipping, because Diffusers uses one noise for both sides and does not derive it from a clipped x0_pred; x0_pred
    of an untrained noise network is divided by sqrt(abar), so the comparison begins at a moderate step."""
    diffusers, schedule = pytest.importorskip("diffusers"), get_schedule(name, T)
    theirs = diffusers.RePaintScheduler(T, eta=0., trained_betas=schedule.exact["betas"].numpy(), clip_sample=False)
    theirs.set_timesteps(T, jump_length=1, jump_n_sample=1)
    steps, chance, xt = list(range(40, -1, -1)), seeded_generator(), start
    for t in steps:
        output = tiny(xt, torch.full((2,), t))
        torch.randn(SHAPE, generator=chance)  # ours draws for DDIM first, even if eta does not use it
        xt = theirs.step(output, t, xt, known, seen.float(), chance).prev_sample.float()
    ours = repaint_sample(tiny, schedule, start, known, seen, "noise", clip=False, generator=seeded_generator(), steps=steps, repeats=1, eta=0.)
    close(ours, xt.clamp(-1, 1), 1e-3)


@pytest.mark.parametrize("t", [1, 20, 49])
def test_one_step_up_equals_diffusers(t):
    "A variance for a standard deviation on the way up: their undo_step, drawn with the same noise."
    diffusers, schedule = pytest.importorskip("diffusers"), get_schedule("cosine", T)
    theirs = diffusers.RePaintScheduler(T, trained_betas=schedule.exact["betas"].numpy())
    theirs.set_timesteps(T, jump_length=1, jump_n_sample=1)
    xt = torch.randn(SHAPE)
    expected = theirs.undo_step(xt, t, generator=seeded_generator())
    ratio = schedule.alphas_cumprod[t]/schedule.alphas_cumprod[t-1]
    close((ratio.sqrt()*xt + (1-ratio).sqrt()*torch.randn(SHAPE, generator=seeded_generator())), expected.float(), 1e-5)


def pairs(count, rho):
    "Pairs of pixels (count,1,2,1) with this correlation, and the perfect network for them."
    covariance = STD**2*torch.tensor([[1, rho], [rho, 1]])
    schedule = get_schedule("cosine", 500)
    def ideal(xt, timesteps):
        abar = schedule.alphas_cumprod[timesteps[0]]
        return abar.sqrt()*covariance @ torch.linalg.inv(abar*covariance + (1-abar)*torch.eye(2)) @ xt
    return torch.linalg.cholesky(covariance) @ torch.randn(count, 1, 2, 1, generator=torch.Generator().manual_seed(1)), ideal, schedule


@pytest.mark.parametrize("rho", [.9, -.6, 0.])
def test_fills_follow_the_exact_conditional(rho):
    "Repeats that are counted but not walked, or walked from the wrong level: then the filled pixel does not follow the seen one."
    data, ideal, schedule = pairs(3000, rho)
    seen = torch.tensor([True, False]).view(1, 1, 2, 1).expand(3000, 1, 2, 1)
    def fit(repeats):
        xt = torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
        x0 = repaint_sample(ideal, schedule, xt, data, seen, "x0", False, seeded_generator(), steps=250, repeats=repeats)
        assert torch.equal(x0[seen], data[seen].clamp(-1, 1))
        a, b = x0[:, 0, 0, 0], x0[:, 0, 1, 0]
        slope = (a*b).mean()/a.square().mean()
        return slope.item(), (b-slope*a).std().item()
    slope, left = fit(5)
    assert abs(slope-rho) < .13 and abs(left/(STD*(1-rho**2)**.5)-1) < .1  # the rest is the number of steps and of repeats
    if rho: assert abs(fit(1)[0]-rho) > 1.5*abs(slope-rho)  # once is not enough


def test_nothing_leaks_from_the_gap(tiny, start, known, seen):
    "A fill that has looked at the truth: the score would be a lie."
    run = lambda known: repaint_sample(tiny, get_schedule("cosine", T), start, known, seen, "v", generator=seeded_generator(), steps=10)
    assert torch.equal(run(known), run(torch.where(seen, known, 1.)))
    assert torch.equal(interpolate_gap(known, seen), interpolate_gap(torch.where(seen, known, torch.rand(SHAPE)), seen))


def test_seen_pixels_stay(tiny, start, known, seen):
    "A last step that leaves noise on the known pixels, or blends them."
    filled = repaint_sample(tiny, get_schedule("cosine", T), start, known, seen, "v", generator=seeded_generator(), steps=10)
    everywhere = seen.expand(SHAPE)
    assert torch.equal(filled[everywhere], known[everywhere]) and not torch.allclose(filled[~everywhere], known[~everywhere], atol=.01)
    assert torch.equal(interpolate_gap(known, seen)[everywhere], known[everywhere])
    whole = repaint_sample(tiny, get_schedule("cosine", T), start, known, torch.ones_like(seen), "v", steps=5)
    assert torch.equal(whole, known)  # nothing is missing: nothing changes


def test_fills_have_seeds_of_their_own(tiny, known, seen):
    "Fresh noise that is dealt out to the batch as a whole."
    def run(rows):
        xt, generators = seeded_noise([10+i for i in rows], SHAPE[1:])
        return repaint_sample(tiny, get_schedule("cosine", T), xt, known[rows], seen[rows], "v", generator=generators, steps=5, repeats=3)
    together = run([0, 1])
    for i in (0, 1): close(run([i])[0], together[i], 1e-5)


@pytest.mark.parametrize("steps, repeats", [(10, 1), (10, 5), (1, 5), ([40, 20, 3], 2)])
def test_number_of_network_calls(tiny, start, known, seen, steps, repeats):
    "The price on the label: all levels but the last are walked `repeats` times."
    calls = []
    def counting(xt, timesteps): calls.append(int(timesteps[0])); return tiny(xt, timesteps)
    repaint_sample(counting, get_schedule("cosine", T), start, known, seen, "v", steps=steps, repeats=repeats)
    levels = len(steps) if isinstance(steps, list) else steps
    assert len(calls) == (levels-1)*repeats+1 and calls == sorted(calls, reverse=True)


@pytest.mark.parametrize("change, words", [
    (dict(seen=torch.ones(2, 8, 8, dtype=torch.bool)), r"seen is \(2, 8, 8\), known \(2, 3, 8, 8\): expected \(B,1,H,W\)"),
    (dict(seen=torch.ones(2, 1, 8, 4, dtype=torch.bool)), r"seen is \(2, 1, 8, 4\)"),
    (dict(seen=torch.ones(2, 3, 8, 8, dtype=torch.bool)), r"seen is \(2, 3, 8, 8\)"),
    (dict(seen=torch.ones(2, 1, 8, 8)), "seen is torch.float32: expected bool"),
    (dict(seen=torch.zeros(2, 1, 8, 8, dtype=torch.bool)), "nothing is seen"),
    (dict(xt=torch.zeros(1, 3, 8, 8)), r"xt is \(1, 3, 8, 8\), known \(2, 3, 8, 8\)"),
    (dict(repeats=0), "repeats = 0: expected 1 or more"),
    (dict(eta=2.), "eta = 2.0: expected 0 to 1"),
    (dict(steps=T+1), f"steps = {T+1}: expected 1 to {T}"),
    (dict(objective="epsilon"), "unknown objective 'epsilon'"),
])
def test_repaint_refuses(tiny, start, known, seen, change, words):
    "Masks that broadcast without a word, a mask of numbers taken as a blend, and a chain of no step."
    options = dict(xt=start, known=known, seen=seen, objective="v") | change
    with pytest.raises(ValueError, match=words): repaint_sample(tiny, get_schedule("cosine", T), **options)


# ---- the plain way, and scores

def test_interpolation_of_a_plane_and_of_a_constant():
    "Rows taken for columns, a search that stops before the other side, bands mixed up."
    flat = torch.tensor([-.5, 0., .7]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    seen = cloud_mask(32, .5, seeded_generator())[None]
    close(interpolate_gap(flat, seen), flat.contiguous(), 1e-6)
    ramp = torch.linspace(-1, 1, 32).view(1, 1, 1, 32).expand(1, 1, 32, 32).contiguous()
    stripe = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    stripe[..., 14:18] = False
    filled = interpolate_gap(ramp, stripe)
    assert (filled-ramp).abs().max() < .1 and (filled[..., 14] < filled[..., 17]).all()


def test_scores_by_hand():
    "A score over the whole patch instead of the gap, a mean over the wrong axis, a data range of 1."
    truth, seen = torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    seen[:, :, 4:12, 4:8] = False
    filled = torch.where(seen, 9., torch.tensor([.1, .2]).view(2, 1, 1, 1)).expand(2, 3, 16, 16)  # far off where it does not count
    scores = score_gap(filled, truth, seen)
    close(scores["error"], torch.tensor([.01, .04]), 1e-7)
    close(scores["psnr"], torch.tensor([10*math.log10(400), 10*math.log10(100)]), 1e-3)
    same = torch.rand(2, 3, 16, 16)*2-1
    close(score_gap(same, same, seen)["ssim"], torch.ones(2), 1e-5)


def test_ssim_by_hand():
    "Another index than that of Wang et al.: for one window over constants it is (2ab + c)/(a^2 + b^2 + c), c = (.01*2)^2."
    a, b, c = .6, .2, (.01*2)**2
    seen = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    seen[..., 16, 16] = False
    flat = torch.ones(1, 3, 32, 32)
    close(score_gap(a*flat, b*flat, seen)["ssim"], torch.tensor([(2*a*b+c)/(a*a+b*b+c)]), 1e-3)


@pytest.mark.parametrize("cover", [.1, .3, .7])
def test_clouds(cover):
    "A cover that is not what was asked for, a cloud that is grain, the same cloud for every seed."
    masks = [cloud_mask(64, cover, torch.Generator().manual_seed(i)) for i in range(4)]
    for mask in masks:
        assert mask.shape == (1, 64, 64) and mask.dtype == torch.bool
        assert abs((~mask).float().mean()-cover) < .01
        borders = (mask[..., 1:] != mask[..., :-1]).float().mean()
        assert borders < .35*2*cover*(1-cover)  # grain would change sides 2 cover (1 - cover) of the time
    assert not torch.equal(masks[0], masks[1])
    for bad in (0., 1., -1.):
        with pytest.raises(ValueError, match="expected between 0 and 1"): cloud_mask(64, bad, seeded_generator())


# ---- redraw, invert, mix

@pytest.mark.parametrize("name", SCHEDULES)
def test_redraw_is_the_end_of_a_chain(tiny, known, name):
    "Noise of another step than the one the chain begins at: by hand, with the same draws."
    schedule, chance = get_schedule(name, T), seeded_generator()
    abar = schedule.alphas_cumprod[24]
    xt = abar.sqrt()*known + (1-abar).sqrt()*torch.randn(SHAPE, generator=chance)
    expected = ddim_sample(tiny, schedule, xt, "v", generator=chance, steps=list(range(24, -1, -1)), eta=1.)
    close(redraw(tiny, schedule, known, .5, "v", seeded_generator(), calls=T), expected, 1e-5)


def test_redraw_ends():
    "A strength that is turned round: little strength must keep the patch, full strength must not know it."
    schedule = get_schedule("cosine", 500)
    world = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))*2-1
    def perfect(xt, timesteps):  # for a world of these six patches
        abar = schedule.alphas_cumprod[timesteps[0]]
        fits = (abar.sqrt()*xt.flatten(1) @ world.flatten(1).T - abar*world.flatten(1).square().sum(1)/2)/(1-abar)
        return (fits.softmax(1) @ world.flatten(1)).view_as(xt)
    x0 = world.repeat(200, 1, 1, 1)
    kept = lambda strength: (redraw(perfect, schedule, x0, strength, "x0", seeded_generator(), calls=100)-x0).abs().amax((1, 2, 3)).lt(.1).float().mean()
    assert kept(.02) == 1 and abs(kept(1.)-1/6) < .06
    for bad in (0., -.1, 1.1):
        with pytest.raises(ValueError, match="expected above 0, at most 1"): redraw(perfect, schedule, x0, bad, "x0")


@pytest.mark.parametrize("name", SCHEDULES)
def test_inversion_of_gaussian_pixels(name):
    "Jumps that end one step off, noise from the wrong side: for Gaussian pixels the noise of x0 is (x0 - mean)/std, exactly, in the limit."
    schedule, mean = get_schedule(name, 500), .1
    def ideal(xt, timesteps):
        abar = schedule.alphas_cumprod[timesteps[0]]
        return mean + abar.sqrt()*STD**2/(abar*STD**2 + 1-abar)*(xt - abar.sqrt()*mean)
    x0 = (mean + STD*torch.linspace(-2.5, 2.5, 11)).view(-1, 1, 1, 1)
    noise = ddim_invert(ideal, schedule, x0, "x0", steps=500)
    close(noise, (x0-mean)/STD, .06)
    close(ddim_sample(ideal, schedule, noise, "x0", clip=False, steps=500), x0, .02)


def test_slerp():
    "A straight line called an arc, degrees for radians, shares turned round, NaN for equal ends."
    a, b = (torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    close(slerp(a, b, 0.), a, 1e-5)
    close(slerp(a, b, 1.), b, 1e-5)
    length = lambda x: x.flatten(1).norm(dim=1)
    for share in (.25, .5, .75): close(length(slerp(a, b, share))/length(a), torch.ones(3), .03)
    x, y = torch.tensor([1., 0.]).view(1, 1, 1, 2), torch.tensor([0., 1.]).view(1, 1, 1, 2)
    close(slerp(x, y, 1/3).flatten(), torch.tensor([math.cos(math.pi/6), math.sin(math.pi/6)]), 1e-6)
    close(slerp(a, a, .3), a, 1e-5)


def test_check_gap_passes_what_is_right(known, seen):
    "A check that refuses everything proves nothing."
    assert check_gap(known, seen) is None
