"""SEN12MS beyond the optical patches: triplets, radar, land cover, the official hold-out, the SEN12MS-CR layout."""
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch

from eo_ddpm import sen12ms
from eo_ddpm.data import SEASONS, SEN12MS_HOLDOUT, SENSOR_BANDS, Patch, find_patches, split_by_scene
from eo_ddpm.sen12ms import (
    DFC2020_CLASSES, IGBP_CLASSES, IGBP_TO_DFC2020, LCCS_CLASSES, RADAR, SCHEMES, check_same_ground, class_shares,
    dominant_class, find_triplets, official_holdout, read_landcover, read_radar,
)

ALL = ("s1", "s2", "lc")
CR = ("s1", "s2", "s2_cloudy")
TABLE = """
1 Evergreen Needleleaf Forests -> 1 Forest
2 Evergreen Broadleaf Forests -> 1 Forest
3 Deciduous Needleleaf Forests -> 1 Forest
4 Deciduous Broadleaf Forests -> 1 Forest
5 Mixed Forests -> 1 Forest
6 Closed Shrublands -> 2 Shrubland
7 Open Shrublands -> 2 Shrubland
8 Woody Savannas -> 3 Savanna
9 Savannas -> 3 Savanna
10 Grasslands -> 4 Grassland
11 Permanent Wetlands -> 5 Wetlands
12 Croplands -> 6 Croplands
13 Urban and Built-up Lands -> 7 Urban/Built-up
14 Cropland/Natural Vegetation Mosaics -> 6 Croplands
15 Permanent Snow and Ice -> 8 Snow/Ice
16 Barren -> 9 Barren
17 Water Bodies -> 10 Water
"""


@contextmanager
def fails(exception, *words):
    "The block must raise this exception, and its text must hold every word."
    with pytest.raises(exception) as caught: yield
    for word in words: assert str(word) in str(caught.value)


def write_tiff(path, pixels, left=390770., **profile):
    "Write (C,H,W) as a GeoTIFF in UTM, 10 m."
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = dict(crs="EPSG:32737", transform=rasterio.Affine(10, 0, left, 0, -10, 8114180), count=count, height=height,
                   width=width, dtype=pixels.dtype) | profile
    with rasterio.open(path, "w", driver="GTiff", **profile) as dst: dst.write(pixels)
    return path


def random_pixels(sensor, *seed, size=32):
    "What a file of this sensor holds: float32 decibels, uint16 digital numbers, uint16 classes of the four layers."
    random = np.random.default_rng(seed)
    if sensor == "s1": return random.normal([[[-11.]], [[-18.]]], 3, (2, size, size)).astype(np.float32)
    if sensor != "lc": return random.integers(300, 4000, (13, size, size), dtype=np.uint16)
    layers = (range(1, 18), *[list(classes) for classes in LCCS_CLASSES.values()])
    return np.stack([random.choice(list(classes), (size, size)) for classes in layers]).astype(np.uint16)


def file_of(root, season, sensor, scene, patch, cr=False):
    stem = SEASONS[season]
    return root/(f"{stem}_{sensor}" if cr else stem)/f"{sensor}_{scene}"/f"{stem}_{sensor}_{scene}_p{patch}.tif"


def write_tree(root, places, sensors=ALL, cr=False):
    "A small SEN12MS or SEN12MS-CR of places (season, scene, patch), each seeded by its own numbers."
    for season, scene, patch in places:
        for i, sensor in enumerate(sensors):
            write_tiff(file_of(root, season, sensor, scene, patch, cr), random_pixels(sensor, scene, patch, i))
    return root


