"""Noise that is not white: Perlin's, and Gaussian noise of a given spectrum."""
import math

import numpy as np
import pytest
import torch

from eo_ddpm.noises import coloured, perlin_noise, wave_root


def dice(seed=0): return torch.Generator().manual_seed(seed)


def perlin_by_loops(angle, size):
    "Perlin 2002 for one field, pixel by pixel in plain Python: no arrays, no broadcasting, not scaled."
    cells, field = len(angle), np.zeros((size, size))
    fade = lambda t: t*t*t*(t*(t*6-15)+10)
    for i in range(size):
        for j in range(size):
            y, x = i*cells/size, j*cells/size
            row, column = int(y), int(x)
            for down in (0, 1):
                for right in (0, 1):
                    a = angle[(row+down) % cells][(column+right) % cells]
                    dy, dx = y-row-down, x-column-right
                    weight = (fade(y-row) if down else 1-fade(y-row))*(fade(x-column) if right else 1-fade(x-column))
                    field[i, j] += weight*(math.cos(a)*dx + math.sin(a)*dy)
    return field


@pytest.mark.parametrize("size, cells", [(12, 3), (16, 1), (10, 4)])
def test_perlin_is_perlin_s(size, cells):
    "Catches swapped axes, a wrong corner, a wrong blend, a field that does not repeat."
    angle = 2*math.pi*torch.rand(1, cells, cells, generator=dice(5))
    ours = perlin_noise(1, size, cells, dice(5))[0, 0].double().numpy()
    theirs = perlin_by_loops(angle[0].double().numpy(), size)
    factor = (ours*theirs).sum()/(theirs**2).sum()
    np.testing.assert_allclose(ours, factor*theirs, atol=1e-5)


@pytest.mark.parametrize("size, cells", [(64, 8), (30, 7), (16, 2)])
def test_perlin_has_variance_one(size, cells):
    "Catches a factor for another grid or blend: the chain's abar would then mean nothing."
    fields = perlin_noise(8000, size, cells, dice())
    assert fields.shape == (8000, 1, size, size) and fields.dtype == torch.float32
    assert fields.var().item() == pytest.approx(1, rel=.03) and abs(fields.mean().item()) < .02


def test_perlin_is_bounded_silent_at_corners_and_repeatable():
    "Catches slopes of another length (a Gaussian's, say), and a generator that is not used."
    fields = perlin_noise(4000, 32, 4, dice())
    assert fields[:, :, ::8, ::8].abs().max() == 0
    x = fields[:, 0, 0, 4]  # middle of an edge: half of each neighbour's slope over half a cell, so (cos a - cos b)/4
    assert 1.9 < x.abs().max()/x.std() < 2.1 and x.pow(4).mean()/x.var()**2 == pytest.approx(2.25, abs=.15)  # 1/2 against 1/4
    assert torch.equal(fields[:3], perlin_noise(4000, 32, 4, dice())[:3]) and not torch.equal(fields[:3], perlin_noise(4000, 32, 4, dice(1))[:3])


@pytest.mark.parametrize("cells", [0, -1, 8, 9])
def test_perlin_refuses(cells):
    "Catches a silent field of zeros: with as many cells as pixels every pixel is a corner."
    with pytest.raises(ValueError, match=f"cells = {cells}: expected 1 to 7"): perlin_noise(1, 8, cells)


MIX = torch.tensor([[1., 0, 0], [.5, 1, 0], [.3, -.2, .5]])


def correlated_patches(n, generator):
    "Patches with a known covariance: bands mixed, the neighbour to the left added, and to the last band the first one from above."
    white = torch.randn(n, 3, 8, 8, generator=generator)
    x0 = torch.einsum("ij,bjhw->bihw", MIX, white + .8*white.roll(1, 3))
    x0[:, 2] += white[:, 0].roll(2, 1)
    return x0


def test_root_is_the_covariance_of_the_patches():
    "Closed form: A A^H with A = mix (1 + .8 exp(-ik)) + the shifted band. Catches a wrong norm, order of bands, forgotten conjugate."
    root = wave_root(correlated_patches(20000, dice()))
    k = 2*math.pi*torch.arange(8)/8
    a = MIX*(1 + .8*torch.exp(-1j*k))[None, :, None, None].expand(8, 8, 1, 1)
    a[:, :, 2, 0] += torch.exp(-2j*k)[:, None]
    torch.testing.assert_close((root @ root.mH).to(torch.complex64), a @ a.mH, rtol=.08, atol=.1)
    torch.testing.assert_close(root, root.mH)


