"""The documents cannot rot: links and paths exist, commands are ones the scripts understand, the README's Python runs and its line counts are true.

The README's first two code blocks are run word for word by .ci/run; the notebooks' code by tests/execute_notebooks.py.
"""

import inspect
import json
import re
import shlex

import pytest
from conftest import ROOT

import distill
import sampler

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
BLOCKS = BLOCK.findall(README)


def text_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands_of(text):
    """`python ...` in code blocks, indented blocks and backticks."""
    lines = [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    rest = BLOCK.sub("", text)
    lines += [line for line in rest.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", rest)
    return [part.strip() for line in lines for part in line.split("&&") if re.match(r"\s*(\S+ install.*)?python \S*(\.py|-m )", part)]


DOCUMENTS = {str(path.relative_to(ROOT)): text_of(path) for pattern in ("*.md", "tutorials/**/*.md", "tutorials/*.ipynb")
             for path in sorted(ROOT.glob(pattern))}
COMMANDS = sorted({command for text in DOCUMENTS.values() for command in commands_of(text)})


def test_first_two_blocks():
    assert "pip install -r requirements.txt" in BLOCKS[0][1] and "python sampler.py" in BLOCKS[0][1]
    assert "pip install -r requirements.txt" in BLOCKS[1][1] and "pytest" in BLOCKS[1][1]
    assert "command_of_readme 1" in (ROOT / ".ci/run").read_text() and "command_of_readme 2" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_exist(name):
    text = DOCUMENTS[name]
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        assert "://" in target or ((ROOT / name).parent / target).exists(), target
    assert name != "README.md" or len(targets) > 10


def test_line_counts():
    counts = re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M)
    assert {name for name, _ in counts} == {path.name for path in ROOT.glob("*.py")}
    for name, count in counts:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(count), name
    source, start = inspect.getsourcelines(distill.training_step)
    assert start + len(source) - 1 == int(re.search(r"one iteration in its first (\d+) lines", README)[1])


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20 and any("plot_run" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    words = words[words.index("python") + 1:]
    if words[0] == "-m":
        words[0] = words.pop(1)
        assert words[0] == "pytest" and all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))
        return
    for word in words:
        if "/" in word and not word.startswith(("-", "runs/")):   # runs/: made by the commands
            assert (ROOT / word).exists(), word
    if words[0] == "sampler.py" and len(words) > 1 and "--help" not in words:
        (tmp_path / "FILE").write_text("a prompt")
        monkeypatch.chdir(tmp_path)
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
        assert sampler.parse_arguments(words[1:]).prompt
    elif words[0] == "distill.py":
        distill.parse_arguments(words[1:])
    else:                                                         # some of these need more packages than the tests do
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--") and word != "--help")


def test_python_blocks_run(monkeypatch):
    """One after the other, as a reader would."""
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) >= 2
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["image"].shape == (1, 3, 64, 64) and all(p.grad is not None for p in names["student"].layers.parameters())
    assert (names["shield"] == 0).all() and (names["spear"] != 0).any()
