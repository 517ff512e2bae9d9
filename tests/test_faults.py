"""Faults that a pass over 45,753 files must survive: damaged files, a killed process, a full disk, little memory."""
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling

from eo_ddpm import data
from eo_ddpm.data import (
    RGB, S2_BANDS, SCALES, Patch, Scale, Tiles, build_cache, find_patches, find_tiles, load_cache, read_patch, read_tile, resize,
)

unix = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, SIGKILL and rusage as Linux has them")
STORE = sys.modules[data.Part.__module__]  # where SAVE_EVERY lives
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
PLACE = dict(crs="EPSG:32737", transform=rasterio.Affine(10, 0, 390772.3, 0, -10, 8114182.8))


def write_image(path, pixels, driver="GTiff", **profile):
    "Write (C,H,W) as an image with a real place on Earth, as far as its format knows one."
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    with rasterio.open(path, "w", driver=driver, count=count, height=height, width=width, dtype=pixels.dtype,
                       **(PLACE | profile if driver == "GTiff" else profile)) as dst: dst.write(pixels)
    return path


def random_dn(seed, shape):
    "Seeded digital numbers; band i lies in [500 i, 500 i + 400), so a mixed-up band shows."
    base = 500*np.arange(shape[0], dtype=np.uint16)[:, None, None]
    return base+np.random.default_rng(seed).integers(0, 400, shape, dtype=np.uint16)


def smooth(seed, count=3, side=64):
    "A seeded picture in bytes that lossy formats can store well."
    phase = np.random.default_rng(seed).uniform(0, 6, (count, 2, 1, 1))
    y, x = np.mgrid[:side, :side]/9
    return np.rint(128+60*np.sin(x+phase[:, 0])+50*np.cos(y+phase[:, 1])).astype(np.uint8)


# --- damaged files: a thousand of them ---

SIDE = 32
LAYOUTS = {
    "sen12ms": dict(interleave="pixel"), "planes": dict(interleave="band"),  # neither is compressed
    "tiles": dict(interleave="pixel", tiled=True, blockxsize=16, blockysize=16),
    "sample": dict(interleave="band", compress="deflate", zlevel=1, predictor=2),
    "lzw": dict(interleave="pixel", compress="lzw"),
    "cog": dict(interleave="pixel", compress="deflate", tiled=True, blockxsize=16, blockysize=16),
}
WIDTH = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes by TIFF type
EXTREME = (0, 1, 2, 3, 7, 8, 13, 16, 64, 255, 256, 1000, 65535, 65536, 2**24, 2**31-1, 2**31, 2**32-1)
GEOMETRY = (256, 257, 258, 259, 262, 277, 284, 339, 273, 278, 279, 322, 323, 324, 325, 317)  # the tags that say where pixels lie


def entries(raw):
    "The tags of a little-endian classic TIFF: (place of the entry, tag, type, count, place of its values)."
    start, = struct.unpack_from("<I", raw, 4)
    n, = struct.unpack_from("<H", raw, start)
    for p in range(start+2, start+2+12*n, 12):
        tag, kind, count, at = struct.unpack_from("<HHII", raw, p)
        yield p, tag, kind, count, p+8 if WIDTH.get(kind, 0)*count <= 4 else at


def numbers(raw, kind, count, at):
    "The whole numbers of a tag."
    if kind not in (3, 4): raise Broken(f"type {kind} where a number belongs")
    if at+count*WIDTH[kind] > len(raw): raise Broken("values beyond the end of the file")
    return list(struct.unpack_from(f"<{count}{'H' if kind == 3 else 'I'}", raw, at))


