"""Which of Chen's wheels matters at 64 and at 128 pixels: python benchmarks/noise.py [--steps 1000] [--seeds 2] [--sizes 64 128]

Small networks that differ in the schedule alone, the same ground (1280 m) in pixels of 20 and of 10 m, 16 x 16 places for both. Each
is judged at fixed noise levels on held-out patches, and by what it paints with 25 calls, its strides even in t or in log-SNR. Prints two
tables in Markdown. 12 networks of 1000 steps: some 10 minutes on two cores."""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from eo_ddpm.data import draw_patches, sample_pixels
from eo_ddpm.metrics import image_features, kid, loss_by_step, radial_power_spectrum, steps_at, wiener_loss
from eo_ddpm.sampling import ddim_sample
from eo_ddpm.schedules import NoiseSchedule, cosine_betas, scale_input, sigmoid_betas
from eo_ddpm.training import copy_weights, keep_memory, lr_factor, pick_precision, start_quietly, train_step, update_ema
from eo_ddpm.unet import UNet

T, CALLS = 500, 25
SCHEDULES = {"cosine": cosine_betas(T), "cosine, b = 1/2": scale_input(cosine_betas(T), .5), "sigmoid, tau 0.4": sigmoid_betas(T, tau=.4)}
LEVELS = torch.arange(4., -8.5, -2)


def dice(seed): return torch.Generator().manual_seed(seed)


def crops(pixels, n, size, chance, flips="all"):
    "1280 m of ground in `size` pixels."
    index = torch.randint(len(pixels), (n,), generator=chance)
    return F.avg_pool2d(draw_patches(pixels, index, 128, flips, chance), 128//size).contiguous()


def learn(train, size, schedule, seed, steps, batch, precision):
    "An averaged network of 2.5 million weights."
    torch.manual_seed(seed)
    network = start_quietly(UNet(dim=32, patch=size//16, attention=("none", "none", "full"))).to(memory_format=torch.channels_last)
    average, chance = copy_weights(network), dice(seed)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(.9, .99), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = 2e-3*lr_factor(step, 50, steps)
        train_step(network, optimizer, crops(train, batch, size, chance), schedule, "x0", precision=precision, generator=chance)
        update_ema(average, network, step, .995)
    return average


def even_steps(schedule, calls):
    "Strides of one length in log-SNR."
    log_snr = schedule.exact["snr"].log()
    return steps_at(schedule, torch.linspace(log_snr[0], log_snr[-3], calls)).unique().flip(0).tolist()


def bands(x0):
    "Spread of the mean colour, and power of waves of 640 to 320, 160 to 80 and 80 to 40 m, in decibels."
    rings = radial_power_spectrum(x0)[1].mean(0)
    powers = [x0.mean((2, 3)).var(0).mean(), *(rings[a-2:2*a-2].mean() for a in (2, 8, 16))]
    return 10*torch.stack(powers).log10()


def paint(network, schedule, size, steps, n, precision):
    parts = torch.randn(n, 3, size, size, generator=dice(1)).split(32)
    return torch.cat([ddim_sample(network, schedule, xt, "x0", steps=steps) for xt in parts])


def several(values, form="{:.2f}"):
    "Mean, and where the seeds lie."
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 1000), ("batch", 8), ("seeds", 2), ("patches", 128)): parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    given = parser.parse_args()
    keep_memory()
    (train, held), precision, levels, pictures = sample_pixels(), pick_precision("cpu"), [], []
    for size in given.sizes:
        unseen = crops(held, 96, size, dice(5), "none")
        real, other = (crops(held, given.patches, size, dice(n), "none") for n in (6, 7))
        filtered, right = wiener_loss(crops(held, 500, size, dice(8), "none"), LEVELS.exp()), bands(real)
        features = image_features(real)
        def distance(x0): return kid(features, image_features(x0), min(40, given.patches), generator=dice(0))
        pictures.append(f"| {size} | real patches, held out | {distance(other).mean():.3f} | | " + " | ".join(f"{v:.1f}" for v in bands(other)-right) + " |")
        for name, betas in SCHEDULES.items():
            schedule, marks, judged = NoiseSchedule(betas, name), [], {}
            for seed in range(given.seeds):
                began = time.perf_counter()
                network = learn(train, size, schedule, seed, given.steps, given.batch, precision)
                seconds = time.perf_counter()-began
                marks.append(loss_by_step(network, unseen, schedule, "x0", steps_at(schedule, LEVELS), precision)/filtered)
                for strides, steps in (("t", CALLS), ("log-SNR", even_steps(schedule, CALLS))):
                    x0 = paint(network, schedule, size, steps, given.patches, precision)
                    judged.setdefault(strides, []).append((distance(x0), bands(x0)-right))
                print(f"{size} pixels, {name}, seed {seed}: {seconds:.0f} s", flush=True)
            levels.append(f"| {size} | {name} | " + " | ".join(several([m[i].item() for m in marks]) for i in range(len(LEVELS))) + " |")
            for strides, found in judged.items():
                spread = torch.cat([d for d, _ in found]).quantile(torch.tensor([.025, .975]).double())
                row = [several([d.mean().item() for d, _ in found], "{:.3f}"), f"{spread[0]:.3f} to {spread[1]:.3f}",
                       *(several([b[i].item() for _, b in found], "{:.1f}") for i in range(4))]
                pictures.append(f"| {size} | {name}, even in {strides} | " + " | ".join(row) + " |")
    print("\n| pixels | schedule | " + " | ".join(f"{level:.0f}" for level in LEVELS) + " |\n|" + "---|"*(2+len(LEVELS)))
    print("\n".join(levels))
    print("\n| pixels | schedule, strides | KID | middle 95 % of subsets | mean colour, dB | 640-320 m | 160-80 m | 80-40 m |\n|" + "---|"*8)
    print("\n".join(pictures))


if __name__ == "__main__": main()
