"The network in the box: whole, small, safe, and as good as its card says."
import re

import pytest
import torch

from eo_ddpm.data import SAMPLE_HOLDOUT, SCALES, build_cache, choose, draw_patches, sample_root
from eo_ddpm.metrics import radial_power_spectrum
from eo_ddpm.runs import latest_checkpoint, list_checkpoints, pretrained_run, read_info
from eo_ddpm.sampling import dpm_solver_sample
from eo_ddpm.training import held_loss, load_run


@pytest.fixture(scope="module")
def held():
    "The held-out patches that its card speaks of."
    info = read_info(pretrained_run())
    cache = build_cache(sample_root(), None, info["cache_size"], tuple(info["bands"]), SCALES["natural"])
    return choose(cache.pixels, cache.split(SAMPLE_HOLDOUT)[1], "cpu")


def test_what_is_in_the_box():
    "Catches a box of more than 12 MB, a damaged one, a second checkpoint left in, and anything that could hold code."
    files = [p for p in pretrained_run().rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".md", ".png"}
    assert sum(p.stat().st_size for p in files) < 12e6
    assert list_checkpoints(pretrained_run()) == [latest_checkpoint(pretrained_run())]


def test_it_is_as_good_as_its_card_says(held):
    "Catches weights or a schedule that are not those the card was written for, and a rounding to 16 bits that costs quality."
    network, schedule, config = load_run(pretrained_run())
    said = float(re.search(r"held-out loss .*\| ([\d.]+) \|", (pretrained_run()/"README.md").read_text(encoding="utf-8")).group(1))
    assert held_loss(network, held, config, schedule, "float32") == pytest.approx(said, rel=.03)


def test_it_paints(held):
    "Catches black, grey, noisy or overflowing samples: contrast and texture of held-out land, within a factor of three, over 48 patches."
    network, schedule, config = load_run(pretrained_run())
    noise = torch.randn(48, 3, config.size, config.size, generator=torch.Generator().manual_seed(0))
    painted = dpm_solver_sample(network, schedule, noise, config.objective)
    real = draw_patches(held, torch.arange(len(held)), config.size, "none", torch.Generator().manual_seed(0))
    assert painted.abs().max() <= 1 and .1 < painted.std() < .5
    ratio = radial_power_spectrum(painted)[1].mean(0)/radial_power_spectrum(real)[1].mean(0)
    assert ((ratio > 1/3) & (ratio < 3)).all()