PLACES = [("summer", 2, 1), ("summer", 2, 2), ("summer", 2, 10), ("summer", 10, 3), ("fall", 2, 1)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "One complete tree for all tests that only read it."
    return write_tree(tmp_path_factory.mktemp("sen12ms"), PLACES)


def key(triplet, sensor="s2"):
    p = triplet[sensor]
    return p.season, p.scene, p.patch


# --- classes ---


def test_names_and_mapping_value_by_value():
    "Catches one class mapped or named wrongly: 14 is cropland, 8 and 9 are savanna, and numbers start at 1."
    lines = [line.split(" -> ") for line in TABLE.strip().splitlines()]
    assert len(lines) == 17 == len(IGBP_CLASSES) == len(IGBP_TO_DFC2020)
    for igbp, dfc in lines:
        (n, name), (simple, simple_name) = igbp.split(" ", 1), dfc.split(" ", 1)
        assert IGBP_CLASSES[int(n)] == name
        assert IGBP_TO_DFC2020[int(n)] == int(simple)
        assert DFC2020_CLASSES[int(simple)] == simple_name
    assert set(DFC2020_CLASSES) == set(IGBP_TO_DFC2020.values()) == set(range(1, 11))


def test_lccs_numbers():
    "Catches a layer's numbers put under another's name: towns are 9 in use only, wetlands 27 and 50 in hydrology only."
    cover, use, hydrology = (set(LCCS_CLASSES[layer]) for layer in SENSOR_BANDS["lc"][1:])
    assert cover == {1, 2, 3, 11, 12, 13, 14, 15, 16, 21, 22, 31, 32, 41, 42, 43}
    assert use == {1, 2, 3, 9, 10, 20, 25, 30, 35, 36, 40}
    assert hydrology == {1, 2, 3, 10, 20, 27, 30, 40, 50, 51}
    for classes in LCCS_CLASSES.values():
        assert [classes[n] for n in (1, 2, 3)] == ["Barren", "Permanent Snow and Ice", "Water Bodies"]


# --- land cover ---


@pytest.fixture
def every_class(tmp_path):
    "A file that holds every number the data set allows, the fill values too."
    igbp = np.array([*range(18), 255, 255], np.uint16).reshape(4, 5)
    return write_tiff(tmp_path/"every.tif", np.stack([igbp, igbp*0+3, igbp*0+36, igbp*0+255]))


def test_every_number_in_both_schemes(every_class):
    "Catches an off-by-one in the look-up table, and 255 read as a class."
    igbp, dfc = read_landcover(every_class), read_landcover(every_class, "dfc2020")
    assert igbp.dtype == dfc.dtype == np.uint8 and igbp.shape == dfc.shape == (4, 5)
    assert igbp.ravel().tolist() == [*range(18), 0, 0]
    assert dfc.ravel().tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10, 0, 0]


def test_each_scheme_reads_its_own_layer(tree, every_class):
    "Catches all schemes reading the first layer, or rasterio's count mixed up with numpy's."
    p = find_patches(tree, sensor="lc")[0]
    with rasterio.open(p.path) as src: layers = src.read()
    for scheme, (layer, classes) in SCHEMES.items():
        values, i = read_landcover(p, scheme), SENSOR_BANDS["lc"].index(layer)
        if scheme == "dfc2020": assert set(values.ravel().tolist()) <= set(DFC2020_CLASSES)
        else: np.testing.assert_array_equal(values, layers[i])
    assert (read_landcover(every_class, "lccs_use") == 36).all()
    assert (read_landcover(every_class, "lccs_hydrology") == 0).all()


@pytest.mark.parametrize("value", [18, 31, 254, 256, 511, 65535])
@pytest.mark.parametrize("scheme", ["igbp", "dfc2020"])
def test_impossible_class_is_named(tmp_path, value, scheme):
    "Catches an impossible number passed off as unknown, or wrapped to a byte: 256 became 0, 511 became 255."
    igbp = np.full((4, 8, 8), 12, np.uint16)
    igbp[0, 3, 4] = value
    path = write_tiff(tmp_path/"odd.tif", igbp)
    with fails(ValueError, path, f"IGBP has the value {value},", "1, 2, 3", "17", "255 for unknown"):
        read_landcover(path, scheme)


@pytest.mark.parametrize("value", [np.nan, 2.5, -1])
def test_no_class_at_all(tmp_path, value):
    "Catches NaN, an interpolated 2.5 (a map resampled with averages) or -1 rounded to some class."
    path = write_tiff(tmp_path/"odd.tif", np.full((4, 8, 8), value, np.float32))
    with fails(ValueError, path, "IGBP has the value"): read_landcover(path)


def test_layers_mixed_up(tree, tmp_path):
    "Catches an LCCS layer read as IGBP: most of its numbers are no IGBP class."
    with rasterio.open(find_patches(tree, sensor="lc")[0].path) as src: layers = src.read()
    path = write_tiff(tmp_path/"mixed.tif", layers[[1, 0, 2, 3]])
    with fails(ValueError, path, "IGBP has the value 21,"): read_landcover(path)


