"""Shared by all tests: the tiny random checkpoint, the reference cases, ways to run a command."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")   # the networks are small; commands inherit it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from safetensors.torch import load_file

import convert_weights
import sampler

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny"

torch.manual_seed(0)


def relative_error(a, b):
    """||a - b|| / ||b|| in float64."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).norm() / b.double().norm())


class Recorder:
    """Stands for a function: remembers the arguments of its calls, then calls the function."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, *arguments, **options):
        self.calls.append(arguments)
        return self.function(*arguments, **options)


class Failing:
    """A function that raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *arguments, **options):
        raise self.error


@pytest.fixture(scope="session")
def settings():
    return json.loads((DATA / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden():
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="session")
def pipeline():
    return sampler.load_pipeline(TINY)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


def run(script, *arguments, **options):
    """Runs a command line of the repository -> CompletedProcess with text output."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def run_here(main, *arguments):
    """The same in this process, without the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["command", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            convert_weights.run_command(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            gc.unfreeze()                     # run_command has frozen what the tests have made
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(result, *words):
    """A user's mistake ended as it should: exit code 2 and one sentence that names `words`."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0]), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    return True
