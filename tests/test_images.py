"""Images: band names, indexes, and files that say they are synthetic."""
import numpy as np
import pytest
import rasterio
import torch

from eo_ddpm.data import SCALES, find_patches, sample_root
from eo_ddpm.images import INDEX, Patch, bounds_of, find_tiles, open_image, read_index, read_tile, write_index, write_patch
from test_data import fails, random_dn, write_sen12ms, write_tiff


def test_an_index_comes_back_as_it_was(tmp_path):
    "Catches a path cut in two by a comma, a window turned into text, or 45,753 copies of the same band names."
    write_sen12ms(tmp_path/"a, b")
    write_tiff(tmp_path/"own/scene, two.tif", random_dn(0, (13, 70, 70)))
    patches = find_patches(tmp_path/"a, b")+find_tiles(tmp_path/"own", 32)
    write_index(patches, tmp_path/"index.csv")
    again = read_index(tmp_path/"index.csv")
    assert again == patches
    assert again[0].bands is again[1].bands


@pytest.mark.parametrize("text,words", [
    ("", ("expected the columns season",)), ("a,b\n1,2\n", ("found a, b",)),
    (",".join(INDEX)+"\nsummer,x,1,p.tif,B04,,\n", ("line 2", "no patch")), (",".join(INDEX)+"\nsummer,1\n", ("line 2",)),
])
def test_an_index_that_is_none(tmp_path, text, words):
    "Catches a wrong table read as an empty list of patches."
    (tmp_path/"index.csv").write_text(text)
    with fails(ValueError, tmp_path/"index.csv", *words): read_index(tmp_path/"index.csv")


@pytest.mark.parametrize("window", [None, (3, 5, 16, 8)])
def test_bounds_are_rasterio_s(tmp_path, window):
    "Catches rows and columns mixed up: rasterio's own bounds of a window are the judge."
    with open_image(write_tiff(tmp_path/"a.tif", random_dn(1, (3, 40, 30)))) as src:
        theirs = src.window_bounds(rasterio.windows.Window(*window)) if window else src.bounds
        assert bounds_of(src, window) == pytest.approx(tuple(theirs))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_painted_patch_says_so(tmp_path, dtype):
    "Catches painted pixels with a place on Earth, without a warning tag, in another order, or wrapped around 65535."
    bands = ("B02", "B03", "B04", "B08")
    dn = SCALES["reflectance"].to_dn(torch.rand(4, 24, 24)*2-1, bands)
    write_patch(tmp_path/"p.tif", dn, bands, dtype, model="demo", seed=3)
    with rasterio.open(tmp_path/"p.tif") as src:
        assert src.crs is None and src.transform == rasterio.Affine.identity() and src.descriptions == bands
        tags = src.tags()
        assert tags["SYNTHETIC"] == "yes" and tags["model"] == "demo" and tags["seed"] == "3"
        assert "not a measurement" in tags["TIFFTAG_IMAGEDESCRIPTION"] and tags["TIFFTAG_SOFTWARE"].startswith("eo_ddpm 0")
        assert src.dtypes[0] == dtype
    again = read_tile(Patch("", 1, 1, tmp_path/"p.tif", bands), ("B08", "B02"))
    np.testing.assert_allclose(again, dn[[3, 0]], atol=.51 if dtype == "uint16" else 0)
    assert [p.name for p in tmp_path.iterdir()] == ["p.tif"]


def test_painted_values_do_not_wrap(tmp_path):
    "Catches -3 written as 65533."
    write_patch(tmp_path/"p.tif", np.array([[[-3., 70000.]]]), ("B04",))
    with rasterio.open(tmp_path/"p.tif") as src: assert src.read().ravel().tolist() == [0, 65535]
    with fails(ValueError, "1 channels but 2 bands"): write_patch(tmp_path/"q.tif", np.zeros((1, 2, 2)), ("B04", "B03"))


def test_the_sample_s_files_are_read_by_any_name():
    "Catches a generic reader that differs from the reader of SEN12MS."
    from eo_ddpm.data import read_patch
    p = find_patches(sample_root())[7]
    np.testing.assert_array_equal(read_tile(p, ("B8A", "B09", "B04")), read_patch(p.path, ("B8A", "B09", "B04")))