def test_wrong_sensor_and_scheme_are_named(tree):
    "Catches optical numbers read as classes, radar as land cover, and a scheme that does not exist."
    for sensor, count in (("s2", 13), ("s1", 2)):
        p = find_patches(tree, sensor=sensor)[0]
        for patch in (p, p.path, str(p.path)):
            with fails(ValueError, p.path, f"{count} bands, expected IGBP"): read_landcover(patch)
    with fails(ValueError, "'corine'", "igbp, dfc2020, lccs_cover"): read_landcover(p, "corine")
    with fails(ValueError, "'IGBP'", "igbp"): class_shares(np.ones((2, 2), np.uint8), "IGBP")
    with fails(FileNotFoundError, "gone.tif"): read_landcover("gone.tif")


def test_window_of_a_patch_is_kept(tree):
    "Catches a patch cut from a larger map that is read whole."
    p = find_patches(tree, sensor="lc")[0]
    np.testing.assert_array_equal(read_landcover(replace(p, window=(3, 5, 8, 6))), read_landcover(p)[5:11, 3:11])


def test_shares_by_hand():
    "Catches shares that do not sum to 1, unknown pixels dropped without a word, and an order by number."
    landcover = np.uint8([[12, 12, 12, 17, 17, 0, 1, 12]])
    shares = class_shares(landcover)
    assert list(shares.items()) == [("Croplands", .5), ("Water Bodies", .25), ("unknown", .125),
                                    ("Evergreen Needleleaf Forests", .125)]
    assert class_shares(np.uint8([[10, 6]]), "dfc2020") == {"Croplands": .5, "Water": .5}
    with fails(ValueError, "class 12", "'dfc2020'"): class_shares(landcover, "dfc2020")


@pytest.mark.parametrize("landcover,expected", [
    ([[17, 17, 1]], 17), ([[0, 0, 0, 5]], 5), ([[2, 1, 2, 1]], 1), ([[0, 0]], 0),
])
def test_dominant_class_by_hand(landcover, expected):
    "Catches unknown pixels winning the vote, an off-by-one after dropping 0, and a tie decided by chance."
    found = dominant_class(np.uint8(landcover))
    assert found == expected and isinstance(found, int)


def test_merge_first_then_vote(tmp_path):
    "Catches a simplified label made by mapping the IGBP winner: three kinds of forest together beat the field."
    igbp = np.uint16([1, 1, 4, 4, 5, 5, 12, 12, 12]).reshape(1, 3, 3).repeat(4, 0)
    path = write_tiff(tmp_path/"wood.tif", igbp)
    assert dominant_class(read_landcover(path)) == 12 and IGBP_TO_DFC2020[12] == 6
    assert dominant_class(read_landcover(path, "dfc2020")) == 1


# --- radar ---


def test_radar_reads_both_channels(tree):
    "Catches VV and VH swapped, a channel lost, or another type; from a patch and from a path."
    p = find_patches(tree, sensor="s1")[0]
    with rasterio.open(p.path) as src: expected = src.read()
    for patch in (p, p.path, str(p.path)):
        db = read_radar(patch)
        assert db.dtype == np.float32 and db.shape == (2, 32, 32)
        np.testing.assert_array_equal(db, expected)
    assert db[0].mean() > db[1].mean()


def test_radar_scale_by_hand():
    "Catches 0 dB at the dark end, a missing clip, or a gamma: -25, -12.5, 0 dB are -1, 0, 1."
    db = np.float32([[[-40, -25, -12.5]], [[-5, 0, 3]]])
    x0 = RADAR.to_x0(db, ("VV", "VH"))
    assert torch.equal(x0, torch.tensor([[[-1, -1, 0]], [[.6, 1, 1]]]))
    np.testing.assert_allclose(RADAR.to_dn(x0, ("VV", "VH")), db.clip(-25, 0), atol=1e-5)
    assert RADAR.name == "radar"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_radar_is_named(tmp_path, value):
    "Catches NaN turned into 0, which in decibels is the brightest echo (ROIs1868_summer_s1_146_p202), and log10(0)."
    db = random_pixels("s1", 146, 202)
    db[1, 3, 4:6] = value
    path = write_tiff(tmp_path/"ROIs1868_summer_s1_146_p202.tif", db)
    with fails(ValueError, path, "2 pixels are NaN or infinite"): read_radar(path)
    with fails(ValueError, path, "2 pixels"): read_radar(Patch("summer", 146, 202, path, SENSOR_BANDS["s1"]))


