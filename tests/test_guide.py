"The teacher's guide and the errata say what the notebooks say: titles, links, times, numbers."
import json
import math
import re
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from eo_ddpm.data import SAMPLE_HOLDOUT, SCALES, find_patches, read_patch, sample_root, split_by_scene
from eo_ddpm.schedules import SCHEDULES, get_schedule
from eo_ddpm.training import TrainConfig
from eo_ddpm.unet import UNet

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/"nbs"
GUIDE, ERRATA = ((NBS/"teacher"/f"{name}.md").read_text(encoding="utf-8") for name in ("guide", "errata"))


def flat(text):
    "Line breaks of the page are no part of what it says."
    return " ".join(text.split())


@lru_cache
def notebook(name):
    "All that is written in a notebook, and all that its cells have printed."
    cells = json.loads((NBS/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = []
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            printed += [output.get("text", []), data.get("text/plain", []), data.get("text/markdown", [])]
    return flat("\n".join("".join(cell["source"]) for cell in cells)), flat("\n".join("".join(text) for text in printed))


def lessons():
    "The rows of the index's course table."
    source, _ = notebook("index")
    return re.findall(r"\| \[(\d\d_\w+)\]", source.partition("## The course")[2].partition("The numbers are the reading order")[0])


def chapters():
    "Lesson -> its chapter of the guide."
    body = GUIDE.partition("## Lesson by lesson")[2].partition("\n## ")[0]
    return {title.strip(): text for title, text in re.findall(r"### (.*)\n((?:(?!### ).*\n)*)", body+"\n")}


def day():
    "The cells of each row of the day's plan."
    table = GUIDE.partition("## The day")[2].partition("\n\nHow to hold")[0]
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.strip().splitlines()[2:]]


@pytest.mark.parametrize("page", ["guide.md", "errata.md"])
def test_links(page):
    "Catches a notebook that was renamed or split."
    text = (NBS/"teacher"/page).read_text(encoding="utf-8")
    gone = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "//" not in link and not (NBS/"teacher"/link).exists()]
    assert not gone


def test_every_lesson_is_there():
    "Catches a lesson of the course table that the guide has forgotten, and one that is in another order."
    assert list(chapters()) == lessons()
    planned = [m[1] for row in day() if (m := re.match(r"\[(\d\d_\w+)\]", row[2]))]
    assert planned == lessons()


def test_every_chapter_is_whole():
    "Catches a chapter without its question, its words, its figures or its exercise."
    for name, text in chapters().items():
        missing = [part for part in ("Ask first", "Say", "Show", "Students ask", "Exercise") if f"- **{part}.**" not in text]
        assert not missing, f"{name}: {missing}"


def test_the_day_adds_up():
    "Catches a row whose time is not the time before plus its minutes."
    rows = [(row[0], int(row[1])) for row in day() if ":" in row[0]]
    times = [datetime.strptime(start, "%H:%M") for start, _ in rows]
    for (start, minutes), begin, following in zip(rows, times, times[1:]):
        assert begin+timedelta(minutes=minutes) == following, f"the row of {start}"


def test_seconds_agree_with_the_index():
    "Catches a lesson that got slower or faster in one of the two tables."
    source, _ = notebook("index")
    for row in day():
        seconds = re.fullmatch(r"(\d+) s", row[3])
        if seconds is None: continue
        name = re.match(r"\[(\w+)\]", row[2])[1]
        minutes = re.search(rf"\[{name}\]\([^)]*\) \|[^|]*\|[^|]*\| ([\d.]+) \|", source)[1]
        assert int(seconds[1])/60 == pytest.approx(float(minutes), abs=.15), name


def quoted(text): return re.findall(r'"([^"]+)"', flat(text))


def test_titles_in_the_chapters():
    "Catches a section or figure that is called otherwise now, and a slider that is gone."
    for name, text in chapters().items():
        show = re.search(r"- \*\*Show\.\*\*(.*?)\n- \*\*", text, re.S)[1]
        source, _ = notebook(name)
        missing = [title for title in quoted(show) + re.findall(r"`([^`]+)`", show) if title not in source]
        assert not missing, f"{name}: {missing}"


