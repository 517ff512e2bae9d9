"metrics.py: against closed forms, hand-computed numbers, torchmetrics, known fields and planted faults."
import json
import math
import shutil

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from eo_ddpm import metrics
from eo_ddpm.metrics import (frechet_distance, image_features, kid, loss_by_step, nearest_neighbours, radial_power_spectrum,
                             random_crops, real_features, run_data, steps_at, turned, turned_back, wiener_loss)
from eo_ddpm.runs import example_runs, pretrained_run, read_evaluation
from eo_ddpm.schedules import get_schedule


def rows(n, d, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def exactly(mean, covariance, n=400, seed=0):
    "n rows whose sample mean and sample covariance are just these."
    x = rows(n, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov().view(len(mean), -1))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


# Fréchet distance

def test_one_dimension_by_hand():
    "Catches a population variance for a sample variance, or spreads that are not squared: (3-1)^2 + (4-2)^2 = 8."
    a, b = exactly(torch.tensor([1.]).double(), torch.tensor([[4.]]).double()), exactly(torch.tensor([3.]).double(), torch.tensor([[16.]]).double())
    assert frechet_distance(a, b) == pytest.approx(8, rel=1e-9)


def test_gaussians_in_closed_form():
    "Catches tr(A B) for tr sqrt(AB): commuting covariances with known roots, |m|^2 + sum (sqrt a - sqrt b)^2."
    turn = torch.linalg.qr(rows(6, 6)).Q
    a, b, mean = torch.tensor([1., 4, 9, 16, 25, 36]).double(), torch.tensor([4., 4, 1, 1, 9, 0.25]).double(), torch.arange(6).double()
    found = frechet_distance(exactly(0*mean, turn @ a.diag() @ turn.T), exactly(mean, turn @ b.diag() @ turn.T, seed=1))
    assert found == pytest.approx((mean.square().sum() + (a.sqrt()-b.sqrt()).square().sum()).item(), rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(300, 200, 20), (60, 500, 20), (30, 25, 40), (2, 3, 7)])
def test_frechet_is_torchmetrics(n, m, d):
    "Catches a wrong normalisation or a root that fails for fewer rows than columns; pytorch-fid's definition, on planted features."
    a, b = rows(n, d)*torch.linspace(.5, 3, d), rows(m, d, 1)+.3
    theirs = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-4 if min(n, m) <= d else 1e-8, abs=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-4)


def test_frechet_is_biased_for_few_rows():
    "Two samples of one 256-d Gaussian are not 0 apart: about 400 (N = 25), 132 (256), 8.2 (4096), as torchmetrics says too."
    for n, expected in ((25, 400), (256, 132), (4096, 8.2)):
        assert frechet_distance(rows(n, 256, 2), rows(n, 256, 3)) == pytest.approx(expected, rel=.08)


# KID

def test_kid_is_torchmetrics():
    "Catches self-pairs left in, another degree or a kernel without its 1/d."
    a, b = rows(30, 12), rows(30, 12, 1)*1.5+.2
    assert kid(a, b, 30, 1).item() == pytest.approx(poly_mmd(a, b).item(), rel=1e-10)


def test_kid_by_hand():
    "Two rows each in one dimension: k(0,1) = 1, k(2,3) = 7^3, k across: 1, 1, 3^3, 4^3; 1 + 343 - 2*93/4."
    a, b = torch.tensor([[0.], [1.]]), torch.tensor([[2.], [3.]])
    assert kid(a, b, 2, 1).item() == pytest.approx(1 + 343 - 2*(1+1+27+64)/4, rel=1e-12)


def test_kid_is_unbiased():
    "Equal distributions, many seeds: 0 within three standard errors, at 10 samples as at 80. A biased one would be far above."
    for n in (10, 80):
        found = torch.stack([kid(rows(n, 16, 2*s), rows(n, 16, 2*s+1), n, 1)[0] for s in range(200)])
        assert found.mean().abs() < 3*found.std()/200**.5
        assert (found < 0).any()


