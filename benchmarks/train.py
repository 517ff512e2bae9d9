"""How fast is a training step, and beside what: python benchmarks/train.py [--batch 64] [--cache 45753] [--tutorial] [--levers]

The winter-school report's setting (dim 64, three levels, 128 px, T 500, noise objective, batch 8) on CUDA if there is some:
ours beside the loops of denoising-diffusion-pytorch 1.10.12 and of Diffusers' tutorial, see peers.py. A step is all that a
loop does for one batch: loss, backward, clipping, optimizer, averaging (the tutorial has none) and, in the peers' loops,
reading the loss; ours is `advance`, and what reading its loss would cost is one of the levers. Nobody pays for a progress
bar, a log or a file: the peers find ready float batches on the device, ours pays for drawing and mirroring its own from
--cache uint8 patches there (real crops of the built-in scene).

"As shipped" is what the peer's defaults do (on a CPU without the tutorial's fp16, which Accelerate refuses there), "tuned"
what its users know: bfloat16 and channels last, on CUDA also fused attention (first peer) and noise drawn there (second).
Diffusers' network differs from ours: compare its TFLOP/s (3 x forward, by torch's counter), not its steps. Seconds: in
turns, each turn a fresh process (ours changes how its process keeps memory, which the peers must not profit from), three
steps warm up; medians over rounds. Memory: beyond what was there before (CUDA: what tensors take; CPU: resident).
--levers changes one thing in ours at a time instead."""
import argparse
import copy
import ctypes
import itertools
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import MethodType
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from eo_ddpm import training
from eo_ddpm.data import crop_patches, sample_pixels
from eo_ddpm.schedules import get_schedule
from eo_ddpm.training import TrainConfig, advance, new_state, pick_precision, record_graph
from eo_ddpm.unet import Attention, to_picture
from peers import STEPS, T, TUTORIAL, diffusers_step, lucidrains_step

PATCHES = 11*45_753  # eleven epochs of the report
DDP = "denoising-diffusion-pytorch"
SHIPPED, TUNED, DEFAULT = f"{DDP}, as shipped", f"{DDP}, tuned", "eo_ddpm as it is"


def ours(s, precision=None, change=lambda state: None, around=lambda step: step, graph=True):
    "The training step of the package. `change` turns a lever of the fresh state, `around` one of the step, `graph` the recording."
    config = TrainConfig(schedule="cosine", T=T, objective="noise", model=dict(dim=s.dim, dim_mults=[1, 2, 4]), size=s.size,
                         flips="horizontal", batch_size=s.batch, lr=2e-5, ema=.995)
    precision = precision or s.precision
    state, schedule = new_state(config, s.device, precision), get_schedule("cosine", T).to(s.device)
    change(state)
    if graph: record_graph(state.model, config, precision)
    def step(): return advance(state, config, s.pixels, schedule, STEPS, precision)[0]
    return around(step), state.model


def contestants(s):
    "name -> builder of (step, network)."
    cuda, half = s.device == "cuda", torch.float16
    tuned = dict(dtype=torch.bfloat16, order=torch.channels_last)
    rows = {"eo_ddpm, bfloat16": partial(ours, precision="bfloat16"), "eo_ddpm, float32": partial(ours, precision="float32"),
            SHIPPED: lucidrains_step, TUNED: partial(lucidrains_step, **tuned, flash=cuda)}
    if cuda: rows |= {f"{SHIPPED}, amp=True": partial(lucidrains_step, dtype=half),
                      f"{TUNED}, float16": partial(lucidrains_step, **tuned | dict(dtype=half), flash=True)}
    for name, network in [("Diffusers", {}), ("Diffusers' tutorial network", TUTORIAL)][:1+s.tutorial]:
        rows |= {f"{name}, as shipped": partial(diffusers_step, dtype=half if cuda else torch.float32, **network),
                 f"{name}, tuned": partial(diffusers_step, **tuned, noise_device=s.device, **network)}
    return rows


