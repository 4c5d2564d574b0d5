"""The documents cannot rot: links exist, commands are understood, the README's Python runs.

The README's first two code blocks are run word for word by .ci/run.
"""

import json
import re
import shlex

import pytest
from torch.distributed.run import get_args_parser

import distill
import sampler
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
BLOCKS = BLOCK.findall(README)


def text_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def is_command(text):
    return re.match(r"\s*(\S+ install.*)?(python \S*(\.py|-m )|torchrun )", text)


def commands_of(text):
    """`python ...` and `torchrun ...` in code blocks, indented blocks and backticks.

    A line that ends with a backslash goes on in the next one.
    """
    text = re.sub(r"\\\n *", "", text)
    lines = [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    rest = BLOCK.sub("", text)
    lines += [line for line in rest.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", rest)
    parts = [part for line in lines for part in line.split("&&")]
    return [part.strip() for part in parts if is_command(part)]


PATTERNS = ("*.md", "tutorials/**/*.md", "tutorials/*.ipynb")
PATHS = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
DOCUMENTS = {str(path.relative_to(ROOT)): text_of(path) for path in PATHS}
COMMANDS = sorted({command for text in DOCUMENTS.values() for command in commands_of(text)})


def test_first_two_blocks():
    assert "python sampler.py" in BLOCKS[0][1]
    assert "pytest" in BLOCKS[1][1]
    checks = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for i in range(2):
        assert "pip install -r requirements.txt" in BLOCKS[i][1]
        assert f"command_of_readme {i + 1}" in checks


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_exist(name):
    text = DOCUMENTS[name]
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        assert "://" in target or ((ROOT / name).parent / target).exists(), target
    assert name != "README.md" or len(targets) > 10


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_number_is_there(name):
    """Numbers that wait for a run are marked with @@; nothing is published with such a mark."""
    assert "@@" not in DOCUMENTS[name]


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20
    assert any("distill.py" in command for command in COMMANDS)
    assert any(command.startswith("torchrun") for command in COMMANDS)
    assert not any(command.endswith("\\") for command in COMMANDS)


def script_and_options(command):
    """A command -> its script, as a path from the root, and what follows it."""
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        return given.training_script, given.training_script_args
    words = words[words.index("python") + 1:]
    if words[0] == "-m":
        return words[1].replace(".", "/") + ".py", words[2:]
    return words[0], words[1:]


def text_with_options(name):
    """The text of a script, with the names of options that stand elsewhere."""
    source = (ROOT / name).read_text(encoding="utf-8")
    if name == "sampler.py":
        source += " ".join(sampler.make_parser()._option_string_actions)
    if name == "tutorials/cards/sweep.py":     # distill.py's options may follow
        source += (ROOT / "distill.py").read_text(encoding="utf-8")
    return source


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    name, words = script_and_options(command)
    if name in ("pytest.py", "pip.py"):
        return
    script = ROOT / name
    assert script.exists(), script
    for word in words:
        if "tutorials/" in word or "tests/" in word:
            assert (ROOT / word).exists(), word
    if name == "distill.py" and "--help" not in words:
        distill.parse_arguments(words)
        return
    source = text_with_options(name)
    for word in words:
        option = word.split("=")[0]
        if word.startswith("--") and word != "--help":
            assert option in source or f'"{option[2:]}"' in source, option
        elif name == "tutorials/figures.py":
            assert f'"{word}": (' in source, word


def test_python_blocks_run(monkeypatch):
    """One after the other, as a reader would."""
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) >= 2
    monkeypatch.chdir(ROOT)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["image"].shape == (1, 3, 128, 128)
    assert all(p.grad is not None for p in names["student"].layers.parameters())
    for term in ("spear", "shield"):
        assert names[term].abs().mean() > 1e-3