def test_not_decibels(tree, tmp_path):
    "Catches power instead of decibels (all white on the scale), whole numbers, and an optical file."
    power = write_tiff(tmp_path/"power.tif", 10**(random_pixels("s1", 1)/10))
    with fails(ValueError, power, "nothing below 0", "10*log10"): read_radar(power)
    counts = write_tiff(tmp_path/"counts.tif", np.ones((2, 8, 8), np.uint16))
    with fails(ValueError, counts, "uint16", "float32 decibels"): read_radar(counts)
    optical = find_patches(tree)[0]
    with fails(ValueError, optical.path, "13 bands, expected VV, VH"): read_radar(optical)
    one = write_tiff(tmp_path/"one.tif", random_pixels("s1", 1)[:1])
    with fails(ValueError, one, "1 bands, expected VV, VH"): read_radar(one)


# --- triplets ---


def test_triplets_belong_together(tree):
    "Catches partners of another scene or patch, and the order of text (p10 before p2)."
    triplets = find_triplets(tree)
    assert [key(t) for t in triplets] == PLACES[:4]
    for t in triplets:
        assert list(t) == list(ALL) and key(t, "s1") == key(t, "s2") == key(t, "lc")
        assert all(f"_{sensor}_{p.scene}_p{p.patch}.tif" in p.path.name for sensor, p in t.items())
        assert check_same_ground(t) is t


def test_triplets_of_all_seasons(tree):
    "Catches scene 2 of summer paired with scene 2 of fall, and seasons sorted as text."
    triplets = find_triplets(tree, season="all")
    assert [key(t) for t in triplets] == PLACES
    assert all(len({p.season for p in t.values()}) == 1 for t in triplets)
    assert [key(t) for t in find_triplets(tree, season="fall")] == PLACES[4:]


def test_missing_partners_are_told(tmp_path, capsys):
    "Catches lists paired by position, which go wrong from the first gap on, and patches dropped without a word."
    write_tree(tmp_path, PLACES)
    for season, sensor, scene, patch in (("summer", "lc", 2, 1), ("summer", "s1", 2, 10), ("fall", "s2", 2, 1)):
        file_of(tmp_path, season, sensor, scene, patch).unlink()
    file_of(tmp_path, "summer", "s1", 2, 1).unlink()
    assert [key(t) for t in find_triplets(tmp_path)] == [("summer", 2, 2), ("summer", 10, 3)]
    out = capsys.readouterr().out
    assert "2 of 4 patches are left out" in out and "summer, scene 2, patch 1: no s1, lc" in out
    told = ["already there"]
    assert len(find_triplets(tmp_path, "all", incomplete=told)) == 2
    assert told == ["already there", "summer, scene 2, patch 1: no s1, lc", "summer, scene 2, patch 10: no s1",
                    "fall, scene 2, patch 1: no s2"]
    assert capsys.readouterr().out == ""


def test_complete_tree_says_nothing(tree, capsys):
    "Catches a warning that comes always and is then read never."
    find_triplets(tree, "all")
    assert capsys.readouterr().out == ""


def test_s2_only_download(tmp_path):
    "Catches loaders that list the radar folders; and a missing sensor that is not named."
    write_tree(tmp_path, PLACES[:2], sensors=("s2",))
    assert [key(t) for t in find_triplets(tmp_path, sensors=("s2",))] == PLACES[:2]
    with fails(FileNotFoundError, tmp_path, "no s1 patches", "ROIs1868_summer/s1_1/"): find_triplets(tmp_path)
    with fails(FileNotFoundError, "no lc patches", "lc_1"): find_triplets(tmp_path, sensors=("s2", "lc"))
    with fails(ValueError, "'sar'", "s1, s2 or lc"): find_triplets(tmp_path, sensors=("sar", "s2"))


def test_nothing_complete(tmp_path):
    "Catches an empty list that only fails hours later: radar of one scene, pictures of another."
    write_tree(tmp_path, PLACES[:1], sensors=("s1",))
    write_tree(tmp_path, PLACES[3:4], sensors=("s2",))
    with fails(ValueError, tmp_path, "no patch has all of s1, s2"): find_triplets(tmp_path, sensors=("s1", "s2"))


def test_cloud_removal_layout(tmp_path):
    "Catches s2_cloudy taken for s2, and the folder level that SEN12MS-CR has more."
    write_tree(tmp_path, PLACES, CR, cr=True)
    triplets = find_triplets(tmp_path, "all", CR)
    assert [key(t, "s2_cloudy") for t in triplets] == PLACES
    for t in triplets:
        assert "s2_cloudy" in t["s2_cloudy"].path.name and "cloudy" not in str(t["s2"].path.relative_to(tmp_path))
        assert t["s2"].path.parents[1].name == f"{SEASONS[t['s2'].season]}_s2"
        assert read_radar(check_same_ground(t)["s1"]).shape == (2, 32, 32)
    with fails(FileNotFoundError, "no lc patches"): find_triplets(tmp_path)


