"""The command line: what it prints, what it leaves on disk, and its exit codes."""
import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner

from eo_ddpm.cli import main
from eo_ddpm.data import load_cache, sample_root
from eo_ddpm.doctor import Check
from eo_ddpm.images import read_index
from test_data import random_dn, write_sen12ms, write_tiff


def run(*words):
    "Exit code and everything printed."
    result = CliRunner().invoke(main, [str(w) for w in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_help_is_quick_and_complete():
    "Catches PyTorch imported for --help, and a command without a word about itself."
    code = "import sys, eo_ddpm.cli; print([m for m in ('torch', 'rasterio', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    for words in ((), ("sample",), ("download",), ("index",), ("doctor",), ("cache",), ("sample-images",)):
        exit_code, text = run(*words, "--help")
        assert exit_code == 0 and "Usage:" in text and all(command.help for command in main.commands.values())
    assert set(main.commands) == {"sample", "download", "index", "doctor", "cache", "sample-images"}


@pytest.mark.parametrize("words", [("cash",), ("cache",), ("doctor", "nowhere"), ("cache", ".", "x", "--dtype", "int8"), ("--verbos",)])
def test_a_wrong_command_line_is_exit_code_2(words):
    "Catches misuse that a script takes for success or for a failure of the data."
    assert run(*words)[0] == 2


def test_errors_are_sentences_and_exit_code_1(tmp_path):
    "Catches a traceback in a student's face, and an exit code of 0 for nothing done."
    (tmp_path/"empty").mkdir()
    for words in (("cache", tmp_path/"empty", tmp_path/"c"), ("doctor", tmp_path/"empty"), ("index", tmp_path/"empty"),
                  ("cache", tmp_path/"empty", tmp_path/"c", "--scale", "pretty"), ("download", "sen13ms", tmp_path)):
        exit_code, text = run(*words)
        assert exit_code == 1 and text.startswith("Error: ") and "Traceback" not in text, text


def test_sample_and_index(tmp_path):
    "Catches a count that leaves patches out, or a saved list that is not the one counted."
    assert run("sample") == (0, f"{sample_root()}\n")
    exit_code, text = run("index", sample_root(), "--out", tmp_path/"index.csv")
    assert exit_code == 0 and "95 s2 patches" in text and "summer  scene   7     12 patches" in text
    assert len(read_index(tmp_path/"index.csv")) == 95
    write_sen12ms(tmp_path/"tree", scenes={15: (1, 2), 16: (1,)})
    assert "scene  15      2 patches  (official hold-out)" in run("index", tmp_path/"tree")[1]


def test_doctor_s_exit_code_tells(tmp_path):
    "Catches a doctor whose verdict a script can't read."
    assert run("doctor", sample_root()) == (0, "nothing wrong on the scale natural\n")
    exit_code, text = run("doctor", sample_root(), "--scale", "natural@refl")
    assert exit_code == 1 and text.startswith("wrong: ") and "natural" in text
    exit_code, text = run("doctor", sample_root(), "--bands", "B02,B04,B03")
    assert exit_code == 0  # by name, so all is well in any order


@pytest.mark.parametrize("level, code", [("note", 0), ("problem", 1)])
def test_doctor_without_a_folder_looks_at_the_machine(monkeypatch, level, code):
    "Catches a note that stops a script, and a problem that does not."
    monkeypatch.setattr("eo_ddpm.doctor.check_machine", lambda: [Check(level, "memory", "1.5 GB", "close other programs")])
    exit_code, text = run("doctor")
    assert exit_code == code and text.startswith(level) and "-> close other programs" in text


def test_cache_from_own_images(tmp_path):
    "Catches options that do not arrive: bands, their order in the file, scale, size, type."
    image = random_dn(3, (4, 80, 100))
    write_tiff(tmp_path/"own/scene.tif", image)
    exit_code, text = run("cache", tmp_path/"own", tmp_path/"c", "--bands", "B04,B02", "--file-bands", "B02,B03,B04,B08",
                          "--scale", "0,65535,1", "--size", 40, "--dtype", "uint16")
    assert exit_code == 0 and "4 patches of 40 x 40" in text
    np.testing.assert_array_equal(load_cache(tmp_path/"c").pixels[1].numpy(), image[[2, 0], :40, 40:80])
    exit_code, text = run("cache", tmp_path/"own", tmp_path/"c", "--bands", "B04,B02", "--file-bands", "B02,B03,B04,B08", "--size", 30)
    assert exit_code == 1 and "made otherwise" in text and "size is 40, wanted 30" in text


def test_strict_stops_and_names_the_file(tmp_path):
    "Catches a flag that is accepted and ignored."
    root = write_sen12ms(tmp_path/"tree")
    bad = next(root.rglob("*_p10.tif"))
    bad.write_bytes(bad.read_bytes()[:5000])
    exit_code, text = run("cache", root, tmp_path/"c", "--size", 32, "--strict")
    assert exit_code == 1 and str(bad) in text
    exit_code, text = run("cache", root, tmp_path/"d", "--size", 32)
    assert exit_code == 0 and "4 patches, 1 skipped" in text


def test_download_lists_and_asks(tmp_path):
    "Catches a download without a target that begins in the current folder."
    exit_code, text = run("download")
    assert exit_code == 0 and "sen12ms-summer-s2" in text and "eurosat" in text
    assert run("download", "eurosat")[0] == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of two steps on four bands."
    import torch
    from dataclasses import asdict
    from eo_ddpm.data import SCALES
    from eo_ddpm.training import TrainConfig, fit
    folder = tmp_path_factory.mktemp("runs")/"tiny"
    config = TrainConfig(epochs=1, steps_per_epoch=2, batch_size=4, size=16, T=50, model=dict(dim=8, dim_mults=[1, 2], channels=4))
    pixels = torch.randint(0, 256, (8, 4, 16, 16), dtype=torch.uint8)
    fit(config, pixels, folder, device="cpu", progress=False,
        info=dict(bands=("B04", "B03", "B02", "B08"), scale=asdict(SCALES["reflectance"])))
    return folder


def test_painting_from_a_run(trained, tmp_path):
    "Catches GeoTIFFs with other bands or numbers than the run's, and samples that change with how many are asked for."
    words = ("sample-images", trained, "--steps", 3, "--device", "cpu")
    exit_code, text = run(*words, "-n", 3, "--out", tmp_path/"a.png", "--geotiff", tmp_path/"three")
    assert exit_code == 0 and (tmp_path/"a.png").is_file(), text
    run(*words, "-n", 30, "--out", tmp_path/"b.png", "--geotiff", tmp_path/"thirty")
    assert len(list((tmp_path/"thirty").iterdir())) == 30
    for name in ("synthetic_0000.tif", "synthetic_0002.tif"):
        with rasterio.open(tmp_path/"three"/name) as a, rasterio.open(tmp_path/"thirty"/name) as b:
            np.testing.assert_allclose(a.read().astype(int), b.read().astype(int), atol=1)  # rounding: the batches differ
            assert a.descriptions == ("B04", "B03", "B02", "B08") and a.tags()["SYNTHETIC"] == "yes" and a.crs is None
            assert a.read().max() <= 10000
    run(*words, "-n", 1, "--seed", 2, "--out", tmp_path/"c.png", "--geotiff", tmp_path/"one")
    with rasterio.open(tmp_path/"one/synthetic_0000.tif") as a, rasterio.open(tmp_path/"three/synthetic_0002.tif") as b:
        np.testing.assert_allclose(a.read().astype(int), b.read().astype(int), atol=1)  # a seed is a patch's name
        assert a.tags()["seed"] == b.tags()["seed"] == "2"
    assert run("sample-images", tmp_path)[0] == 1  # a folder, but no run


def test_a_saved_list_goes_into_a_cache(tmp_path):
    "Catches a command that promises to take what `index` has saved, and refuses it."
    root = write_sen12ms(tmp_path/"tree")
    run("index", root, "--out", tmp_path/"index.csv")
    assert run("cache", tmp_path/"index.csv", tmp_path/"c", "--size", 32)[0] == 0
    assert len(load_cache(tmp_path/"c").pixels) == 5


def test_painted_reflectances_keep_their_fractions(trained, tmp_path):
    "Catches reflectances of .1 rounded to whole numbers: every GeoTIFF would be 0."
    import shutil
    shutil.copytree(trained, tmp_path/"run")
    config = json.loads((tmp_path/"run/config.json").read_text(encoding="utf-8"))
    config["scale"] = dict(lo=0., hi=1., gamma=1., name="custom")
    (tmp_path/"run/config.json").write_text(json.dumps(config), encoding="utf-8")
    run("sample-images", tmp_path/"run", "--steps", 2, "-n", 1, "--device", "cpu", "--out", tmp_path/"a.png", "--geotiff", tmp_path/"tifs")
    with rasterio.open(tmp_path/"tifs/synthetic_0000.tif") as src: assert src.dtypes[0] == "float32" and 0 < src.read().std() < 1