def test_titles_in_the_short_plan_and_in_the_errata():
    "The same for the ninety minutes, and for the places where both versions of a formula are run."
    for name, titles in re.findall(r"\| (\d\d_\w+) \|([^|]*)\|\n", GUIDE.partition("## Ninety minutes")[2].partition("\n## ")[0]):
        assert all(title in notebook(name)[0] for title in quoted(titles)), name
    for name, titles in re.findall(r'\]\(\.\./(\w+)\.ipynb\)((?:,? ?(?:and )?"[^"]+")*)', flat(ERRATA)):
        assert all(title in notebook(name)[0] for title in quoted(titles)), name


STORED = {  # what the guide says -> what a cell of the lesson has printed
    "01_data": {"402": "402", "1974": "1974", "918": "918", "1946": "1946", "96 %": "96%", "95 patches": "95 patches"},
    "04_unet": {"9,908,483": "9,908,483", "2,526,371": "2,526,371", "0.72 GFLOP": "0.72", "49.7 GFLOP": "49.72"},
    "05_training": {"1.02": "1.0243", "-0.18": "-0.1757", "0.224": "0.224", "0.115": "0.115"},
    "06_sampling": {"0.250": "std 0.250", "0.012": "std 0.012"},
    "07_train_gpu": {"5,384": "5384/5384", "8.5 minutes": "8.5 minutes"},
    "08_evaluation": {"324": "324", "92": "92", "0.013": "0.0134", "0.177": "0.1772", "0.277": "0.2770", "4 %": "4%"},
    "09_compare": {"0.138 (0.107 to 0.174)": "0.138 (0.107 to 0.174)", "0.146 (0.113 to 0.189)": "0.146 (0.113 to 0.189)",
                   "0.196 (0.163 to 0.235)": "0.196 (0.163 to 0.235)", "0.0127": "0.0127", "0.0236": "0.0236", "0.0187": "0.0187",
                   "37 %": "37%"},
    "14_control": {"22.3 dB": "one fill 22.3", "24.2": "averages of seen pixels 24.2"},
}


@pytest.mark.parametrize("name", STORED)
def test_numbers_of_the_stored_outputs(name):
    "Catches a lesson that was executed anew with other numbers."
    said, (_, printed) = flat(chapters()[name]), notebook(name)
    for ours, theirs in STORED[name].items(): assert ours in said and theirs in printed, (ours, theirs)


def test_numbers_of_the_benchmarks():
    "Catches a GPU number that nobody has measured."
    measured = flat((ROOT/"benchmarks/README.md").read_text(encoding="utf-8"))
    assert "40.4 (40.2-40.7)" in measured and "40.4 ms" in GUIDE
    assert "`-p profile quick`, 43 s" in measured and "43 s on an H100" in GUIDE
    assert "8.6 minutes a run" in measured and "three times 8.6 minutes" in flat(GUIDE)
    rate = int(re.search(r"45,753 files, two workers \((\d+) images/s", measured)[1])
    assert f"took {45753/rate:.0f} s on two cores" in GUIDE
    steps = 45753//8
    assert f"{steps:,} steps are {11*steps:,}" in flat(GUIDE) and f"so {11*steps*.0404/60:.0f} minutes" in flat(GUIDE)


def say(text, *pages):
    "Each of the pages says so."
    for page in pages: assert text in flat(page), text


