"""Damages the files of a run of distill.py at random, and checks what --resume makes of them.

    python -m tests.tools.fuzz_runs [--cases 80] [--seed 0]

Good: one sentence and exit code 2, or a run that goes on. Bad: a traceback, a hang, or a checkpoint
of the run that is gone afterwards. The run is one of the tiny checkpoint, of two iterations.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import distill
from tests.conftest import TINY, run_here

SECONDS = 60                  # for one case; a hang is more


def flip(data, chance):
    i = chance.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << chance.randrange(8)]) + data[i + 1:]


def cut(data, chance):
    return data[:chance.randrange(len(data))]


def repeat(data, chance):
    return data + data[chance.randrange(len(data)):]


def other_text(data, chance):
    return chance.choice([b"", b"{}", b"[]", b"null", b"3", b'{"iteration": "x"}\n', b"\xff\xfe"])


def swap_digits(data, chance):
    """Another number where there was one."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return flip(data, chance)
    i = chance.choice(places)
    return data[:i] + chance.choice([b"9", b"-", b"x", b"1e9", b"null"]) + data[i + 1:]


DAMAGES = (flip, cut, repeat, other_text, swap_digits)


class Hang(BaseException):
    """A BaseException, so that no `except Exception` of the program hides it."""


def stop(*_):
    raise Hang


def try_case(run, chance):
    """Damages one file of the run -> what was done, and what is wrong, or None."""
    before = {folder.name for folder in (run / "checkpoints").iterdir()}
    files = sorted(file for file in run.rglob("*")
                   if file.is_file() and file.suffix != ".png" and file.stat().st_size)
    file, damage = chance.choice(files), chance.choice(DAMAGES)
    is_removed = chance.random() < 0.1
    if is_removed:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes(), chance))
    done = f"{'remove' if is_removed else damage.__name__} {file.relative_to(run)}"
    signal.alarm(SECONDS)
    try:
        result = run_here(distill.main, "--out", run, "--resume", "--iterations", 3)
    except (Exception, Hang):
        return done, traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)
    code, lines = result.returncode, result.stderr.splitlines()
    sentences = [line for line in lines if line.startswith("error: ")]
    if code not in (0, 2) or (code == 2 and len(sentences) != 1):
        return done, f"exit code {code}: {result.stderr[-500:]}"
    gone = before - {folder.name for folder in (run / "checkpoints").iterdir()}
    return done, f"gone: {gone}" if code == 2 and gone else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, stop)
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        whole = folder / "whole"
        result = run_here(
            distill.main, "--teacher", TINY, "--prompts", folder / "prompts.txt", "--out", whole,
            "--size", 32, "--iterations", 2, "--batch-size", 2, "--fake-updates", 1,
            "--sample-every", 1)
        assert result.returncode == 0, result.stderr
        for case in range(args.cases):
            run = folder / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            done, fault = try_case(run, random.Random(args.seed * 10 ** 6 + case))
            faults += fault is not None
            print(f"{case:4} {done}" + (f"\n     FAULT: {fault}" if fault else ""), flush=True)
    print(f"{args.cases} cases, {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