@pytest.mark.parametrize("change", [
    dict(left=390780.), dict(left=390769.), dict(crs="EPSG:32736"), dict(size=31),
    dict(transform=rasterio.Affine(10.1, 0, 390770, 0, -10.1, 8114180)),
])
def test_other_ground_is_named(tree, tmp_path, change):
    "Catches a map shifted by a pixel or a tenth of one, in another zone, cut smaller, or with other pixels."
    triplet = find_triplets(tree)[0]
    size = change.pop("size", 32)
    path = write_tiff(tmp_path/"elsewhere.tif", random_pixels("lc", 1, size=size), **change)
    with fails(ValueError, path, "other ground than s1"): check_same_ground(triplet | {"lc": replace(triplet["lc"], path=path)})


def test_ground_of_a_window(tree):
    "Catches whole files compared where a patch is only a part of one."
    part = {sensor: replace(p, window=(4, 8, 16, 16)) for sensor, p in find_triplets(tree)[0].items()}
    check_same_ground(part)
    with fails(ValueError, part["lc"].path, "other ground than s1"):
        check_same_ground(part | {"lc": replace(part["lc"], window=(5, 8, 16, 16))})


# --- the official hold-out ---


EVERY_SEASON = [Patch(season, scene, n, SEASONS[season])  # no files needed: 1 to 149, as in SEN12MS
                for season in SEASONS for scene in range(1, 150) for n in (1, 2)]


def scenes_of(patches): return {(p.season, p.scene) for p in patches}


def test_holdout_of_all_seasons_does_not_leak():
    "Catches scene numbers shared between seasons: 146 is held out in spring and winter, but not in summer."
    assert official_holdout(EVERY_SEASON) == SEN12MS_HOLDOUT
    train, held = split_by_scene(EVERY_SEASON, official_holdout(EVERY_SEASON))
    assert not scenes_of(train) & scenes_of(held) and len(train)+len(held) == len(EVERY_SEASON)
    assert scenes_of(held) == {(season, n) for season in SEASONS for n in SEN12MS_HOLDOUT[season]}
    assert {season for season, n in scenes_of(held) if n == 146} == {"spring", "winter"}
    assert ("summer", 146) in scenes_of(train)


@pytest.mark.parametrize("season,expected", [
    ("spring", (15, 17, 63, 97, 124, 146)), ("summer", (15, 19, 43, 72, 79, 104, 131)),
    ("fall", (30, 35, 39, 47, 61, 120, 141, 144)), ("winter", (32, 64, 107, 135, 146)),
])
def test_holdout_of_one_season(season, expected):
    "Catches a typing error in the official list (26 scenes), and a season held out by another's numbers."
    patches = [p for p in EVERY_SEASON if p.season == season]
    assert official_holdout(patches) == {season: expected}
    assert scenes_of(split_by_scene(patches, official_holdout(patches))[1]) == {(season, n) for n in expected}


def test_holdout_of_a_partial_download():
    "Catches a split that refuses a download of a few scenes, or invents scenes that are not there."
    some = [p for p in EVERY_SEASON if (p.season, p.scene) in {("summer", 15), ("summer", 59), ("fall", 15), ("fall", 30)}]
    assert official_holdout(some) == {"summer": (15,), "fall": (30,)}
    train, held = split_by_scene(some, official_holdout(some))
    assert scenes_of(train) == {("summer", 59), ("fall", 15)} and scenes_of(held) == {("summer", 15), ("fall", 30)}
    none = [p for p in some if p.scene == 59]
    assert official_holdout(none) == {}
    with fails(ValueError, "2 training and 0 held-out"): split_by_scene(none, official_holdout(none))


def test_triplets_follow_their_scene(tmp_path):
    "Catches a split of files instead of places: the radar trained on, the picture of the same ground held out."
    write_tree(tmp_path, [("summer", 146, 1), ("summer", 15, 1), ("winter", 146, 1), ("winter", 2, 1)])
    patches = [p for t in find_triplets(tmp_path, "all") for p in t.values()]
    train, held = split_by_scene(patches, official_holdout(patches))
    assert scenes_of(held) == {("summer", 15), ("winter", 146)} and len(held) == 6 and len(train) == 6


def test_everything_exported_is_documented():
    "Catches a public function without a docstring: help() shows nothing else."
    for name in sen12ms.__all__:
        if callable(function := getattr(sen12ms, name)) and not isinstance(function, type): assert function.__doc__, name
