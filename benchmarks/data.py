"""How fast the data side is, and beside what: python benchmarks/data.py [--files 2000] [--full] [--all] [--work FOLDER]

Makes a tree laid out as SEN12MS out of random windows of the built-in scene (real pixels, 13 bands, uint16, uncompressed,
bands interleaved by pixel, 1.7 MB a file) and measures in one run, in turns, medians of several rounds. --full adds a
tree of 45,753 files, --all one of 180,664 in four seasons (both hard links to the others)."""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.windows import Window
from torch.utils.data import DataLoader, Dataset

from eo_ddpm.data import GDAL, SEASONS, build_cache, crop_patches, draw_patches, find_patches, read_scene, resize
from eo_ddpm.images import read_index, write_index

SCENES = 65


def name(k, stem=SEASONS["summer"]):
    scene = 1+k % SCENES
    return f"{stem}/s2_{scene}/{stem}_s2_{scene}_p{k}.tif"


def make_tree(root, files):
    "Real-size files in SEN12MS's own TIFF layout."
    dn, grid = read_scene()
    rng = np.random.default_rng(0)
    for k in range(files):
        path = root/name(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        y, x = rng.integers(0, dn.shape[1]-256), rng.integers(0, dn.shape[2]-256)
        transform = rasterio.windows.transform(Window(x, y, 256, 256), grid["transform"])
        with rasterio.open(path, "w", driver="GTiff", dtype="uint16", count=13, width=256, height=256, crs=grid["crs"],
                           transform=transform, interleave="pixel") as dst: dst.write(dn[:, y:y+256, x:x+256])


def make_links(root, source, files, n=45_753, seasons=("summer",)):
    "A tree as large as the summer of SEN12MS, of hard links."
    for season in seasons:
        for k in range(n):
            path = root/name(k, SEASONS[season])
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(source/name(k % files), path)


def bare(patches):
    "The yardstick: rasterio opens a file, decodes three bands, and the same resize makes 128 pixels."
    for p in patches:
        with rasterio.open(p.path) as src: resize(src.read([4, 3, 2]).astype(np.uint8), 128)


def bare_tuned(patches):
    with rasterio.Env(**GDAL): bare(patches)


def ours(root, out, workers):
    shutil.rmtree(out, ignore_errors=True)
    return build_cache(root, out, 128, workers=workers)


class ReportLoader(Dataset):
    "The report's way: every item is read and prepared again."
    def __init__(self, patches): self.patches = patches
    def __len__(self): return len(self.patches)
    def __getitem__(self, i):
        with rasterio.open(self.patches[i].path) as src: dn = src.read([4, 3, 2])
        pixels = (255*(dn/5000).clip(0, 1)**(1/2.2)).astype(np.uint8).transpose(1, 2, 0)
        image = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BILINEAR))
        if np.random.rand() < .5: image = image[:, ::-1]
        return torch.from_numpy(image.transpose(2, 0, 1).copy()).float()/127.5-1


class TorchgeoLoader(Dataset):
    "As torchgeo's SEN12MS reads: all 13 bands to int32, then the chosen ones."
    def __init__(self, patches): self.patches = patches
    def __len__(self): return len(self.patches)
    def __getitem__(self, i):
        with rasterio.open(self.patches[i].path) as src: array = src.read()
        return torch.from_numpy(array.astype(np.int32)).index_select(0, torch.tensor([3, 2, 1]))


class SchmittLoader(Dataset):
    "As the data set's own loader reads: the chosen bands, clipped, /10000, float32."
    def __init__(self, patches): self.patches = patches
    def __len__(self): return len(self.patches)
    def __getitem__(self, i):
        with rasterio.open(self.patches[i].path) as src: dn = src.read([2, 3, 4]).astype(np.float32)
        return torch.from_numpy((np.clip(dn, 0, 10000)/10000).astype(np.float32))


def through(dataset, workers, batch=64):
    "Images a second through a DataLoader; its start counts as one batch of many."
    seen, loader = 0, iter(DataLoader(dataset, batch, shuffle=True, num_workers=workers))
    next(loader)
    start = time.perf_counter()
    for x in loader: seen += len(x)
    return seen/(time.perf_counter()-start)


def fed(pixels, batch, draw, seconds=2.):
    "Images a second in this one process."
    n, start = 0, time.perf_counter()
    while time.perf_counter()-start < seconds:
        draw(torch.randint(len(pixels), (batch,)))
        n += batch
    return n/(time.perf_counter()-start)


def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter()-start


MEMORY = """import json, resource, sys
from eo_ddpm.data import build_cache
if __name__ == "__main__":
    cache = build_cache(sys.argv[1], sys.argv[2], 128, season="all", workers=int(sys.argv[3]))
    own = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss would count the parent too
    print(json.dumps([len(cache.pixels), own/1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024]))"""