def damage(raw, kind, rng):
    "One file with one kind of damage."
    b, found, r = bytearray(raw), list(entries(raw)), rng.randrange
    by = {e[1]: e for e in found}
    first = min(numbers(raw, *(by.get(273) or by[324])[2:]))  # where pixels begin
    (p, _, kind_of, count, at), (q, *_) = rng.sample(found, 2)
    if kind == "cut": del b[r(len(b)):]
    elif kind == "end": del b[-r(1, 65):]
    elif kind in ("bit", "bits", "header", "headers"):
        for _ in range(r(2, 9) if kind.endswith("s") else 1): b[r(len(b) if kind[0] == "b" else first)] ^= 1 << r(8)
    elif kind in ("zeros", "junk"):
        where = slice(start := r(len(b)), min(start+r(1, 2000), len(b)))
        b[where] = bytes(len(b[where])) if kind == "zeros" else rng.randbytes(len(b[where]))
    elif kind == "magic":
        b[:4] = rng.choice([b"MM\0*", b"II+\0", b"MM\0+", b"\xff\xd8\xff\xe0", b"\x89PNG", b"\0\0\0\x0c", b"II*\1", bytes(4)])
    elif kind == "noise": b[8:] = rng.randbytes(len(b)-8)
    elif kind == "append": b += rng.randbytes(r(1, 500))
    elif kind == "start": struct.pack_into("<I", b, 4, rng.choice([0, 2, len(b), len(b)-2, r(len(b)), 2**32-1, found[0][0]+10]))
    elif kind == "tag": struct.pack_into("<H", b, p, rng.choice([e[1] for e in found]+[r(65536)]))
    elif kind == "type": struct.pack_into("<H", b, p+2, r(20))
    elif kind == "count": struct.pack_into("<I", b, p+4, rng.choice([*EXTREME, max(count-1, 0), count+1, 2*count, count//2]))
    elif kind == "order": b[p:p+12], b[q:q+12] = b[q:q+12], b[p:p+12]
    elif kind == "swap": b[p:p+2], b[q:q+2] = b[q:q+2], b[p:p+2]
    elif kind == "exchange": b[p+8:p+12], b[q+8:q+12] = b[q+8:q+12], b[p+8:p+12]
    elif kind == "twice": b[p:p+12] = b[q:q+12]
    else:  # "item": one number of those that say where pixels lie
        p, _, kind_of, count, at = by[rng.choice([t for t in GEOMETRY if t in by])]
        if r(4) == 0: kind_of, count, at = 4, 1, p+8  # or the place of the list itself
        form, where = "<H" if kind_of == 3 else "<I", at+WIDTH[kind_of]*r(count)
        old, = struct.unpack_from(form, b, where)
        new = rng.choice([*EXTREME, old+1, old-1, 2*old, old//2, old ^ 1 << r(8*WIDTH[kind_of]), r(len(b)), old+26])
        struct.pack_into(form, b, where, new % (1 << 8*WIDTH[kind_of]))
    return bytes(b)


KINDS = ("cut end bit bits header header headers zeros junk magic noise append start "
         "tag type count count item item item item item item order swap exchange twice").split()


class Broken(Exception):
    "Not what the TIFF 6.0 standard calls a TIFF."


def by_the_standard(raw):
    """What this file holds, without GDAL: (13,H,W) uint16, or None for whole files whose pixels we do not decode here.

    Raises Broken if the blocks are too many, too few, of the wrong length, outside the file or on top of something."""
    if raw[:4] != b"II*\0": raise Broken("another kind of file")
    try: found = list(entries(raw))
    except struct.error: raise Broken("no list of tags") from None
    tags, taken = {}, np.zeros(len(raw), bool)
    taken[:8] = taken[(start := struct.unpack_from("<I", raw, 4)[0]):start+2+12*len(found)+4] = True
    for p, tag, kind, count, at in found:
        if WIDTH.get(kind, 0)*count > 4: taken[at:at+WIDTH[kind]*count] = True
        if tag in GEOMETRY: tags.setdefault(tag, (kind, count, at))
    tags = {tag: numbers(raw, *where) for tag, where in tags.items()}
    if any(len(tags[t]) != 1 for t in tags if t not in (258, 339, 273, 279, 324, 325)): raise Broken("a list where one number belongs")
    one = lambda tag, default: tags.get(tag, [default])[0]
    w, h, samples, packing, tiled, chunky = one(256, 0), one(257, 0), one(277, 1), one(259, 1), 322 in tags, one(284, 1) == 1
    bw, bh = (one(322, 0), one(323, 0)) if tiled else (w, min(one(278, h), h))
    if 0 in (w, h, bw, bh) or samples != 13 or set(tags.get(258, [1])) != {16}: raise Broken("not 13 bands of 16 bits")
    places, lengths = (tags.get(t, []) for t in ((324, 325) if tiled else (273, 279)))
    across, down, planes, values = -(-w//bw), -(-h//bh), 1 if chunky else 13, 13 if chunky else 1
    if not len(places) == len(lengths) == planes*down*across: raise Broken(f"{len(places)} blocks, {len(lengths)} lengths")
    unsure, image = False, np.zeros((planes, down*bh, across*bw, values), np.uint16)
    for i, (place, length) in enumerate(zip(places, lengths)):
        plane, y, x = i//(down*across), i//across % down*bh, i % across*bw
        rows = bh if tiled else min(bh, h-y)
        wanted = rows*bw*values*2
        if length == 0 or place+length > len(raw): raise Broken(f"block {i} is not in the file")
        if taken[place:place+length].any(): raise Broken(f"block {i} lies on top of something")
        if packing == 1 and length not in (wanted, bh*bw*values*2): raise Broken(f"block {i} has {length} bytes, not {wanted}")
        taken[place:place+length] = True
        pixels = raw[place:place+length]
        if packing == 8:
            try: pixels = zlib.decompress(pixels)
            except zlib.error: unsure = True  # GDAL doesn't look at the checksum, so it takes what comes
            if unsure: continue
            if len(pixels) < wanted: raise Broken(f"block {i} is too short")
        elif packing != 1: continue
        block = np.frombuffer(pixels[:wanted], "<u2").reshape(rows, bw, values)
        if one(317, 1) == 2: block = block.cumsum(1, dtype=np.uint16)
        image[plane, y:y+rows, x:x+bw] = block
    if unsure or packing not in (1, 8) or one(339, 1) != 1 or one(317, 1) not in (1, 2): return None
    image = image[:, :h, :w]
    return image[0].transpose(2, 0, 1) if chunky else image[..., 0]


READ = """
import hashlib, json, resource, sys, time
from pathlib import Path
import numpy as np
from eo_ddpm.data import S2_BANDS, Patch, Scale, Tiles, read_patch
folder, start, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
files = sorted(folder.iterdir())
tiles = Tiles([Patch("", 1, i, p) for i, p in enumerate(files)], side, S2_BANDS, Scale(0, 65535), "uint16", ())  # dn as they are
def attempt(read):
    try: out = read()
    except BaseException as e: return type(e).__name__, str(e)
    if isinstance(out, str): return "skipped", out
    return "pixels", f"{out.shape} {hashlib.md5(np.ascontiguousarray(out).tobytes()).hexdigest()}"
def from_tiles(i):
    out = tiles.__getitems__([i])[0]
    return out if isinstance(out, str) else np.frombuffer(out[0], np.uint16).reshape(side, side, -1).transpose(2, 0, 1)
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])/1024  # MB; ru_maxrss has the parent's
before = peak()
memory = int(Path("/proc/self/statm").read_text().split()[0])*4096+2**30  # a gigabyte more than now
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
for i, p in enumerate(files[start:], start):
    print(json.dumps(p.name), flush=True)  # who is to blame if nothing follows
    begin = time.monotonic()
    found = attempt(lambda: read_patch(p, S2_BANDS)), attempt(lambda: from_tiles(i))
    print(json.dumps([*found, time.monotonic()-begin, peak()-before]), flush=True)
"""


def read_all(folder, seconds=300):
    "Read every file of a folder in another process, from the next one on if it dies: name -> (by read_patch, by Tiles, s, MB)."
    found = {}
    while len(found) < len(names := sorted(p.name for p in folder.iterdir())):
        command = [sys.executable, "-c", READ, str(folder), str(len(found)), str(SIDE)]
        try: run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=ENV)
        except subprocess.TimeoutExpired as e: run = SimpleNamespace(returncode="hang", stdout=e.stdout.decode(), stderr="")
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        assert lines, run.stderr
        found |= dict(zip(lines[::2], lines[1::2]))
        if len(lines) % 2: found[lines[-1]] = [("crash", f"{run.returncode} {run.stderr[-500:]}")]*2+[0, 0]
    return {name: found[name] for name in names}


@pytest.fixture(scope="module", params=[pytest.param(180, id="1080"), pytest.param(2500, id="15000", marks=pytest.mark.heavy)])
def damaged(request, tmp_path_factory):
    "Damaged files, and what became of them: [(name, layout, bytes, what read_patch said, what Tiles said, seconds, MB)]."
    folder, rng, raws = tmp_path_factory.mktemp("damaged"), random.Random(request.param), {}
    for layout, profile in LAYOUTS.items():
        raw = write_image(tmp_path_factory.mktemp("whole")/"a.tif", random_dn(1, (13, SIDE, SIDE)), **profile).read_bytes()
        for i in range(request.param):
            kind = KINDS[i % len(KINDS)]
            name = f"{layout}-{i:04d}-{kind}.tif"
            (folder/name).write_bytes(raws.setdefault(name, damage(raw, kind, rng)))
    return [(folder/name, raws[name], *said) for name, said in read_all(folder).items()]


@unix
def test_damaged_files_never_crash_hang_or_eat_memory(damaged):
    "Catches SIGBUS from files mapped into memory, an endless loop, gigabytes asked for because a header says so."
    assert len(damaged) >= 1000
    for path, _, patch, tile, seconds, megabytes in damaged:
        assert "crash" not in (patch[0], tile[0]), f"{path.name}: {patch[1]}"
        assert seconds < 10 and megabytes < 450, f"{path.name}: {seconds:.1f} s, {megabytes:.0f} MB"


@unix
def test_every_damaged_file_is_named(damaged):
    "Catches MemoryError, TypeError, RasterioIOError ... that end a run of hours, and messages that leave out which file it was."
    for path, _, patch, tile, *_ in damaged:
        assert patch[0] in ("pixels", "ValueError") and (patch[0] == "pixels" or str(path) in patch[1]), (path.name, patch)
        assert tile[0] in ("pixels", "skipped"), (path.name, tile)
        assert tile[0] == "pixels" or tile[1].startswith("unreadable: ") and str(path) in tile[1], (path.name, tile)


def same(pixels): return f"{pixels.shape} {hashlib.md5(np.ascontiguousarray(pixels).tobytes()).hexdigest()}"


@unix
def test_damaged_headers_never_give_wrong_pixels(damaged):
    """Catches what GDAL reads without a word: blocks moved, shortened, left out or laid on top of each other.

    Pixels that come back must be the original's, or what an independent reader finds in a file that keeps to the
    standard: a flipped bit among the pixels of an uncompressed file is beyond anybody's reach."""
    original, wrong = random_dn(1, (13, SIDE, SIDE)), []
    for path, raw, *answers, _, _ in damaged:
        found = {said for kind, said in answers if kind == "pixels"}-{same(original)}
        if not found: continue
        try: pixels = by_the_standard(raw)
        except Broken as e: wrong.append((path.name, str(e)))
        else: wrong += [(path.name, "other pixels")]*(pixels is not None and not found <= {same(pixels), same(resize(pixels, SIDE))})
    assert not wrong, f"{len(wrong)} of {len(damaged)}: {Counter(w[0].split('-')[0] for w in wrong)}, {wrong[:20]}"


@unix
def test_the_independent_reader_reads(tmp_path):
    "Catches a judge that calls everything broken, or nothing."
    pixels = random_dn(1, (13, SIDE, SIDE))
    for layout, profile in LAYOUTS.items():
        raw = write_image(tmp_path/"a.tif", pixels, **profile).read_bytes()
        found = by_the_standard(raw)
        assert found is None if layout == "lzw" else (found == pixels).all()
        with pytest.raises(Broken): by_the_standard(raw[:len(raw)//2])


@pytest.mark.parametrize("layout", ["pixel", "band", "tiles"])
@pytest.mark.parametrize("compress", [None, "deflate", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("endianness,bigtiff", [("little", "no"), ("big", "no"), ("little", "yes"), ("big", "yes")])
def test_whole_files_are_not_refused(tmp_path, layout, compress, endianness, bigtiff):
    "Catches a check so strict that it turns good files away: big-endian, BigTIFF, odd sizes, every layout."
    profile = dict(tiled=True, blockxsize=32, blockysize=16) if layout == "tiles" else dict(interleave=layout)
    for shape in ((13, 64, 64), (13, 37, 101), (13, 1, 1)):
        pixels = random_dn(3, shape)
        path = write_image(tmp_path/"a.tif", pixels, compress=compress, endianness=endianness, bigtiff=bigtiff, **profile)
        np.testing.assert_array_equal(read_patch(path, S2_BANDS), pixels)


@pytest.mark.parametrize("profile", [
    dict(driver="COG", compress="deflate"), dict(compress="jpeg", photometric="ycbcr", interleave="pixel", tolerance=40),
    dict(compress="jpeg", tolerance=20), dict(nbits=7), dict(photometric="rgb"), dict(blockysize=1), dict(blockysize=300),
    dict(sparse_ok=True), dict(sparse_ok=True, compress="deflate", tiled=True),
], ids=lambda p: " ".join(map(str, p.values())))
def test_own_images_of_other_makes_are_not_refused(tmp_path, profile):
    "Catches the same: overviews, masks, colour subsampling, 7 bits, blocks left out where there is no data."
    tolerance, pixels = profile.get("tolerance", 0), smooth(0, side=300)//2
    if "sparse_ok" in profile: pixels[:, :260] = 0
    path = write_image(tmp_path/"own/a.tif", pixels, **{k: v for k, v in profile.items() if k != "tolerance"})
    if profile.get("driver") != "COG":
        with rasterio.open(path, "r+") as dst:
            dst.build_overviews([2, 4], Resampling.average)
            dst.write_mask(np.ones((300, 300), bool))
    for p in find_tiles(tmp_path/"own", 100):
        x, y, w, h = p.window
        assert np.abs(read_tile(p).astype(int)-pixels[:, y:y+h, x:x+w]).max() <= tolerance


@pytest.mark.parametrize("compress", [None, "deflate"])
def test_a_patch_with_missing_blocks_is_named(tmp_path, compress):
    "Catches a file whose writer was killed: the blocks that it never wrote come back as zeros."
    path = tmp_path/"part.tif"
    with rasterio.open(path, "w", driver="GTiff", count=13, height=64, width=64, dtype="uint16", interleave="band",
                       sparse_ok=True, compress=compress, **PLACE) as dst:
        dst.write(random_dn(0, (5, 64, 64)), list(range(1, 6)))
    with pytest.raises(ValueError, match="part.tif: truncated or damaged"): read_patch(path, S2_BANDS)
    tiles = Tiles([Patch("summer", 1, 1, path)], 64, RGB, SCALES["natural"], "uint8", ())
    assert tiles.__getitems__([0])[0].startswith("unreadable: ")


SHRINK = """
import os, sys
from pathlib import Path
from eo_ddpm.data import RGB, SCALES, Patch, Tiles
path = Path(sys.argv[1])
tiles = Tiles([Patch("", 1, i, path, RGB, (0, y, 256, 256)) for i, y in enumerate((0, 512))], 256, RGB, SCALES["report"], "uint8", ())
assert not isinstance(tiles.__getitems__([0])[0], str)
os.truncate(path, 2000)
print(tiles.__getitems__([1])[0])
"""


@unix
@pytest.mark.parametrize("profile", [dict(interleave="pixel"), dict(tiled=True), dict(tiled=True, compress="deflate")],
                         ids=lambda p: " ".join(map(str, p.values())))
def test_a_file_that_shrinks_while_it_is_open_is_named(tmp_path, profile):
    "Catches SIGBUS, which no `except` can catch, from a file mapped into memory: a copy that starts anew, a bad sector, a lost network disk."
    path = write_image(tmp_path/"scene.tif", random_dn(0, (3, 1024, 1024)), **profile)
    run = subprocess.run([sys.executable, "-c", SHRINK, path], capture_output=True, text=True, timeout=120, env=ENV)
    assert run.returncode == 0, f"{run.returncode} (-7 is SIGBUS) {run.stderr[-500:]}"
    assert run.stdout.startswith(f"unreadable: {path}")


@pytest.mark.parametrize("name,driver,profile", [
    ("a.jpg", "JPEG", dict(quality=90)), ("b.jpg", "JPEG", dict(progressive=True)), ("a.png", "PNG", {}), ("a.jp2", "JP2OpenJPEG", {})])
def test_pictures_cut_short_are_named(tmp_path, name, driver, profile):
    "Catches the lower half of a picture painted black because the download broke off there."
    pixels = smooth(1)+np.random.default_rng(0).integers(0, 9, (3, 64, 64), dtype=np.uint8)
    raw = write_image(tmp_path/"whole"/name, pixels, driver, **profile).read_bytes()
    path, silent = tmp_path/name, []
    tiles = Tiles([Patch("", 1, 1, path, RGB)], 64, RGB, SCALES["bytes"], "uint8", ())
    for keep in range(0, 100, 3):  # percent
        path.write_bytes(raw[:keep*len(raw)//100])
        tiles.path = None
        said = tiles.__getitems__([0])[0]
        if not (isinstance(said, str) and said.startswith("unreadable: ") and str(path) in said): silent.append(keep)
        try: read_tile(tiles.patches[0])
        except ValueError as e: assert str(path) in str(e)
        else: silent.append(keep)
    assert not silent, f"{len(silent)} of 68 read without a word, cut at {silent} %"


# --- a process that is killed ---

BUILD = """
import json, os, signal, sys, traceback
from eo_ddpm import data
store = sys.modules[data.Part.__module__]
def deadly(name, count):
    "The count-th call of os.name kills the process."
    real, left = getattr(os, name), [count]
    def call(*args, **kwargs):
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)
for line in sys.stdin:
    task = json.loads(line)
    if not (pid := os.fork()):
        os.dup2(2, 1)
        try:
            store.SAVE_EVERY = task["every"]
            if task["die"]: deadly(*task["die"])
            data.build_cache(task["root"], task["out"], 16, workers=task["workers"])
        except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Builder:
    "A process that has everything imported, and builds a cache in a child that may be killed."
    def __init__(self, log):
        self.log = open(log, "w+")
        self.run = subprocess.Popen([sys.executable, "-c", BUILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=self.log, text=True, env=ENV)

    def start(self, root, out, workers=0, every=.02, die=None):
        "Begin; returns the child's process id."
        self.run.stdin.write(json.dumps(dict(root=str(root), out=str(out), workers=workers, every=every, die=die))+"\n")
        self.run.stdin.flush()
        return int(self.run.stdout.readline())

    def wait(self):
        "How it ended: killed (True) or well (False). Raises AssertionError with its words if it failed."
        status = int(self.run.stdout.readline())
        self.log.seek(0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, self.log.read()[-2000:]
        return os.WIFSIGNALED(status)

    def close(self):
        self.run.stdin.close()
        self.run.wait()
        self.run.stdout.close()
        self.log.close()


def content(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    "One for all tests of a module."
    it = Builder(tmp_path_factory.mktemp("builder")/"log")
    yield it
    it.close()


@pytest.fixture(scope="module")
def season(tmp_path_factory):
    "300 small files in SEN12MS's own layout, two of them broken."
    root, stem = tmp_path_factory.mktemp("season"), "ROIs1868_summer"
    for i in range(300):
        path = root/stem/f"s2_{1+i//100}"/f"{stem}_s2_{1+i//100}_p{i}.tif"
        write_image(path, random_dn(i, (13, 16, 16)), interleave="pixel")
        if i in (40, 250): path.write_bytes(path.read_bytes()[:3000])
    return root


@pytest.fixture(scope="module")
def unbroken(season, builder, tmp_path_factory):
    "What a build that nobody disturbed leaves."
    out = tmp_path_factory.mktemp("unbroken")/"cache"
    builder.start(season, out)
    assert not builder.wait()
    cache = load_cache(out)
    assert len(cache.pixels) == 298 and len(cache.skipped()) == 2
    assert sorted(content(out)) == ["cache.json", "index.csv", "pixels.npy", "skipped.csv"]
    return content(out)


def no_cache(out):
    with pytest.raises(FileNotFoundError, match="no cache here"): load_cache(out)


@unix
@pytest.mark.parametrize("kills,workers", [
    (6, 0), (2, 2), pytest.param(30, 0, marks=pytest.mark.heavy), pytest.param(30, 2, marks=pytest.mark.heavy)])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(season, unbroken, builder, tmp_path, kills, workers):
    "Catches patches written twice or lost at a save point, a half-built folder taken for a cache, a second start that gives up."
    rng, out, part = random.Random(kills), tmp_path/"cache", tmp_path/"cache.part"
    pid, begin = builder.start(season, out, workers), time.monotonic()
    assert not builder.wait() and content(out) == unbroken
    shutil.rmtree(out)
    seconds, killed, resumed, tries = time.monotonic()-begin, 0, set(), 0
    while killed < kills or (len(resumed) <= (kills > 3) and tries < 50):  # on a quick machine most kills hit the start
        tries += 1
        pid = builder.start(season, out, workers)
        time.sleep(rng.uniform(.1, .9)*seconds)
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
        if builder.wait():
            killed += 1
            if not out.exists(): no_cache(out)
            if (part/"progress.json").exists(): resumed.add(json.loads((part/"progress.json").read_text())["tiles"])
        if out.exists():  # it had ended
            assert content(out) == unbroken
            shutil.rmtree(out)
    builder.start(season, out, workers)
    assert not builder.wait() and content(out) == unbroken
    assert len(resumed) > (kills > 3), "no kill came after a save point: this test tests nothing"


@unix
@pytest.mark.parametrize("every,die,then", [
    (0, ("replace", 1), .02), (0, ("replace", 5), .02), (0, ("replace", 5), 60),  # a note is written but not yet in its place
    (0, ("fsync", 20), 60),                                                       # in the middle of a save point
    (60, ("fsync", 3), 60), (.02, ("unlink", 1), .02), (.02, ("rename", 1), .02), # at three places of the end
], ids=str)
def test_killed_at_a_given_line(season, unbroken, builder, tmp_path, every, die, then):
    """Catches what a random moment seldom meets: a note half replaced (its .tmp left behind), files longer than noted,
    a header already finished, everything done but the renaming."""
    out = tmp_path/"cache"
    builder.start(season, out, every=every, die=die)
    assert builder.wait() and not out.exists()
    no_cache(out)
    builder.start(season, out, every=then)
    assert not builder.wait() and content(out) == unbroken


@unix
@pytest.mark.parametrize("name,left", [
    ("pixels.npy", 0), ("pixels.npy", .5), ("index.csv", .9), ("skipped.csv", None), ("progress.json", None)])
def test_files_shorter_than_noted(season, unbroken, builder, tmp_path, name, left):
    "Catches zeros between two halves: after a power cut a file may be shorter than the note says. Then start anew."
    out, path = tmp_path/"cache", tmp_path/"cache.part"/name
    builder.start(season, out, every=0, die=("fsync", 40))
    assert builder.wait() and (tmp_path/"cache.part/progress.json").exists()
    if left is None: path.unlink()
    else: os.truncate(path, int(left*path.stat().st_size))
    builder.start(season, out)
    assert not builder.wait() and content(out) == unbroken


@unix
def test_interrupted_in_the_middle_of_a_patch(season, unbroken, builder, tmp_path, monkeypatch):
    "Catches Ctrl-C between a patch's pixels and its line in the index: all later patches would move by one."
    real, calls = STORE.csv_line, []

    def interrupt(*values):
        calls.append(values)
        if len(calls) == 100: raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(STORE, "csv_line", interrupt)
    with pytest.raises(KeyboardInterrupt): build_cache(season, tmp_path/"cache", 16, workers=0)
    no_cache(tmp_path/"cache")
    builder.start(season, tmp_path/"cache")
    assert not builder.wait() and content(tmp_path/"cache") == unbroken


@unix
def test_two_builders_at_once(season, unbroken, builder, tmp_path):
    "Catches two processes that write into the same files, or one that fails because the other was faster."
    other = Builder(tmp_path/"log")
    try:
        for b in (builder, other): b.start(season, tmp_path/"out/cache")
        assert not builder.wait() and not other.wait()
    finally: other.close()
    assert content(tmp_path/"out/cache") == unbroken
    assert [p.name for p in (tmp_path/"out").iterdir() if p.suffix != ".lock"] == ["cache"]


# --- a full disk ---


def test_a_disk_known_to_be_too_small(season, tmp_path, monkeypatch):
    "Catches hours of work before the disk is full, and a rest that passes for a cache."
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match="needs .* bytes, only .* are free") as caught: build_cache(season, tmp_path/"cache", 16)
    assert caught.value.errno == errno.ENOSPC
    no_cache(tmp_path/"cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert len(build_cache(season, tmp_path/"cache", 16).pixels) == 298


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 2 MB."
    disk = tmp_path/"disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    made = shutil.which("mount") and subprocess.run(command, capture_output=True, text=True)
    if not made or made.returncode: pytest.skip(f"only root may mount a small disk: {made and made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@unix
@pytest.mark.parametrize("every,workers", [(0, 0), (.02, 0), (60, 0), (.02, 2)])
def test_a_disk_that_fills_up_on_the_way(season, small_disk, tmp_path, monkeypatch, every, workers):
    "Catches a message that doesn't say what to do, work thrown away, and an older cache harmed."
    few = find_patches(season)[:20]
    build_cache(few, small_disk/"older", 16, workers=0)
    older = content(small_disk/"older")
    filler = small_disk/"filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free-120_000))
    monkeypatch.setattr(STORE, "SAVE_EVERY", every)
    with monkeypatch.context() as lie:
        usage = shutil.disk_usage(small_disk)
        lie.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
        with pytest.raises(OSError, match="of 300 patches the disk is full.*call again") as caught:
            build_cache(season, small_disk/"cache", 16, workers=workers)
    assert caught.value.errno == errno.ENOSPC and str(small_disk) in str(caught.value)
    no_cache(small_disk/"cache")
    assert content(small_disk/"older") == older and len(load_cache(small_disk/"older").pixels) == 20
    filler.unlink()
    build_cache(season, small_disk/"cache", 16, workers=workers)
    build_cache(season, tmp_path/"undisturbed", 16, workers=0)
    assert content(small_disk/"cache") == content(tmp_path/"undisturbed")


# --- memory ---

MEASURE = """
import resource, sys
from eo_ddpm.data import build_cache
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])//1024  # MB; ru_maxrss has the parent's
imported = peak()
cache = build_cache(sys.argv[1], sys.argv[2], 32, workers=int(sys.argv[3]))
print(len(cache.pixels), peak(), imported, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss//1024)
"""


@unix
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_small(tmp_path, workers):
    "Catches patches kept in memory, and workers that run ahead of the writer: 2,000 files in less than 500 MB a process."
    few = [write_image(tmp_path/f"{i}.tif", random_dn(i, (13, 32, 32)), interleave="pixel") for i in range(20)]
    folder = tmp_path/"root/ROIs1868_summer/s2_1"
    folder.mkdir(parents=True)
    for i in range(2000): os.link(few[i % 20], folder/f"ROIs1868_summer_s2_1_p{i}.tif")
    command = [sys.executable, "-c", MEASURE, tmp_path/"root", tmp_path/"cache", str(workers)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)
    assert run.returncode == 0, run.stderr[-2000:]
    patches, own, imported, children = map(int, run.stdout.split())
    beyond = 500-240  # torch for CPUs and rasterio take 240 MB by themselves, torch for CUDA twice that
    assert patches == 2000 and own-imported < beyond and children-imported < beyond and (children > 50 or not workers), run.stdout


# --- own images, and other people's ---


def test_a_large_scene_is_read_tile_by_tile(tmp_path, monkeypatch):
    "Catches a scene of gigabytes read whole for every tile, or once."
    write_image(tmp_path/"own/scene.tif", random_dn(0, (3, 3000, 3000)), tiled=True, blockxsize=256, blockysize=256)
    reads, real = [], rasterio.io.DatasetReader.read

    def spy(self, *args, window=None, **kwargs):
        reads.append((window.width, window.height) if window else self.shape)
        return real(self, *args, window=window, **kwargs)

    monkeypatch.setattr(rasterio.io.DatasetReader, "read", spy)
    cache = build_cache(tmp_path/"own", tmp_path/"cache", 500, scale=SCALES["report"], workers=0)
    assert len(cache.pixels) == 36 and set(reads) == {(500, 500)}
    assert len(reads) < 50  # eight more of them on trial


def test_empty_and_flat_tiles_are_left_out_by_name(tmp_path):
    "Catches tiles of nothing that teach the model to paint nothing, and a loss that isn't told."
    dn = random_dn(0, (3, 64, 192))+np.uint16(500)
    dn[:, :10, :64] = 0          # first tile: a sixth is empty
    dn[:, :, 64:128] = 1000      # second tile: open water
    write_image(tmp_path/"own/a.tif", dn)
    dn[dn == 0] = 9999
    write_image(tmp_path/"own/b.tif", dn, nodata=9999)  # the same, with a mark of its own
    cache = build_cache(tmp_path/"own", tmp_path/"cache", 64, scale=SCALES["report"])
    assert len(cache.pixels) == 2 and [row["window"] for row in cache.index()] == ["128 0 64 64"]*2
    assert [(Path(row["path"]).name, row["window"], row["reason"]) for row in cache.skipped()] == [
        (name, window, rule) for name in ("a.tif", "b.tif") for window, rule in (("0 0 64 64", "nodata"), ("64 0 64 64", "flat"))]


def test_images_with_other_pixels_are_refused(tmp_path):
    "Catches 20 m pixels mixed with 10 m ones: the model would learn two sizes of everything."
    write_image(tmp_path/"own/a.tif", random_dn(0, (3, 64, 64)))
    write_image(tmp_path/"own/b.tif", random_dn(0, (3, 64, 64)), transform=rasterio.Affine(20, 0, 0, 0, -20, 0))
    with pytest.raises(ValueError, match="b.tif: pixels of 20, but 10 in .*a.tif"): build_cache(tmp_path/"own", tmp_path/"cache", 64)


@pytest.mark.parametrize("name,driver,profile,tolerance", [
    ("a.png", "PNG", {}, 0), ("a.jp2", "JP2OpenJPEG", dict(quality=100, reversible=True), 0), ("a.jpg", "JPEG", dict(quality=98), 12)])
def test_pictures_without_a_place_on_earth(tmp_path, name, driver, profile, tolerance):
    "Catches JPEG 2000, JPEG or PNG refused for want of a map, or read with red and blue exchanged."
    pixels = smooth(2, side=96)
    write_image(tmp_path/"own"/name, pixels, driver, **profile)
    cache = build_cache(tmp_path/"own", tmp_path/"cache", 32, scale=SCALES["bytes"])
    assert len(cache.pixels) == 9 and cache.index()[0]["crs"] == ""
    assert np.abs(cache.pixels[4].numpy().astype(int)-pixels[:, 32:64, 32:64]).max() <= tolerance


def test_names_that_contradict_the_file_are_refused(tmp_path):
    "Catches blue taken for red because a user wrote the names in another order than the file has them."
    path = write_image(tmp_path/"own/a.tif", random_dn(0, (3, 64, 64)))
    with rasterio.open(path, "r+") as dst: dst.descriptions = ("B02", "B03", "B04")
    with pytest.raises(ValueError, match="a.tif: its own band names are B02, B03, B04, not B04, B03, B02"):
        build_cache(tmp_path/"own", tmp_path/"cache", 64, file_bands=RGB)
    with pytest.raises(ValueError, match="a.tif: 3 bands, but 2 names"):
        build_cache(tmp_path/"own", tmp_path/"cache", 64, file_bands=("B04", "B03"))
    np.testing.assert_array_equal(read_tile(find_tiles(tmp_path/"own", 64)[0], ("B04",))[0], random_dn(0, (3, 64, 64))[2])


def test_eurosat_is_read_by_name(tmp_path):
    "Catches B8A looked for where SEN12MS has it: in EuroSAT's files it is the last band."
    dn, picture = random_dn(0, (13, 64, 64)), smooth(3)
    write_image(tmp_path/"ms/EuroSAT/AnnualCrop/AnnualCrop_1.tif", dn)
    for label in ("AnnualCrop", "River"): write_image(tmp_path/f"rgb/2750/{label}/{label}_12.jpg", picture, "JPEG", quality=98)
    p, = data.find_eurosat(tmp_path/"ms")
    for band, place in (("B01", 0), ("B08", 7), ("B09", 8), ("B10", 9), ("B11", 10), ("B12", 11), ("B8A", 12)):
        np.testing.assert_array_equal(read_tile(p, (band,))[0], dn[place])
    cache = build_cache(tmp_path/"ms", tmp_path/"a", 64, ("B8A", "B04"), Scale(0, 10000))
    np.testing.assert_array_equal(cache.pixels[0], Scale(0, 10000).to_pixels(dn[[12, 3]], ("B8A", "B04")))
    cache = build_cache(tmp_path/"rgb", tmp_path/"b", 64, scale=SCALES["bytes"])
    assert [row["label"] for row in cache.index()] == ["AnnualCrop", "River"] and cache.scenes.tolist() == [3, 3]
    assert np.abs(cache.pixels[0].numpy().astype(int)-picture).max() <= 12


# --- other systems ---


def test_workers_that_are_spawned(tmp_path):
    "Catches what Windows and macOS cannot do: hand a worker open files, lambdas or a half-opened image. There nothing is forked."
    for p in range(40): write_image(tmp_path/f"tree/ROIs1868_summer/s2_1/ROIs1868_summer_s2_1_p{p}.tif", random_dn(p, (13, 32, 32)))
    code = """import sys, torch
from eo_ddpm.data import build_cache
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    build_cache(sys.argv[1], sys.argv[2], 32, workers=2)
"""
    (tmp_path/"script.py").write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path/"script.py"), str(tmp_path/"tree"), str(tmp_path/"two")], check=True, env=ENV, timeout=120)
    ours = build_cache(tmp_path/"tree", tmp_path/"one", 32, workers=0)
    assert (load_cache(tmp_path/"two").pixels == ours.pixels).all()