def test_root_counts_every_patch_once():
    "By hand: two patches of one wave, 2 and 4 high, mean square 10. Catches N-1 for N."
    wave = torch.cos(2*math.pi*torch.arange(8)/8).expand(1, 1, 8, 8)
    power = wave_root(torch.cat([2*wave, 4*wave]))[:, :, 0, 0].abs().square()
    assert power[0, 1].item() == pytest.approx(10*8*8/4) and power[1, 1] < 1e-9  # a cosine is two waves of half its height


def test_coloured_noise_has_the_patches_covariance():
    "Pixel by pixel, without Fourier: catches a root used twice, not at all or transposed, and a transform with the wrong sign."
    x0 = correlated_patches(20000, dice())
    noise = coloured(torch.randn(20000, 3, 8, 8, generator=dice(1)), wave_root(x0))
    for down, right in ((0, 0), (0, 1), (1, 0), (0, 7), (2, 0)):
        theirs, ours = (torch.einsum("bihw,bjhw->ij", x, x.roll((down, right), (2, 3)))/x[:, 0].numel() for x in (x0, noise))
        torch.testing.assert_close(ours, theirs, rtol=.05, atol=.03)


def test_own_mean_is_not_part_of_the_spectrum():
    "Catches a constant offset of a band that becomes power of the whole patch."
    x0 = correlated_patches(500, dice())
    torch.testing.assert_close(wave_root(x0 + torch.tensor([3., -2, 1]).view(3, 1, 1)), wave_root(x0), rtol=1e-4, atol=1e-4)


def test_colouring_is_linear_keeps_type_and_can_be_undone():
    "Catches a result that is not real, another dtype, a change in place."
    x0 = correlated_patches(200, dice())
    root, white = wave_root(x0), torch.randn(4, 3, 8, 8, generator=dice(2))
    before = white.clone()
    once = coloured(white, root)
    assert once.dtype == torch.float32 and once.shape == white.shape and torch.equal(white, before)
    torch.testing.assert_close(coloured(3*white, root), 3*once)
    torch.testing.assert_close(coloured(once, torch.linalg.inv(root)), white, rtol=1e-3, atol=1e-4)
    white_root = torch.eye(3).to(root).expand_as(root)
    torch.testing.assert_close(coloured(white, white_root), white)


def test_patches_that_lack_a_direction():
    "Grey patches and fewer patches than bands: catches the root of a negative eigenvalue."
    grey = torch.randn(2, 1, 8, 8, generator=dice()).expand(-1, 3, -1, -1)
    root = wave_root(grey)
    assert root.abs().isfinite().all()
    noise = coloured(torch.randn(5, 3, 8, 8, generator=dice(1)), root)
    torch.testing.assert_close(noise[:, 0], noise[:, 2], atol=1e-4, rtol=1e-4)


def test_one_jump_holds_for_coloured_noise_and_its_small_steps():
    "Catches noise whose covariance changes when it is summed: lesson 02's jump would be wrong for it."
    root, betas = wave_root(correlated_patches(5000, dice())), torch.full((10,), .2)
    chance, chain = dice(3), torch.zeros(8000, 3, 8, 8)
    for beta in betas: chain = (1-beta).sqrt()*chain + beta.sqrt()*coloured(torch.randn(chain.shape, generator=chance), root)
    jump = (1-(1-betas).prod()).sqrt()*coloured(torch.randn(chain.shape, generator=chance), root)
    for right in (0, 1):
        a, b = (torch.einsum("bihw,bjhw->ij", x, x.roll(right, 3))/x[:, 0].numel() for x in (chain, jump))
        torch.testing.assert_close(a, b, rtol=.05, atol=.03)


@pytest.mark.parametrize("shape", [(2, 3, 8, 4), (2, 1, 8, 8), (2, 3, 4, 4)])
def test_coloured_refuses_other_sizes(shape):
    "Catches a root that broadcasts over another patch size or band count."
    with pytest.raises(ValueError, match="does not fit"): coloured(torch.zeros(shape), wave_root(torch.randn(4, 3, 8, 8, generator=dice())))
