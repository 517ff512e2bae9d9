"""Put what lessons 08 and 09 read into the package: python .ci/examples.py REPORT FOUR_BANDS

REPORT is a folder of `make report`; FOUR_BANDS a run of lesson 07 with -p bands B04,B03,B02,B08. Weights stay behind: of the
three runs come the tables (rounded), four grids of samples each and what lesson 08 found; of the fourth, 160 painted patches."""
import csv
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from eo_ddpm.runs import example_runs, read_epochs
from eo_ddpm.sampling import dpm_solver_sample
from eo_ddpm.training import autocast, load_run, pick_precision


def copy_table(path, out):
    "Four digits are enough to draw."
    rows = list(csv.reader(open(path, encoding="utf-8")))
    digits = [",".join(value if value.isdigit() else f"{float(value):.4g}" for value in row) for row in rows[1:]]
    out.write_text("\n".join([",".join(rows[0]), *digits, ""]), encoding="utf-8", newline="\n")


def main(report, four):
    shutil.rmtree(example_runs(), ignore_errors=True)
    for name in ("linear", "cosine", "sigmoid"):
        run, out = report/name, example_runs()/name
        (out/"samples").mkdir(parents=True)
        shutil.copy(run/"config.json", out)
        for table in ("metrics.csv", "epochs.csv"): copy_table(run/table, out/table)
        shutil.copy(run/"evaluation.json", out)
        for epoch in {1, 2, 4, read_epochs(run)[-1]["epoch"]}: shutil.copy(run/"samples"/f"epoch_{epoch:03d}.png", out/"samples")
    out = example_runs()/"four_bands"
    out.mkdir()
    shutil.copy(four/"config.json", out)
    network, schedule, config = load_run(four)
    noise = torch.randn(160, 4, config.size, config.size, generator=torch.Generator().manual_seed(0))
    with autocast("cpu", pick_precision("cpu")): painted = dpm_solver_sample(network, schedule, noise, config.objective).float()
    save_file({"painted": ((painted+1)*127.5).round().byte().contiguous()}, out/"painted.safetensors")
    print(f"{sum(p.stat().st_size for p in example_runs().rglob('*') if p.is_file())/1e6:.2f} MB in {example_runs()}")


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
