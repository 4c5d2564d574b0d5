"""The README cannot rot: its links and paths exist, its commands are ones the scripts understand, its Python runs.

The first two code blocks are run word for word by .ci/run.
"""

import re
import shlex

import pytest
from conftest import ROOT, run

import sampler

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [part.strip() for _, block in BLOCKS for line in block.splitlines() if "python " in line for part in line.split("&&") if "python " in part]


def test_first_two_blocks():
    assert "pip install -r requirements.txt" in BLOCKS[0][1] and "python sampler.py" in BLOCKS[0][1]
    assert "pip install -r requirements.txt" in BLOCKS[1][1] and "pytest" in BLOCKS[1][1]
    assert "command_of_readme 1" in (ROOT / ".ci/run").read_text() and "command_of_readme 2" in (ROOT / ".ci/run").read_text()


def test_links_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert len(local) >= 5
    for target in local:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    words = words[words.index("python") + 1:]
    if words[0] == "-m":
        return
    for word in words[1:]:
        if "/" in word and not word.startswith(("-", "runs/")):   # runs/: made by the commands
            assert (ROOT / word).exists(), word
    if words[0] == "sampler.py" and "--help" not in words:
        (tmp_path / "FILE").write_text("a prompt")
        monkeypatch.chdir(tmp_path)
        assert sampler.parse_arguments(words[1:]).prompt
    else:
        assert {word for word in words[1:] if word.startswith("--")} <= set(run(words[0], "--help").stdout.replace(",", " ").replace("]", " ").split())


def test_python_blocks_run(monkeypatch):
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    monkeypatch.chdir(ROOT)
    for block in blocks:
        exec(block, {})
