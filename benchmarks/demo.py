"""How good is a run of lesson 07? Its patches, and those of denoising-diffusion-pytorch trained for the same minutes, judged as
lesson 08 judges.

    python benchmarks/demo.py runs/demo [--minutes 7] [--out runs/peer]

Same machine, same patches and crops, same sampler (20 calls of DPM-Solver++) from the same noise, 120 patches each against as
many held-out crops. Needs the extra `dev` and `pip install --no-deps denoising-diffusion-pytorch==1.10.12`."""
import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import nn
from tqdm import tqdm

from eo_ddpm.data import draw_patches
from eo_ddpm.interop import load_lucidrains
from eo_ddpm.metrics import FEATURES, frechet_distance, image_features, kid, random_crops, real_features, run_data
from eo_ddpm.plot import save_grid
from eo_ddpm.runs import data_and_index, read_metrics
from eo_ddpm.sampling import dpm_solver_sample
from eo_ddpm.training import autocast, load_run, new_state, pick_precision

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
N, CALLS, BATCH = 120, 20, 16


def train_peer(lucidrains, pixels, config, minutes, precision):
    "The peer's own loss, optimizer, averaging and order of work (Trainer.train), with its default settings; dim 32."
    torch.manual_seed(0)
    diffusion = lucidrains.GaussianDiffusion(lucidrains.Unet(32, dim_mults=(1, 2, 4)), image_size=config.size, timesteps=config.T,
                                             beta_schedule=config.schedule, objective="pred_noise")
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(.9, .99))
    ema = lucidrains.EMA(diffusion, beta=.995, update_every=10)
    bar, end = tqdm(unit="step", desc="peer"), time.perf_counter()+60*minutes
    while time.perf_counter() < end:
        x0 = draw_patches(pixels, torch.randint(len(pixels), (BATCH,)), config.size)
        with autocast("cpu", precision): loss = diffusion((x0+1)/2)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        bar.update()
    bar.close()
    return load_lucidrains(ema.ema_model.model.state_dict()), bar.n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of `make demo` or `make report`")
    parser.add_argument("--minutes", type=float, help="training time of the peer; default: what the run's steps took")
    parser.add_argument("--out", type=Path, default=Path("runs/peer"), help="where the grids and the peer's weights go")
    args = parser.parse_args()

    network, schedule, config = load_run(args.run)
    train, held = run_data(args.run)
    steps = read_metrics(args.run)
    minutes = args.minutes or sum(row["seconds"] for row in steps)/60
    precision = pick_precision("cpu")
    data, index = data_and_index(train)
    lucidrains = importlib.import_module("conftest").import_lucidrains()
    peer, peer_steps = train_peer(lucidrains, data[index], config, minutes, precision)
    args.out.mkdir(parents=True, exist_ok=True)
    save_model(peer, args.out/"peer.safetensors")

    noise = torch.randn(N, 3, config.size, config.size, generator=torch.Generator().manual_seed(0))
    def paint(model, objective):
        with autocast("cpu", precision):
            return torch.cat([dpm_solver_sample(model.eval(), schedule, xt, objective, steps=CALLS) for xt in noise.split(50)])
    real = real_features(held, N, config.size, 0)
    rows = [("real patches, held out, others", None, "none", random_crops(held, N, config.size, 3)),
            ("real patches, training blocks", None, "none", random_crops(train, N, config.size, 1)),
            (f"eo_ddpm, {len(steps)} steps of {config.batch_size}", "ours", f"{minutes:.1f} min", paint(network, config.objective)),
            (f"denoising-diffusion-pytorch, {peer_steps} steps of {BATCH}", "peer", f"{minutes:.1f} min", paint(peer, "noise")),
            ("untrained network", None, "none", paint(new_state(config).model, config.objective))]
    print(f"{config.size} px, {config.schedule}, {CALLS} network calls, {N} patches, {FEATURES}, {precision}, {torch.get_num_threads()} threads\n")
    print("| patches | training | KID to held-out real | Fréchet | variety |\n|---|---|---|---|---|")
    for name, grid, training, x0 in rows:
        if grid: save_grid(args.out/f"{grid}.png", x0[:64], 8, 3)
        features = image_features(x0)
        distances = kid(real, features, 40, generator=torch.Generator().manual_seed(0))
        low, high = distances.quantile(torch.tensor([.025, .975]).double())
        print(f"| {name} | {training} | {distances.mean():.3f} ({low:.3f} to {high:.3f}) | {frechet_distance(real, features):.0f} | "
              f"{torch.pdist(features).mean():.1f} |", flush=True)


if __name__ == "__main__": main()
