"""How fast does it paint? Our DDIM beside denoising-diffusion-pytorch's own sample(), with the same weights, in one run.

    python benchmarks/sample.py [--size 64] [--batch 25] [--dim 64] [--calls 20] [--device cuda]

The report's network with random weights (the time does not depend on them); then 25 patches from the network in the box. Needs the extra
`dev` and `pip install --no-deps denoising-diffusion-pytorch==1.10.12`."""
import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

from eo_ddpm.interop import load_lucidrains, lucidrains_settings
from eo_ddpm.runs import pretrained_run
from eo_ddpm.sampling import ddim_sample, dpm_solver_sample
from eo_ddpm.training import autocast, best_device, load_run, pick_precision

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(size=64, batch=25, dim=64, calls=20, rounds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default=best_device())
    args = parser.parse_args()
    device, half = args.device, pick_precision(args.device)
    lucidrains = importlib.import_module("conftest").import_lucidrains()
    torch.manual_seed(0)
    theirs = lucidrains.GaussianDiffusion(lucidrains.Unet(args.dim, dim_mults=(1, 2, 4)), image_size=args.size, timesteps=500,
                                          sampling_timesteps=args.calls, objective="pred_v").to(device).eval()
    ours = load_lucidrains(theirs.model.state_dict()).to(device).eval().requires_grad_(False)
    schedule, objective, _ = lucidrains_settings(theirs.state_dict())
    schedule = schedule.to(device)

    def sample_theirs(precision):
        torch.manual_seed(1)
        with autocast(device, precision): return theirs.sample(batch_size=args.batch)*2-1

    def sample_ours(precision):
        torch.manual_seed(1)
        xt = torch.randn(args.batch, 3, args.size, args.size, device=device)
        with autocast(device, precision): return ddim_sample(ours, schedule, xt, objective, steps=args.calls)

    ways = {f"eo_ddpm, {half}": (sample_ours, half), "eo_ddpm, float32": (sample_ours, "float32"),
            "denoising-diffusion-pytorch, as shipped (float32)": (sample_theirs, "float32"),
            f"denoising-diffusion-pytorch, {half} around it": (sample_theirs, half)}
    seconds, painted = {name: [] for name in ways}, {}
    for turn in range(args.rounds+1):  # the first is to warm up
        for name, (sample, precision) in ways.items():
            began = time.perf_counter()
            painted[name] = sample(precision)
            if device == "cuda": torch.cuda.synchronize()
            if turn: seconds[name].append(time.perf_counter()-began)
    names = list(ways)
    apart = (painted[names[1]]-painted[names[2]]).abs().max()
    print(f"{args.batch} patches of {args.size} px, dim {args.dim}, {args.calls} network calls, {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; ours and theirs in float32 differ by at most {apart:.1e}\n")
    print("| sampler | ms a network call, median (min-max) | times the peer as shipped | times the peer at the same precision |\n|---|---|---|---|")
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        low, mid, high = (1000*t/args.calls for t in (min(times), middle[name], max(times)))
        same = names[3 if half in name else 2]
        print(f"| {name} | {mid:.0f} ({low:.0f}-{high:.0f}) | {middle[names[2]]/middle[name]:.2f} | {middle[same]/middle[name]:.2f} |")
    model, schedule, config = load_run(pretrained_run(), device)
    times = []
    for _ in range(args.rounds+1):
        began = time.perf_counter()
        xt = torch.randn(25, 3, config.size, config.size, device=device)
        with autocast(device, half): dpm_solver_sample(model, schedule, xt, config.objective, steps=20)
        if device == "cuda": torch.cuda.synchronize()
        times.append(time.perf_counter()-began)
    print(f"\nThe network in the box: 25 patches of {config.size} px with 20 calls in {statistics.median(times[1:]):.2f} s, {half}")


if __name__ == "__main__": main()
