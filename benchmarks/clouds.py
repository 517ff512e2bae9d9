"""How well are gaps filled? The network in the box (RePaint) beside averages of the seen pixels, at three sizes of cloud.

    python benchmarks/clouds.py [RUN]

Held-out crops with painted clouds; eight fills each. Scores inside the gap only, means over the patches. Ten minutes on two cores."""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from eo_ddpm.control import cloud_mask, interpolate_gap, repaint_sample, score_gap
from eo_ddpm.forward import add_noise
from eo_ddpm.metrics import random_crops, run_data
from eo_ddpm.runs import pretrained_run
from eo_ddpm.training import autocast, load_run, pick_precision

PATCHES, FILLS, STEPS, TOP = 32, 8, 25, 200  # TOP: step from which the averages are taken up, if they are


def fine(x0):
    "What a window of five pixels smooths away, squared."
    return (x0-F.avg_pool2d(x0, 5, 1, 2, count_include_pad=False)).square()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=pretrained_run(), help="a run folder")
    args = parser.parse_args()
    model, schedule, config = load_run(args.run)
    _, held = run_data(args.run)
    precision, several = pick_precision("cpu"), lambda x: x.repeat_interleave(FILLS, 0)
    crops = random_crops(held, 4*PATCHES, config.size, 3)
    truth = crops[crops.std((1, 2, 3)).argsort(descending=True)[:PATCHES]]
    print("| cloud | filled by | calls | PSNR, one | PSNR, mean of 8 | SSIM, one | SSIM, mean of 8 | fine detail, one | spread / error of the mean |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cover in (.1, .3, .6):
        chance = torch.Generator().manual_seed(0)
        seen = torch.stack([cloud_mask(config.size, cover, chance) for _ in truth])
        gap = ~seen.expand_as(truth)
        plain = interpolate_gap(torch.where(seen, truth, 0.), seen)
        noise = torch.randn(len(truth)*FILLS, *truth.shape[1:], generator=torch.Generator().manual_seed(1))
        top = torch.full((len(noise),), TOP)
        ways = [("RePaint", noise, STEPS, 1), ("RePaint", noise, STEPS, 5),
                (f"RePaint from the averages, noised to t = {TOP}", add_noise(several(plain), noise, top, schedule.alphas_cumprod),
                 list(range(TOP, 0, -20)), 5)]
        scores = score_gap(plain, truth, seen)
        detail = (fine(plain)[gap].mean()/fine(truth)[gap].mean()).sqrt()
        print(f"| {cover:.0%} | averages of seen pixels | 0 | {scores['psnr'].mean():.1f} | | {scores['ssim'].mean():.2f} | | {detail:.2f} | |", flush=True)
        for name, start, steps, repeats in ways:
            with autocast("cpu", precision):
                filled = torch.cat([repaint_sample(model, schedule, *some, config.objective, generator=torch.Generator().manual_seed(i),
                                                   steps=steps, repeats=repeats)
                                    for i, some in enumerate(zip(*(x.split(32) for x in (start, several(truth), several(seen)))))])
            filled = filled.view(len(truth), FILLS, *truth.shape[1:])
            one, mean = score_gap(filled[:, 0], truth, seen), score_gap(filled.mean(1), truth, seen)
            detail = (fine(filled[:, 0])[gap].mean()/fine(truth)[gap].mean()).sqrt()
            trust = (filled.var(1)[gap].mean()/(filled.mean(1)-truth).square()[gap].mean()).sqrt()
            count = len(steps) if isinstance(steps, list) else steps
            print(f"| {cover:.0%} | {name}, {count} levels, {repeats} times | {(count-1)*repeats+1} | {one['psnr'].mean():.1f} | "
                  f"{mean['psnr'].mean():.1f} | {one['ssim'].mean():.2f} | {mean['ssim'].mean():.2f} | {detail:.2f} | {trust:.2f} |", flush=True)


if __name__ == "__main__": main()