def test_kid_subsets_are_reproducible_and_cover_the_sets():
    "Catches a generator that is not used, and subsets that are always the first rows."
    a, b = rows(60, 8), rows(60, 8, 1)+.5
    draw = lambda seed: kid(a, b, 20, 50, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1)) and draw(0).unique().numel() == 50
    many = kid(a, b, 20, 2000, torch.Generator().manual_seed(0))
    assert many.mean().item() == pytest.approx(kid(a, b, 60, 1).item(), rel=.05)


@pytest.mark.parametrize("call, text", [
    (lambda: kid(rows(5, 3), rows(9, 3), 6), "size = 6: expected 2 to 5"), (lambda: kid(rows(5, 3), rows(9, 3), 1), "size = 1"),
    (lambda: kid(rows(5, 3), rows(9, 4), 5), r"\(9, 4\), expected \(N,3\)"), (lambda: frechet_distance(rows(1, 3), rows(9, 3)), r"\(1, 3\)"),
    (lambda: frechet_distance(rows(9, 3), rows(9, 3)*math.nan), "27 features are no number"),
    (lambda: image_features(torch.zeros(2, 4, 8, 8)), r"\(2, 4, 8, 8\), expected \(N,3,H,W\)"),
    (lambda: image_features(torch.full((2, 3, 8, 8), 200.)), "must lie in"),
    (lambda: radial_power_spectrum(torch.zeros(3, 8, 8)), r"\(3, 8, 8\)"), (lambda: radial_power_spectrum(torch.zeros(1, 3, 8, 7)), "at least 8 x 8"),
    (lambda: nearest_neighbours(torch.zeros(1, 3, 8, 9), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), "expected squares"),
    (lambda: nearest_neighbours(torch.zeros(1, 3, 8, 8), torch.zeros(2, 4, 16, 16, dtype=torch.uint8)), "as many channels"),
    (lambda: nearest_neighbours(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 16, 7, dtype=torch.uint8)), "that fit")])
def test_errors(call, text):
    "Catches numbers made of sets that cannot be compared; the message names what was found."
    with pytest.raises(ValueError, match=text): call()


# features

def test_features_do_not_depend_on_the_batch():
    "Catches batch statistics (a network left in training mode) and a batch boundary that loses a row."
    x0 = torch.rand(53, 3, 32, 32, generator=torch.Generator().manual_seed(0))*2-1
    together = image_features(x0)
    assert together.shape == (53, 1280)
    torch.testing.assert_close(together[[0, 49, 50, 52]], torch.cat([image_features(x0[i:i+1]) for i in (0, 49, 50, 52)]), rtol=1e-3, atol=1e-4)


