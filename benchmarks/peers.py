"""The training steps of two peers, written out: denoising-diffusion-pytorch 1.10.12 (`Trainer.train`) and Diffusers'
tutorial "Train a diffusion model" (`train_loop`). Both run on Accelerate, whose precision holds for a whole process; what it
does is spelled out here, so that several precisions can take turns, and held against the originals in
tests/test_benchmarks.py. Progress bars, logs, samples and checkpoints are left out.

Each builder takes the setting `s` (device, dim, size, batch, pixels), the type for autocast (torch.float32: none) and the
memory order of weights and batches, and returns (step, network): step() does all that the loop does for one batch."""
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from conftest import import_lucidrains

lucidrains = import_lucidrains()  # imports Diffusers first, which must look for torchvision before a stand-in is there
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup

T, STEPS = 500, 62_909  # noise steps; training steps of the report's eleven epochs
TUTORIAL = dict(channels=(128, 128, 256, 256, 512, 512), attention=-2, layers=2)


def batches(s, low, order):
    "Four float batches in [low,1] without end, ready on the device, as the peer's own loader would hand them over."
    pool = [(low+(1-low)*x.to(s.device)/255).contiguous(memory_format=order) for x in s.pixels[:4*s.batch].split(s.batch)]
    return itertools.cycle(pool)


def autocast(s, dtype): return torch.autocast(s.device, dtype, enabled=dtype != torch.float32)


def update(model, optimizer, scaler, loss):
    "What Accelerate makes of backward, clip_grad_norm_ and step; without float16 the scaler does nothing."
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.)
    scaler.step(optimizer)
    scaler.update()


def lucidrains_step(s, dtype=torch.float32, order=torch.contiguous_format, flash=False):
    "Trainer.train with its default settings. `flash`: the library's fused attention."
    network = lucidrains.Unet(s.dim, dim_mults=(1, 2, 4), flash_attn=flash)
    diffusion = lucidrains.GaussianDiffusion(network, image_size=s.size, timesteps=T, beta_schedule="cosine",
                                             objective="pred_noise").to(s.device, memory_format=order)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(.9, .99))
    ema = lucidrains.EMA(diffusion, beta=.995, update_every=10).to(s.device)
    scaler = torch.amp.GradScaler(s.device, enabled=dtype == torch.float16)
    data = batches(s, 0, order)
    def step():
        with autocast(s, dtype):
            loss = diffusion(next(data))/1  # gradient_accumulate_every
            loss.item()                     # total_loss += ...: waits for the device
        update(diffusion, optimizer, scaler, loss)
        optimizer.zero_grad()
        ema.update()
    return step, network


def diffusers_step(s, dtype=torch.float32, order=torch.contiguous_format, noise_device="cpu", channels=None, attention=-1, layers=1):
    """train_loop of the tutorial, which averages no weights and draws the noise on the CPU. The network has three levels and
    about our FLOPs, or what TUTORIAL says; `attention`: the one level that has some; `layers` of each level."""
    channels = channels or (s.dim, 2*s.dim, 4*s.dim)
    down = ["DownBlock2D"]*len(channels)
    down[attention] = "AttnDownBlock2D"
    network = UNet2DModel(sample_size=s.size, layers_per_block=layers, block_out_channels=channels, down_block_types=down,
                          up_block_types=[name.replace("Down", "Up") for name in down[::-1]],
                          norm_num_groups=min(32, channels[0])).to(s.device, memory_format=order)  # 32: the default
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    rates = get_cosine_schedule_with_warmup(optimizer, 500, STEPS)
    schedule, scaler = DDPMScheduler(T), torch.amp.GradScaler(s.device, enabled=dtype == torch.float16)
    data = batches(s, -1, order)
    def step():
        x0 = next(data)
        noise = torch.randn(x0.shape, device=noise_device).to(x0.device)
        timesteps = torch.randint(0, T, (len(x0),), device=x0.device)
        xt = schedule.add_noise(x0, noise, timesteps)
        with autocast(s, dtype): noise_pred = network(xt, timesteps, return_dict=False)[0]
        loss = F.mse_loss(noise_pred.float(), noise)
        update(network, optimizer, scaler, loss)
        rates.step()
        optimizer.zero_grad()
        loss.item()  # for the progress bar: waits for the device
    return step, network