def memory(root, out, workers):
    "Patches, peak MB of the process and of its largest worker."
    shutil.rmtree(out, ignore_errors=True)
    run = subprocess.run([sys.executable, "-c", MEMORY, str(root), str(out), str(workers)], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--work", help="where the tree of 1.7 MB a file goes (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        root, out = Path(work)/"tree", Path(work)/"cache"
        make_tree(root, args.files)
        patches = find_patches(root)

        print(f"\n## Building a cache: {len(patches)} files, 128 px, images/s, median of {args.rounds} rounds (min-max)")
        torch.set_num_threads(1)  # one core a process
        bare(patches)  # warm the page cache
        runs = {"bare rasterio + resize": lambda: bare(patches), "the same with our GDAL options": lambda: bare_tuned(patches),
                "ours, one process": lambda: ours(root, out, 0), "ours, one worker": lambda: ours(root, out, 1),
                "ours, two workers": lambda: ours(root, out, 2)}
        speeds = {label: [] for label in runs}
        for _ in range(args.rounds):
            for label, run in runs.items(): speeds[label].append(len(patches)/seconds(run))
        for label, s in speeds.items(): print(f"{label:32} {statistics.median(s):6.0f} ({min(s):.0f}-{max(s):.0f})")
        ratio = lambda a, b: statistics.median(x/y for x, y in zip(speeds[a], speeds[b]))
        print(f"ours / bare: {ratio('ours, one process', 'bare rasterio + resize'):.2f}; / bare with our options: "
              f"{ratio('ours, one process', 'the same with our GDAL options'):.2f}; two workers / one: "
              f"{ratio('ours, two workers', 'ours, one worker'):.2f}; / one process: {ratio('ours, two workers', 'ours, one process'):.2f}")

        print("\n## Peak memory of the builder, MB (process, largest worker)")
        for workers in (0, 2): print(f"{workers} workers:", *(f"{v:.0f}" for v in memory(root, out, workers)))
        for wanted, n, seasons in ((args.full, 45_753, ("summer",)), (args.all, 45_166, tuple(SEASONS))):
            if not wanted: continue
            links = Path(work)/f"links{len(seasons)}"
            make_links(links, root, args.files, n, seasons)
            start = time.perf_counter()
            count, peak, worker = memory(links, out, 2)
            print(f"{count} files, 2 workers: {peak:.0f}, {worker:.0f} MB, {count/(time.perf_counter()-start):.0f} images/s with start")

        print("\n## Listing 45,753 paths, seconds")
        empty = Path(work)/"empty"
        for k in range(45_753):
            path = empty/name(k)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = find_patches(empty)
        print(f"find_patches {seconds(find_patches, empty):.2f}, write_index {seconds(write_index, found, out.with_suffix('.csv')):.2f}, "
              f"read_index {seconds(read_index, out.with_suffix('.csv')):.2f}")
        assert read_index(out.with_suffix(".csv")) == found

        torch.set_num_threads(os.cpu_count())
        cache = build_cache(Path(work)/"links1" if args.full else root, Path(work)/"fed", 128)
        px = cache.pixels
        print(f"\n## Feeding 128 px batches of 64, images/s, {len(px)} patches in a warm memory map, one process, {torch.get_num_threads()} threads")
        draws = {"uint8": lambda i: crop_patches(px, i, 128), "float32 [-1,1]": lambda i: draw_patches(px, i, 128, "none"),
                 "float32, mirrored at random": lambda i: draw_patches(px, i, 128, "horizontal"),
                 "float32, all 8 turns": lambda i: draw_patches(px, i, 128, "all"),
                 "float32, crops of 64 px, all turns": lambda i: draw_patches(px, i, 64, "all")}
        for draw in draws.values(): fed(px, 64, draw, .5)
        fast = {label: [] for label in draws}
        slow = {label: [] for label in ("the report's way, 0 workers", "as torchgeo, 2 workers", "as Schmitt's loader, 2 workers")}
        for _ in range(3):
            for label, draw in draws.items(): fast[label].append(fed(px, 64, draw))
            for label, data, workers in zip(slow, (ReportLoader, TorchgeoLoader, SchmittLoader), (0, 2, 2)):
                slow[label].append(through(data(patches), workers))
        for label, s in (fast | slow).items(): print(f"{label:36} {statistics.median(s):9.0f}")
        for label, s in slow.items():
            print(f"float32, mirrored / {label}: {statistics.median(fast['float32, mirrored at random'])/statistics.median(s):.0f}x")


if __name__ == "__main__": main()
