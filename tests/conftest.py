"""Shared by all tests: the repository on the path, the tiny random checkpoint, the reference cases (tests/make_golden.py)."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")   # the networks here are small; commands run by the tests inherit it

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny"
sys.path.insert(0, str(ROOT))

import convert_weights  # noqa: E402  (they need the path above)
import sampler  # noqa: E402

torch.manual_seed(0)


def relative_error(a, b):
    """||a - b|| / ||b|| in float64."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="session")
def settings():
    return json.loads((DATA / "cases.json").read_text())


@pytest.fixture(scope="session")
def reference():
    return load_file(DATA / "reference.safetensors")


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
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


def run_here(main, *arguments):
    """The same in this process, without the seconds a new one takes to import torch: `if __name__ == "__main__"` by hand."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["command", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            convert_weights.run_command(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(result, *words):
    """The command failed as a user's mistake should: exit code 2, one sentence, no traceback, naming `words`."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    return True
