"""How long whole commands take, from start to end: medians of interleaved runs.

    python -m tests.tools.measure_commands             start-up, and threads that wait
    python -m tests.tools.measure_commands --repeats 9

Start-up: a picture of the bundled model against `import torch` alone. Threads that wait: OpenMP's
either sleep (PASSIVE, what the scripts ask for) or spin (ACTIVE, its default), on a quiet machine
and beside a process that keeps one core busy.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = [ROOT / "sampler.py", "a panda on a red card with the word LOVE"]
DISTIL = [ROOT / "distill.py", "--iterations", 5, "--sample-every", 1000, "--overwrite"]


@contextmanager
def busy_core():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(words, folder, **environment):
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], cwd=folder, check=True,
                   env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def medians(cases, repeats, folder):
    """{name: (words, environment)} -> {name: median seconds}; the cases take turns."""
    times = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (words, environment) in cases.items():
            times[name].append(seconds(words, folder, **environment))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        distil = [*DISTIL, "--out", Path(folder) / "run"]
        found = medians({"import torch": (["-c", "import torch"], {}),
                         "a picture": (PICTURE, {})}, args.repeats, folder)
        for name, value in found.items():
            print(f"{name:40} {value:6.2f} s", flush=True)
        print(f"{'a picture, beside import torch':40} "
              f"{found['a picture'] - found['import torch']:+6.2f} s")
        policies = {policy: (distil, {"OMP_WAIT_POLICY": policy})
                    for policy in ("PASSIVE", "ACTIVE")}
        for policy, value in medians(policies, args.repeats, folder).items():
            print(f"5 iterations of distill.py, {policy:12} {value:6.2f} s", flush=True)
        with busy_core():
            for policy, value in medians(policies, args.repeats, folder).items():
                print(f"the same, one core busy, {policy:15} {value:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
