"""How many network calls does a picture need? KID, grain and variety of painted patches for each sampler and number of calls.

    python benchmarks/calls.py eo_ddpm/pretrained

Everything from the same starting noise, against held-out crops, as lesson 08 judges. Writes calls.json into the run folder, one
row after the other; called again, it goes on where it was. A quarter of an hour on two cores."""
import argparse
import json
from pathlib import Path

import torch

from eo_ddpm.metrics import FEATURES, frechet_distance, image_features, kid, radial_power_spectrum, random_crops, real_features, run_data
from eo_ddpm.runs import latest_checkpoint
from eo_ddpm.sampling import ddim_sample, ddpm_sample, dpm_solver_sample, paint_seeds
from eo_ddpm.store import replace_text
from eo_ddpm.training import load_run, pick_precision

SUBSET = 40  # rows of a subset of KID, as in lesson 08


def ways(T):
    "Name, sampler, options and the numbers of calls to try; the cheap ones first."
    few = [5, 10, 20, 50]
    yield from (("DPM-Solver++", dpm_solver_sample, dict(steps=k), k) for k in few)
    yield from (("DDIM, eta 0", ddim_sample, dict(steps=k), k) for k in [*few, 100])
    yield from (("DDIM, eta 1", ddim_sample, dict(steps=k, eta=1.), k) for k in [*few, 100])
    yield from ((f"DDPM, {variance} variance", ddpm_sample, dict(variance=variance), T) for variance in ("small", "large"))


def fine_power(x0):
    "Mean power of waves of less than four pixels."
    frequencies, power = radial_power_spectrum(x0)
    return power.mean(0)[frequencies > 1/4].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("-n", type=int, default=200, help="patches for each row")
    args = parser.parse_args()

    model, schedule, config = load_run(args.run)
    _, held = run_data(args.run)
    shape, precision = (config.model.get("channels", 3), config.size, config.size), pick_precision("cpu")
    real, real_fine = real_features(held, args.n, config.size, 0), fine_power(random_crops(held, args.n, config.size, 0))
    path = args.run/"calls.json"
    head = dict(step=int(latest_checkpoint(args.run).name[5:]), patches=args.n, precision=precision, features=FEATURES, subset=SUBSET)
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else head | {"rows": []}
    if any(table[key] != value for key, value in head.items()): raise SystemExit(f"{path}: made with other settings; move it away")
    done = {(row["sampler"], row["calls"]) for row in table["rows"]}
    for name, sampler, options, calls in ways(schedule.num_timesteps):
        if (name, calls) in done: continue
        x0 = paint_seeds(sampler, model, schedule, list(range(args.n)), shape, config.objective, precision=precision, **options)
        if len(x0) < args.n: raise SystemExit(f"{path}: stopped in the middle of a row; {len(table['rows'])} rows are kept")
        features = image_features(x0)
        distances = kid(real, features, SUBSET, generator=torch.Generator().manual_seed(0))
        table["rows"].append(dict(
            sampler=name, calls=calls, frechet=round(frechet_distance(real, features), 1),
            kid=[round(v, 4) for v in (distances.mean().item(), *distances.quantile(torch.tensor([.025, .975]).double()).tolist())],
            fine_off=round(10*(fine_power(x0)/real_fine).log10().item(), 2), variety=round(torch.pdist(features).mean().item(), 2)))
        replace_text(path, json.dumps(table, indent=1))
        print(table["rows"][-1], flush=True)


if __name__ == "__main__": main()