def contiguous(state):
    "Weights, averages and patches: one of them in channels-last order would pull the rest along."
    for network in (state.model, state.ema): network.to(memory_format=torch.contiguous_format)
    state.model.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))


def set_optimizer(state, foreach):
    for group in state.optimizer.param_groups: group.update(fused=False, foreach=foreach)
    state.optimizer._step_supports_amp_scaling = False  # only the fused one looks for bad gradients by itself


def average_as_a_loop(step):
    "A call for each weight."
    def update(ema, model, done, decay):
        kept = min(decay, (1+done)/(10+done)) if done else 0.
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters()): average.lerp_(weight, 1-kept)
    def changed():
        with patch.object(training, "update_ema", update): return step()
    return changed


def attention_by_hand(state):
    "All weights at once, then their product with the values."
    def forward(self, x): return x + self.out(to_picture(self.weights(x) @ self.parts(x)[2], x.shape[2:]))
    for module in state.model.modules():
        if isinstance(module, Attention): module.forward = MethodType(forward, module)


def memory_given_back(state):
    "As glibc does it by itself: blocks of megabytes go back to the system, which clears them before the next use."
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"): libc.mallopt(-4, 65536), libc.mallopt(-1, 128*1024)  # M_MMAP_MAX, M_TRIM_THRESHOLD


LEVERS = {DEFAULT: {}, "bfloat16": dict(precision="bfloat16"), "float32": dict(precision="float32"),  # one of them is the default
          "not channels last": dict(change=contiguous),
          "optimizer foreach": dict(change=partial(set_optimizer, foreach=True)),
          "optimizer as a loop": dict(change=partial(set_optimizer, foreach=False)),
          "average as a loop": dict(around=average_as_a_loop),
          "attention by hand": dict(change=attention_by_hand),
          "memory given back (CPU)": dict(change=memory_given_back),
          "loss read at every step": dict(around=lambda step: lambda: step().item()),
          "torch.compile": dict(change=lambda state: state.model.compile(), graph=False)}
ON_CUDA = {"not recorded": dict(graph=False),
           "torch.compile, CUDA graphs": dict(change=lambda state: state.model.compile(mode="reduce-overhead"), graph=False),
           "cudnn.benchmark": dict(around=torch.backends.cudnn.flags(enabled=True, benchmark=True))}


def builders(s):
    if not s.levers: return contestants(s)
    return {name: partial(ours, **lever) for name, lever in (LEVERS | (ON_CUDA if s.device == "cuda" else {})).items()}


def clock(step, times, device):
    "Seconds a call; the device is waited for before and after, not in between."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times): step()
    wait()
    return (time.perf_counter()-start)/times


def peak(device, dtype):
    "TFLOP/s of the best square matrix product."
    best = 0
    for n in (1024, 2048, 4096, 8192)[:4 if device == "cuda" else 2]:
        a = torch.randn(n, n, device=device).to(dtype)
        best = max(best, *(2*n**3/clock(lambda: a @ a, 2, device)/1e12 for _ in range(3)))
    return best


def machine(device):
    "One line without names of hosts."
    info = Path("/proc/cpuinfo")
    cpu = info.read_text().split("model name")[1].split(":")[1].split("\n")[0].strip() if info.exists() else platform.processor()
    has = {"mkldnn bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "AMX": getattr(torch.cpu, "_is_amx_tile_supported", bool)}
    flags = ", ".join(f"{name} {'yes' if ask() else 'no'}" for name, ask in has.items())
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{cpu} ({torch.backends.cpu.get_cpu_capability()}, {flags}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def weigh(network, size):
    "Millions of parameters, forward GFLOP of one image."
    network = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, size, size, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    return sum(p.numel() for p in network.parameters())/1e6, counter.get_total_flops()/1e9


def fill(args):
    "(N,3,size,size) uint8 on the device, in the memory order of a cache: real crops of the built-in scene."
    scene, generator = sample_pixels()[0], torch.Generator().manual_seed(0)
    index = torch.randint(len(scene), (args.cache,), generator=generator)
    return torch.cat([crop_patches(scene, i, args.size, generator).to(args.device) for i in index.split(1024)]).movedim(-1, 1)


def turn(name, args):
    "One contestant in a fresh process: seconds a step, peak MB, (parameters, GFLOP)."
    status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0])*1024
    cuda, setting = args.device == "cuda", argparse.Namespace(**vars(args), pixels=fill(args))
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS:")
    step, network = builders(setting)[name](setting)
    clock(step, 3, args.device)  # warm up
    seconds = clock(step, args.steps, args.device)
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else status("VmHWM:")
    return seconds, (peak_bytes-before)/2**20, weigh(network, args.size)


