"""07_train_gpu, headless, as `make demo` and a cluster run it."""
import csv
import json
import math
import shutil
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(epochs=2, steps_per_epoch=3, batch_size=4, samples=4)

pytestmark = pytest.mark.slow


def train(out, **parameters):
    "Execute the notebook with papermill; returns the executed notebook's path."
    executed = out/"executed.ipynb"
    out.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(ROOT/"nbs/07_train_gpu.ipynb"), str(executed), dict(run=str(out), **TINY) | parameters,
                               kernel_name="python3", cwd=str(ROOT/"nbs"), progress_bar=False, execution_timeout=300)
    return executed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "One tiny run on the built-in sample, with a learning rate of its own to see that parameters arrive."
    out = tmp_path_factory.mktemp("runs")/"tiny"
    train(out, lr=.0005, seed=3)
    return out


def test_run_folder_is_whole(run):
    "Catches a run that ends well and leaves nothing, or a loss that is not a number."
    losses = [float(row["loss"]) for row in csv.DictReader(open(run/"metrics.csv", encoding="utf-8"))]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    for name in ("config.json", "loss.png", "samples/epoch_001.png", "samples/epoch_002.png", "samples/final.png"):
        assert (run/name).stat().st_size > 0
    assert (run/"checkpoints/step_0000006/ema.safetensors").is_file()
    assert list((run/"tensorboard").glob("events*"))


def test_parameters_arrive_and_are_recorded(run):
    "Catches a lost `parameters` tag: the run would use the defaults in silence."
    config = json.loads((run/"config.json").read_text(encoding="utf-8"))
    assert config["config"]["lr"] == .0005 and config["config"]["seed"] == 3 and config["config"]["batch_size"] == 4
    assert config["bands"] == ["B04", "B03", "B02"] and "not SEN12MS" in config["data"] and config["holdout"] == [7, 8]


def test_resume_goes_on(run, tmp_path):
    "Catches a resume that starts again or forgets the recorded config (here: no lr, no seed is passed)."
    again = tmp_path/"again"
    shutil.copytree(run, again)
    before = (again/"metrics.csv").read_text(encoding="utf-8")
    train(again, resume=True)
    assert (again/"metrics.csv").read_text(encoding="utf-8") == before


def test_misspelt_parameter_stops_the_run(tmp_path):
    "papermill itself only warns."
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter epoch:"): train(tmp_path, epoch=5)


def test_own_images(tmp_path):
    "Anyone's GeoTIFFs: two bands of one's own choice, a scale of one's own, files larger than a patch."
    import numpy as np
    import rasterio
    folder = tmp_path/"mine"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 3000, (4, 300, 280), dtype=np.uint16)
    profile = dict(driver="GTiff", count=4, height=300, width=280, dtype="uint16", crs="EPSG:32737", transform=rasterio.Affine(10, 0, 0, 0, -10, 0))
    for i in range(3):
        with rasterio.open(folder/f"scene{i}.tif", "w", **profile) as dst: dst.write(pixels)
    train(tmp_path/"run", data=str(folder), bands="B02,B03,B04,B08", scale="0,3000,1", holdout=3)  # as papermill hands on `-p holdout 3`
    config = json.loads((tmp_path/"run/config.json").read_text(encoding="utf-8"))
    assert config["config"]["model"]["channels"] == 4 and config["patches"] == 8 and config["holdout"] == [3]