def test_features_are_those_of_bytes():
    "Catches another input scale than the network was trained with: (byte-127)/128, from the package's own forward."
    from eo_ddpm.metrics import feature_network
    pixels = torch.randint(256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    expected = feature_network().extract_features((pixels.float()-127)/128).mean((2, 3))
    torch.testing.assert_close(image_features(pixels/127.5-1), expected, rtol=1e-3, atol=1e-4)


# spectrum

def test_white_noise_is_flat():
    "Catches a window or a transform that is not normalised: power = variance at every frequency."
    noise = 2*torch.randn(400, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    frequencies, power = radial_power_spectrum(noise)
    assert frequencies.tolist() == [i/32 for i in range(2, 17)] and power.shape == (2, 15)
    torch.testing.assert_close(power, torch.full((2, 15), 4.), rtol=.05, atol=0)


@pytest.mark.parametrize("cycles, angle", [(6, 0), (10, 1), (5, .6)])
def test_a_wave_stands_at_its_frequency(cycles, angle):
    "Catches rows taken for columns or frequencies off by a ring: one wave, in any direction."
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")
    wave = torch.cos(2*math.pi*cycles/64*(x*math.cos(angle)+y*math.sin(angle)))[None, None]
    frequencies, power = radial_power_spectrum(wave)
    assert frequencies[power[0].argmax()] == pytest.approx(cycles/64, abs=.6/64)


@pytest.mark.parametrize("slope", [-1, -2, -3])
def test_fields_of_a_known_slope(slope):
    "Catches amplitude for power: random fields made with power f^slope."
    radius = (torch.fft.fftfreq(256)[:, None]**2 + torch.fft.fftfreq(256)**2).sqrt().clamp(min=1/256)
    noise = torch.randn(60, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    field = torch.fft.ifft2(torch.fft.fft2(noise)*radius**(slope/2)).real[..., 40:168, 70:198]  # a piece: no longer periodic
    frequencies, power = radial_power_spectrum(field)
    x, y = frequencies[2:40].log(), power[0, 2:40].log()
    assert torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[0].item() == pytest.approx(slope, abs=.15)


def test_spectrum_forgets_the_mean():
    "Catches brightness that leaks into the broad shapes."
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(radial_power_spectrum(x+100)[1], radial_power_spectrum(x)[1], rtol=1e-2, atol=1e-3)


# nearest neighbours

PIXELS = torch.randint(256, (5, 3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def by_hand(sample, pixels):
    "Every patch, place and way, one after the other."
    s, best = sample.shape[-1], (math.inf, None)
    for patch in pixels.float()/127.5-1:
        for top in range(patch.shape[1]-s+1):
            for left in range(patch.shape[2]-s+1):
                crop = patch[:, top:top+s, left:left+s]
                for mirrored in (crop, crop.flip(-1)):
                    for k in range(4):
                        candidate = torch.rot90(mirrored, k, (1, 2))
                        best = min(best, ((sample-candidate).square().mean().sqrt().item(), candidate), key=lambda found: found[0])
    return best


def test_nearest_is_the_nearest_of_all():
    "Catches places or ways left out, and a wrap-around of the Fourier transform, against a loop over all of them."
    samples = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))*2-1
    distances, nearest = nearest_neighbours(samples, PIXELS)
    for sample, distance, found in zip(samples, distances, nearest):
        expected, crop = by_hand(sample, PIXELS)
        assert distance.item() == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(found, crop)


@pytest.mark.parametrize("way", range(8))
def test_a_memorised_sample_is_found(way):
    "Catches a search that misses a copy because it was turned, mirrored, or lies in the last row: that would clear a thief."
    x0 = PIXELS.float()/127.5-1
    crops = torch.stack([x0[4, :, 16:24, 12:20], x0[0, :, 0:8, 0:8], x0[2, :, 7:15, 11:19]])
    grain = .02*torch.randn(crops.shape, generator=torch.Generator().manual_seed(0))
    distances, nearest = nearest_neighbours((turned(crops, way)+grain).clamp(-1, 1), PIXELS)
    torch.testing.assert_close(nearest, turned(crops, way))
    assert (distances < .025).all()


@pytest.mark.parametrize("way", range(8))
def test_turned_back(way):
    "Catches a turn whose way back is another one; all eight differ."
    x = torch.arange(32.).view(2, 4, 4)
    assert torch.equal(turned_back(turned(x, way), way), x)
    assert sum(torch.equal(turned(x, way), turned(x, other)) for other in range(8)) == 1


# Loss at one noise level, and the best linear filter

STEPS = torch.tensor([3, 100, 250, 490])

class Answer(torch.nn.Module):
    "A network that always gives the same answer."
    def __init__(self, answer): super().__init__(); self.answer = answer
    def forward(self, xt, timesteps): return self.answer(xt, timesteps)


def test_a_network_that_knows_nothing():
    "By hand: zero for the noise misses all of it, 1; zero for x0 misses snr x0^2; zero for v is x0_pred = sqrt(abar) xt."
    schedule, x0 = get_schedule("cosine", 500), .3*rows(4, 3*16*16).float().view(4, 3, 16, 16)
    zero, snr, abar = Answer(lambda xt, t: torch.zeros_like(xt)), schedule.snr[STEPS], schedule.alphas_cumprod[STEPS]
    noise_loss = loss_by_step(zero, x0, schedule, "noise", STEPS)
    assert noise_loss.tolist() == pytest.approx([noise_loss[0].item()]*4, rel=1e-3)  # the same noise at every step
    assert noise_loss[0].item() == pytest.approx(1, abs=.1)
    assert loss_by_step(zero, x0, schedule, "x0", STEPS).tolist() == pytest.approx((snr*x0.square().mean()).tolist(), rel=1e-4)
    v_loss = abar*(1-abar)*noise_loss + (1-abar)**2*x0.square().mean()  # mean |sqrt(abar) xt - x0|^2, nearly: x0 and noise are unlike
    assert loss_by_step(zero, x0, schedule, "v", STEPS).tolist() == pytest.approx((snr*v_loss).tolist(), rel=.1)


@pytest.mark.parametrize("objective", ["noise", "x0", "v"])
def test_a_network_that_knows_everything(objective):
    "Catches a loss that is not that of the noise: the right answer, half a unit off in the noise, costs 1/4 under any objective."
    schedule, x0 = get_schedule("sigmoid", 500), .3*rows(4, 3*16*16).float().view(4, 3, 16, 16)
    def answer(xt, timesteps):
        abar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (xt - abar.sqrt()*x0[:len(xt)])/(1-abar).sqrt() + .5
        guess = (xt - (1-abar).sqrt()*noise)/abar.sqrt()
        return dict(noise=noise, x0=guess, v=abar.sqrt()*noise - (1-abar).sqrt()*guess)[objective]
    assert loss_by_step(Answer(answer), x0, schedule, objective, STEPS).tolist() == pytest.approx([.25]*4, rel=2e-3)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_steps_at_a_level(name):
    "Catches log10 for log, and a step counted from 1."
    schedule = get_schedule(name, 500)
    assert steps_at(schedule, schedule.snr[STEPS].log()).tolist() == STEPS.tolist()


def field(size, std, slope=-2.):
    "One patch (1,1,size,size) whose waves have just the power f^slope, and the standard deviation std."
    f = (torch.fft.fftfreq(size)[:, None]**2 + torch.fft.fftfreq(size)**2).sqrt().double()
    amplitude = f.clamp(min=1/size)**(slope/2)
    amplitude[0, 0] = 0
    waves = torch.fft.fft2(rows(size, size, 5))
    x0 = torch.fft.ifft2(amplitude*waves/waves.abs()).real
    return (std*x0/x0.square().mean().sqrt())[None, None]


@pytest.mark.parametrize("name, at_30, at_15", [("linear", .071, .037), ("cosine", .139, .074), ("sigmoid", .125, .058)])
def test_linear_filter_golden_numbers(name, at_30, at_15):
    "The reference of a 1/f^2 spectrum at 128 px, T = 500, computed elsewhere (3 %: how the lowest wave is treated). Catches a missing power of snr, or x0's error for noise's."
    snr = get_schedule(name, 500).snr
    assert wiener_loss(field(128, .3), snr).mean().item() == pytest.approx(at_30, rel=.03)
    assert wiener_loss(field(128, .15), snr).mean().item() == pytest.approx(at_15, rel=.03)


def test_linear_filter_is_the_best_one():
    "Against least squares with all pixels and bands at once, on patches that know no place: catches bands treated one by one."
    base = rows(20_000, 8*8, 1).view(-1, 1, 8, 8)
    base = base + base.roll(1, -1) + base.roll(1, -2)  # neighbours alike, everywhere in the same way
    x0 = torch.cat([base, .5*base + .2*rows(20_000, 64, 2).view(-1, 1, 8, 8)], 1)
    flat = (x0-x0.mean((0, 2, 3), keepdim=True)).flatten(1)
    covariance = flat.T @ flat/len(flat)
    for snr in (.1, 1., 10.):
        left = torch.linalg.inv(torch.linalg.inv(covariance) + snr*torch.eye(128))  # covariance of x0 once xt is known
        assert wiener_loss(x0, torch.tensor([snr])).item() == pytest.approx(snr*left.trace().item()/128, rel=.02)


# What a run was trained on

def test_run_data_of_the_box():
    "Catches another split or scale than the run's: its fingerprints are compared."
    train, held = run_data(pretrained_run())
    assert (len(train), len(held)) == (71, 24) and train.dataset.shape[1:] == (3, 128, 128)
    assert not set(train.indices.tolist()) & set(held.indices.tolist())


@pytest.mark.parametrize("change, message", [
    (lambda info: info["fingerprints"].update(held="24 x 3 x 128 x 128 uint8 0000"), "was made with 24 x 3 x 128 x 128 uint8 0000"),
    (lambda info: info.update(scale=dict(lo=0, hi=5000, gamma=1., name="mine")), "was made with 71 x"),
    (lambda info: info.pop("holdout"), "config.json lacks holdout")])
def test_run_data_of_another_run(tmp_path, change, message):
    info = json.loads((pretrained_run()/"config.json").read_text(encoding="utf-8"))
    change(info)
    (tmp_path/"config.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ValueError, match=message): run_data(tmp_path)


def test_run_data_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no run of lesson 07, config.json lacks bands"): run_data(tmp_path)
    (tmp_path/"config.json").write_text('{"data": "bu', encoding="utf-8")
    with pytest.raises(ValueError, match="config.json: damaged"): run_data(tmp_path)


def test_features_of_real_patches_are_kept_and_never_stale(tmp_path, monkeypatch):
    "Catches a file that is used for other pixels, another count, size or seed, and one that was cut short."
    monkeypatch.setenv("EO_DDPM_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(metrics, "image_features", lambda x0: asked.append(len(x0)) or x0.flatten(1)[:, :5].contiguous())
    pixels = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first = real_features(pixels, 8, 12, 0)
    assert torch.equal(real_features(pixels, 8, 12, 0), first) and asked == [8]
    assert torch.equal(first, random_crops(pixels, 8, 12, 0).flatten(1)[:, :5])
    for other in [(pixels, 7, 12, 0), (pixels, 8, 11, 0), (pixels, 8, 12, 1)]: real_features(*other)
    pixels[3, 1, 2, 2] ^= 1
    real_features(pixels, 8, 12, 0)
    assert len(asked) == 5
    for path in (tmp_path/"features").iterdir(): path.write_bytes(path.read_bytes()[:-3])
    pixels[3, 1, 2, 2] ^= 1
    assert torch.equal(real_features(pixels, 8, 12, 0), first) and len(asked) == 6


# What comes with the package, for lesson 09

@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_example_runs_are_whole(name):
    "Catches a run that was trained otherwise than the two others, or that lacks what lesson 09 reads."
    run, first = (json.loads((example_runs()/n/"config.json").read_text(encoding="utf-8")) for n in (name, "linear"))
    assert run["config"] | dict(schedule="") == first["config"] | dict(schedule="")
    assert run["config"]["schedule"] == name and run["fingerprints"] == first["fingerprints"]
    assert len(read_evaluation(example_runs()/name)["losses"]) == 17
    assert {p.name for p in (example_runs()/name/"samples").iterdir()} >= {"epoch_001.png", "epoch_008.png"}


def test_examples_are_small():
    "The three runs together, the patches of four bands, and nothing in either that could hold code."
    files = {p: p.stat().st_size for p in example_runs().rglob("*") if p.is_file()}
    four = sum(size for p, size in files.items() if p.parent.name == "four_bands")
    assert sum(files.values())-four < 2e6 and four < 1e6
    assert {p.suffix for p in files} == {".json", ".csv", ".png", ".safetensors"}


def test_a_run_that_nobody_has_judged(tmp_path):
    with pytest.raises(FileNotFoundError, match="lesson 08 makes it"): read_evaluation(tmp_path)
    shutil.copy(example_runs()/"linear"/"evaluation.json", tmp_path)
    with open(tmp_path/"evaluation.json", "r+", encoding="utf-8") as f: f.truncate(100)
    with pytest.raises(ValueError, match="evaluation.json: damaged"): read_evaluation(tmp_path)