def measure(args):
    "name -> seconds a step of each round; name -> megabytes; name -> (parameters, GFLOP)."
    seconds, megabytes, weights = {}, {}, {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for number, name in itertools.product(range(args.rounds), builders(argparse.Namespace(**vars(args), pixels=None))):
            if number and name not in seconds: continue
            try: took, megabytes[name], weights[name] = pool.submit(turn, name, args).result()
            except RuntimeError as e:  # out of memory, or nothing to compile with
                print(f"{name}: left out, {type(e).__name__} {str(e)[:200]}\n")
            else: seconds.setdefault(name, []).append(took)
    return seconds, megabytes, weights


def print_table(s, seconds, weights, megabytes, top):
    marks = [mark for mark in (DEFAULT, SHIPPED, TUNED) if mark in seconds]
    columns = ["step", "parameters, M", "forward GFLOP an image", "s, median (min-max)", "images/s", *(f"speed / {m}" for m in marks),
               "TFLOP/s", "of the peak", "peak memory, MB", "eleven epochs, min"]
    print(f"| {' | '.join(columns)} |\n{'|---'*len(columns)}|")
    for name, t in seconds.items():
        (parameters, gflop), speed = weights[name], s.batch/statistics.median(t)
        ratios = [f"{statistics.median(b/a for a, b in zip(t, seconds[mark])):.2f}" for mark in marks]
        cells = [name+" (auto)"*(name == f"eo_ddpm, {s.precision}"), f"{parameters:.4g}", f"{gflop:.3g}",
                 f"{statistics.median(t):.4g} ({min(t):.4g}-{max(t):.4g})", f"{speed:.4g}", *ratios, f"{3*gflop*speed/1000:.3g}",
                 f"{3*gflop*speed/1000/top:.2%}", f"{megabytes[name]:.0f}", f"{PATCHES/speed/60:.0f}"]
        print(f"| {' | '.join(cells)} |")
    work = 3*next(iter(weights.values()))[1]*PATCHES/1e6  # our network's
    print(f"\nEleven epochs of 45,753 patches are {work:.3g} PFLOP for our network: at least {1000*work/top/60:.0f} min at the measured peak.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default, text in (("dim", 64, "channels of the outermost level"), ("size", 128, "pixels"), ("batch", 8, "patches a step"),
                                ("cache", 512, "patches that ours draws from"), ("rounds", 3, "turns of each"),
                                ("steps", None, "steps a turn; None: 20 on CUDA, else 2")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--tutorial", action="store_true", help="also the tutorial's own network, which is much larger")
    parser.add_argument("--levers", action="store_true", help="ours alone, one thing changed at a time")
    args = parser.parse_args()
    if args.cache < 4*args.batch: parser.error(f"--cache {args.cache}: expected at least four batches of {args.batch}")
    args.steps, args.precision = args.steps or (20 if args.device == "cuda" else 2), pick_precision(args.device)

    print(f"`{' '.join(['python benchmarks/train.py', *sys.argv[1:]])}`: {machine(args.device)}\n", flush=True)
    peaks = lambda: [peak(args.device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    before = peaks()
    seconds, megabytes, weights = measure(args)
    single, half = map(max, before, peaks())  # twice: a neighbour may have been busy
    print(f"Peak of square matrix products: float32 {single:.3g}, bfloat16 {half:.3g} TFLOP/s; shares are of the larger.\n")
    print_table(args, seconds, weights, megabytes, max(single, half))


if __name__ == "__main__": main()
