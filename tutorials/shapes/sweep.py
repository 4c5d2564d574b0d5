"""The paper's ablations on the shapes world: distils a student for each line of VARIANTS and each seed, and scores them.

    python tutorials/shapes/sweep.py --out runs/sweep --workers 2          an hour and a half on 2 CPU cores; goes on where it stopped
    python tutorials/shapes/sweep.py --out runs/sweep --table              the table of what is there, in markdown

Each student is scored every 40 iterations on 100 prompts kept out of its training; the best iteration by joint accuracy there and
the last one are then scored on the 1,000 held-out prompts. What the columns mean: the top of evaluate.py, and COLUMNS.
"""

import argparse
import copy
import json
import os
import shutil
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]

import distill                                        # noqa: E402
import evaluate                                       # noqa: E402
import sampler                                        # noqa: E402
from convert_weights import UserError, run_command    # noqa: E402
from model import has_bfloat16_products               # noqa: E402

BASE = ["--iterations", "120", "--sample-every", "40", "--dtype", "bfloat16" if has_bfloat16_products() else "float32"]
STRONG = ["--steps", "4", "--alpha", "4"]      # a spear that is hard to hold shows the difference between shields
VARIANTS = {
    "1 step": ["--steps", "1"],
    "2 steps": ["--steps", "2"],
    "4 steps": ["--steps", "4"],
    "8 steps": ["--steps", "8"],
    "CA + DM, hybrid": STRONG,
    "CA alone": [*STRONG, "--shield", "none"],
    "DM alone": ["--steps", "4", "--alpha", "1"],
    "CA + mean/variance": [*STRONG, "--shield", "meanvar"],
    "CA + GAN": [*STRONG, "--shield", "gan"],
    "CA + DM, coupled": [*STRONG, "--schedule", "coupled"],
    "CA + DM, full": [*STRONG, "--schedule", "full"],
    "CA + DM, constrained": [*STRONG, "--schedule", "constrained"],
    "CA + DM, hybrid, raw terms": [*STRONG, "--raw"],
}
COLUMNS = {"joint": "joint", "shape": "shape", "fd": "FD", "std_ratio": "latent std ratio", "out_of_range": "out of range",
           "saturation": "saturation", "centre_spread": "centre spread", "seed_difference": "seeds differ"}
VALIDATION = 100          # of the training prompts, the last ones
REAL = 512                # drawings for the shields that want real pictures


def scores(student, prompts, real, real_std):
    """A row of figures for prompts and their drawings: evaluate.score's, and the latents' std over real_std, that of the drawings' latents."""
    latents = evaluate.sample_latents(student, prompts, student.steps, student.guidance)
    row = evaluate.score(evaluate.decode(student.vae, latents), prompts, real)
    return row | {"std_ratio": float(latents.std()) / real_std}


def with_std(vae, real):
    """Drawings -> (drawings, std of their latents), the last two arguments of scores."""
    return real, float(evaluate.encode(vae, real).std())


def run_variant(job):
    """(name, seed, out) -> result: one student, trained and scored."""
    name, seed, out, more = job
    torch.set_num_threads(1)
    folder = os.path.join(out, f"{name.replace(' ', '_').replace('/', '_')}-{seed}")
    args = distill.parse_arguments([*BASE, *VARIANTS[name], *more, "--seed", str(seed), "--out", folder])
    pipeline = sampler.load_pipeline(args.teacher)
    settings = distill.settings_of(args, pipeline)
    prompts = sampler.read_prompts(os.path.join(HERE, "prompts.txt"))
    prompts, validation = prompts[:-VALIDATION], prompts[-VALIDATION:]
    held_out = sampler.read_prompts(os.path.join(HERE, "prompts_heldout.txt"))
    real = None
    if settings.shield in ("meanvar", "gan"):
        real = evaluate.encode(pipeline.vae, evaluate.drawings(prompts[:REAL], seed=3))
    validation_real, checkpoints = with_std(pipeline.vae, evaluate.drawings(validation, seed=1)), []

    def watch(iteration, student):
        row = scores(student, validation, *validation_real)
        checkpoints.append((row["joint"], iteration, copy.deepcopy(student.dit.state_dict())))

    shutil.rmtree(folder, ignore_errors=True)     # of a run that was cut off
    os.makedirs(folder)
    student = distill.distil(pipeline, prompts, settings, args, real, watch)
    result = {"name": name, "seed": seed, "options": more, "validation": [c[:2] for c in checkpoints]}
    held_out_real = with_std(pipeline.vae, evaluate.drawings(held_out, seed=1))
    os.remove(os.path.join(folder, "state.pt"))   # large, and no longer needed
    best = max(checkpoints, key=lambda c: c[:2])
    for which, (_, iteration, weights) in (("best", best), ("last", checkpoints[-1])):
        if which == "last" and iteration == best[1]:
            result["last"] = result["best"]
            continue
        student.dit.load_state_dict(weights)
        row = scores(student, held_out, *held_out_real) | evaluate.diversity(student, student.steps, student.guidance)
        result[which] = {"iteration": iteration, **row}
    return result


def read_results(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table(results):
    """Results -> markdown: mean over seeds, and half the range in brackets."""
    lines = ["| | iteration | " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for name in VARIANTS:
        runs = [r for r in results if r["name"] == name]
        for which in ("best", "last"):
            if not runs or which == "last" and all(r["last"] == r["best"] for r in runs):
                continue
            cells = []
            for column in COLUMNS:
                values = [r[which][column] for r in runs]
                cells.append(f"{sum(values) / len(values):.3f} ({(max(values) - min(values)) / 2:.3f})")
            iterations = "/".join(str(r[which]["iteration"]) for r in sorted(runs, key=lambda r: r["seed"]))
            lines.append(f"| {name}, {which} | {iterations} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Distil and score students: the paper's ablations on the shapes world.")
    parser.add_argument("--out", default="runs/sweep", help="folder for the runs and results.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone: " + "; ".join(VARIANTS))
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="print the table of the results there are, and stop")
    args, more = parser.parse_known_args()    # the rest are options of distill.py for every run, such as --iterations 300
    path = os.path.join(args.out, "results.jsonl")
    if args.table:
        print(table(read_results(path)))
        return
    distill.parse_arguments([*BASE, *more])   # a mistake ends here, not in a worker
    names = args.only or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"there is no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    os.makedirs(args.out, exist_ok=True)
    results = read_results(path)
    if any(r["options"] != more for r in results):
        raise UserError(f"{path} holds runs with other options: {' '.join(results[0]['options'])!r}; name another --out")
    done = {(r["name"], r["seed"]) for r in results}
    jobs = [(name, seed, args.out, more) for seed in args.seeds for name in names if (name, seed) not in done]
    with torch.multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for result in pool.imap_unordered(run_variant, jobs, chunksize=1):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    print(table(read_results(path)))


if __name__ == "__main__":
    run_command(main)
