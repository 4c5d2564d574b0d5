"""Kills a run of distill.py again and again, also in the middle of a write, and goes on with it.

    python -m tests.tools.kill_runs --kills 30 --out runs/kills

After every kill (SIGKILL at a random moment; every other time while a checkpoint is written) the
newest checkpoint must be whole and the log must have no line twice, none missing and none half.
At the end the run must be, bit for bit, the run that was never killed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from convert_weights import run_command

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "tests" / "data" / "tiny"


def command(out, *more):
    return [sys.executable, ROOT / "distill.py", "--out", out, *more]


def options(prompts, iterations):
    return ["--teacher", TINY, "--prompts", prompts, "--size", "16", "--batch-size", "2",
            "--iterations", str(iterations), "--fake-updates", "1", "--sample-every", "2",
            "--log-every", "3"]


def start(words):
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def wait_for(files, process, seconds=180):
    """Waits until files() has something new, such as the pictures of another checkpoint."""
    before, end = set(files()), time.time() + seconds
    while time.time() < end and process.poll() is None and set(files()) <= before:
        time.sleep(0.001)


def pictures(out):
    return list(out.glob("samples/*.png"))


def half_written(out):
    return [*out.glob("checkpoints/.part-*"), *out.glob("student/.part-*")]


def newest(out):
    folders = sorted(out.glob("checkpoints/[0-9]*"))
    return folders[-1] if folders else None


def check(out, before):
    """What is wrong with a run that was killed -> list of sentences. before: its newest then."""
    faults, folder = [], newest(out)
    if before and (folder is None or folder.name < before.name):
        faults.append(f"checkpoint {before.name} is lost")
    if folder is None:
        return faults
    done = json.loads((folder / "progress.json").read_text())["done"]
    for kept in out.glob("checkpoints/[0-9]*"):
        try:
            json.loads((kept / "progress.json").read_text())
            load_file(next(kept.glob("*.safetensors")))
        except Exception as error:
            faults.append(f"{kept.name} is damaged: {error!r}")
    lines = (out / "log.jsonl").read_text().split("\n")[:-1]
    numbers = [json.loads(line)["iteration"] for line in lines]
    if numbers != sorted(set(numbers)) or numbers[:done // 3] != list(range(3, done + 1, 3)):
        faults.append(f"the log has the iterations {numbers} at checkpoint {done}")
    return faults


def same(a, b):
    first, second = (load_file(next(newest(out).glob("*.safetensors"))) for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def without_seconds(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def run_whole(words):
    """A run that nobody kills."""
    process = start(words)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run that is not killed failed:\n{stderr}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists already: name a new directory")
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = args.out / "prompts.txt"
    prompts.write_text("a cat\na dog\na fox\n")
    whole, killed = args.out / "whole", args.out / "killed"
    run_whole(command(whole, *options(prompts, args.iterations)))
    kills, faults, rng = 0, [], random.Random(args.seed)
    words = command(killed, *options(prompts, args.iterations))
    while kills < args.kills:
        before = newest(killed)
        process = start(words)
        wait_for(partial(pictures, killed), process)          # it has gone on
        if kills % 2:
            wait_for(partial(half_written, killed), process)
            time.sleep(rng.random() * 0.3)
        else:
            time.sleep(rng.random() * 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        found = check(killed, before) if killed.exists() else []
        faults += found
        place = newest(killed)
        print(f"kill {kills}: newest checkpoint {place.name if place else 'none'}"
              + "".join(f"; FAULT: {fault}" for fault in found), flush=True)
        if (killed / "config.json").exists():
            words = command(killed, "--resume")
        if place and place.name == f"{args.iterations:08d}":
            shutil.rmtree(killed)             # finished: once more from the start
            words = command(killed, *options(prompts, args.iterations))
    process = start(words)
    _, stderr = process.communicate()
    if process.returncode:
        faults.append(f"the last resumption ended with {process.returncode}: {stderr[-300:]}")
    elif not same(whole, killed) or without_seconds(whole) != without_seconds(killed):
        faults.append("the killed run is not the run that was never killed")
    elif list(killed.rglob("*.part*")):
        faults.append("parts of files are left")
    print(f"{kills} kills, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    run_command(main)
