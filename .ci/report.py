"""The report's experiment: python .ci/report.py OUT [--profile laptop] [-p NAME VALUE ...]

Trains with each of the three schedules (lesson 07), all else equal, judges each run (08), compares them (09). What is done
already is left as it is, so a stopped report goes on; a run that fails does not spoil the others. All that is read and
written lies in OUT: linear/, cosine/, sigmoid/, each with its executed notebooks, and 09_compare.ipynb.
-p goes to lesson 07, as in `-p data /data/SEN12MS`."""
import argparse
import json
import sys
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError

NOTEBOOKS = Path(__file__).resolve().parents[1]/"nbs"
SCHEDULES = ("linear", "cosine", "sigmoid")


def execute(lesson, out, **parameters):
    "Was it executed to the end? The notebook is kept in `out` either way."
    out.mkdir(parents=True, exist_ok=True)
    print(f"{lesson} -> {out/lesson}.ipynb", flush=True)
    try: papermill.execute_notebook(str(NOTEBOOKS/f"{lesson}.ipynb"), str(out/f"{lesson}.ipynb"), parameters, kernel_name="python3",
                                    cwd=str(NOTEBOOKS), log_output=lesson.startswith("07"), progress_bar=False)
    except (papermill.PapermillExecutionError, DeadKernelError) as e: print(f"failed: {str(e).strip().splitlines()[-1]}", file=sys.stderr, flush=True)
    else: return True


def same_steps(out):
    "The clock gives the first run its number of steps; all others get the same."
    for name in SCHEDULES:
        if (out/name/"config.json").is_file():
            config = json.loads((out/name/"config.json").read_text(encoding="utf-8"))["config"]
            return dict(steps_per_epoch=config["steps_per_epoch"]) if config["steps_per_epoch"] else {}
    return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--profile", default="laptop", help="of lesson 07: quick, laptop, box or report (default laptop)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter of lesson 07")
    args = parser.parse_args()
    out, parameters = args.out.resolve(), {name: yaml.safe_load(value) for name, value in args.p}

    done = []
    for name in SCHEDULES:
        run = out/name
        trained = (run/"samples"/"final.png").is_file() or execute(  # the last thing that lesson 07 draws
            "07_train_gpu", run, profile=args.profile, schedule=name, run=str(run), resume=True, **same_steps(out) | parameters)
        if trained and ((run/"evaluation.json").is_file() or execute("08_evaluation", run, run=str(run))): done.append(name)
    compared = bool(done) and execute("09_compare", out, runs=str(out))
    print(f"{', '.join(done) or 'nothing'} done" + f", compared in {out/'09_compare.ipynb'}"*bool(compared))
    if len(done) < len(SCHEDULES) or not compared: sys.exit(1)


if __name__ == "__main__": main()
