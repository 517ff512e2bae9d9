"metrics.py: against closed forms, hand-computed numbers, torchmetrics, known fields and planted faults."
import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from eo_ddpm.metrics import (frechet_distance, image_features, kid, nearest_neighbours, radial_power_spectrum, turned,
                             turned_back)


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