def test_numbers_of_the_schedules():
    "Catches a wrong number about schedules in the guide or on the handout."
    exact = {name: get_schedule(name, 500).exact for name in SCHEDULES}
    abar = {name: e["alphas_cumprod"] for name, e in exact.items()}
    chapter, plain = chapters(), torch.linspace(1e-4, .02, 500, dtype=torch.float64)
    not_rescaled = (1-plain).cumprod(0)
    say(f"{not_rescaled[-1].sqrt():.3f} instead of {abar['linear'][-1].sqrt():.3f}", chapter["03_schedules"])
    say(f"{not_rescaled[-1].sqrt():.3f}$ of the patch is left at the end instead of {abar['linear'][-1].sqrt():.3f}", ERRATA)
    assert round((not_rescaled[-1]/abar["linear"][-1]).sqrt().item()) == 13  # "13 times"
    say(f"linear {abar['linear'][249]:.3f} if rescaled by $1000/T$, {not_rescaled[249]:.3f} if not", ERRATA)
    bent = (1-(torch.sigmoid(torch.linspace(-6, 6, 500, dtype=torch.float64))*(.02-1e-4)+1e-4)).cumprod(0)
    say(f"sigmoid {abar['sigmoid'][249]:.3f} on $\\bar\\alpha$ (the report's library), {bent[249]:.3f} on", ERRATA)
    say(f"{1/abar['cosine'][-1].sqrt():,.0f} times", chapter["03_schedules"])
    lost = [((a < .1).nonzero()[0].item()+1)/500 for a in abar.values()]
    say("{:.2f} for linear, {:.2f} for cosine, {:.2f} for sigmoid".format(*lost), chapter["03_schedules"])
    assert abs(abar["linear"][129]-abar["cosine"][249]) < .01  # the twins of the slider: 26 and 50 per cent of the way
    assert (abar["linear"] < .5).nonzero()[0].item() == 129
    say(f"at 499 a weight of {abar['linear'][-1].sqrt():.3f}", chapter["02_forward"])
    say(f"At the end {1-math.erf(.5**.5):.0%}".replace("%", " %"), chapter["02_forward"])
    alphas = exact["linear"]["alphas"]
    say(f"{alphas[:2].sum():.4f} on the linear schedule, where the product is {alphas[:2].prod():.4f}", ERRATA)
    variance = exact["cosine"]["posterior_variance"][250]
    say(f"{variance:.4f} instead of {variance.sqrt():.3f}", ERRATA)
    for name, said in (("cosine", "0.224 (cosine)"), ("linear", "0.115 (linear)")):
        a = abar[name]
        assert f"{(a*.09/(a*.09+1-a)).mean():.3f} ({name})" == said
        say(said, chapter["05_training"])


def test_losses_of_the_best_linear_denoiser():
    "Catches a wrong claim in the erratum about loss curves."
    f = torch.fft.fftfreq(128, dtype=torch.float64)
    power = 1/(f[:, None]**2+f**2)
    power[0, 0] = 0
    power = power*.3**2/power.mean()
    def loss(name): return np.mean([(s*power/(1+s*power)).mean().item() for s in get_schedule(name, 500).exact["snr"]])
    linear, cosine, sigmoid = map(loss, ("linear", "cosine", "sigmoid"))
    say(f"a loss of {linear:.2f} with the linear, {cosine:.2f} with the cosine and {sigmoid:.2f} with the sigmoid", ERRATA)


def test_numbers_of_the_data():
    "Catches a wrong number about contrast, bytes or the roof."
    train, _ = split_by_scene(find_patches(sample_root()), SAMPLE_HOLDOUT)
    dn = np.stack([read_patch(p.path) for p in train]).swapaxes(0, 1).reshape(3, -1, 256)
    spread = {name: (2*SCALES[name].to_unit(dn)).std() for name in ("reflectance", "natural", "report")}
    chapter = chapters()["01_data"]
    say("of {reflectance:.2f}; on the natural scale {natural:.2f}, on the report's {report:.2f}".format(**spread), chapter)
    say(f"a standard deviation of {spread['report']:.2f} (natural scale: {spread['natural']:.2f})", ERRATA)
    def dn_a_level(scale):
        dn = SCALES[scale].to_dn(torch.arange(256.).view(1, 1, -1)/127.5-1, ("B04",)).ravel()
        return np.diff(dn)[(dn[1:] > 500) & (dn[1:] < 1500)].mean()
    say(f"is {dn_a_level('natural'):.0f} dn on the natural scale, {dn_a_level('report'):.0f} on the report's", chapter)
    roof = round(255*(6467/5000)**(1/2.2))
    say(f"DN 6467 becomes {roof}, as a byte {roof % 256}", ERRATA)


def test_numbers_of_the_network_and_of_training():
    "Catches a wrong size, and a profile that trains for another number of steps than the guide warns of."
    weights = sum(p.numel() for p in UNet().parameters())
    say(f"{weights:,} weights, {4*weights/1e6:.1f} MB", chapters()["04_unet"])
    train, _ = split_by_scene(find_patches(sample_root()), SAMPLE_HOLDOUT)
    say(f"ends after {11*(len(train)//8)} steps: an epoch is {len(train)} patches", chapters()["07_train_gpu"])
    assert TrainConfig().steps_per_epoch == 0  # once through the patches
    pixel, seen, abar = torch.tensor([-.6, .6]), .3, torch.tensor(.5)
    noise = (seen-abar.sqrt()*pixel)/(1-abar).sqrt()
    say(f"{noise[0]:.2f} and {noise[1]:.2f}", chapters()["05_training"])
