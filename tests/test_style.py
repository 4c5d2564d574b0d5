"""Rules of style that ruff does not check, on the syntax tree of every script.

They keep the code readable for people: one statement a line, no riddles, the method before options.
"""

import ast
import inspect
import re

import pytest

import distill
import sampler
from conftest import ROOT

CORE = ["model.py", "convert_weights.py", "sampler.py", "distill.py"]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for pattern in
                 ("*.py", "tests/**/*.py", "tutorials/*.py", "tutorials/cards/*.py")
                 for path in ROOT.glob(pattern))


def nodes(name, kind):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_expression_as_statement(name):
    for node in nodes(name, ast.Expr):
        assert not isinstance(node.value, (ast.Tuple, ast.IfExp, ast.BoolOp)), node.lineno


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_nested_ternary(name):
    for node in nodes(name, ast.IfExp):
        parts = [node.test, node.body, node.orelse]
        assert not any(isinstance(part, ast.IfExp) for part in parts), node.lineno


@pytest.mark.parametrize("name", SCRIPTS)
def test_and_beside_or_has_brackets(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    for node in nodes(name, ast.BoolOp):
        for value in node.values:
            if isinstance(value, ast.BoolOp) and value.lineno == value.end_lineno:
                before = lines[value.lineno - 1].encode()[:value.col_offset].decode().rstrip()
                assert before.endswith("("), value.lineno


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_lambda_with_side_effects(name):
    for node in nodes(name, ast.Lambda):
        assert not isinstance(node.body, ast.BoolOp), node.lineno
        assert "throw" not in ast.dump(node.body), node.lineno


def test_model_holds_networks_only():
    imported = set()
    for node in nodes("model.py", (ast.Import, ast.ImportFrom)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        imported |= {name.split(".")[0] for name in names}
    assert imported == {"torch", "dataclasses", "math", "typing"}
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    for word in ("is_cpu", "torch.ops", "float8", "tile", "hook", "cuda"):
        assert word not in source, word


@pytest.mark.parametrize("function, last_line", [
    (sampler.sample, 170), (sampler.generate, 190), (distill.training_step, 190)])
def test_the_method_comes_first(function, last_line):
    source, start = inspect.getsourcelines(function)
    assert start + len(source) - 1 <= last_line


def test_core_files_can_be_read_in_an_afternoon():
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in CORE) <= 2800


@pytest.mark.parametrize("name", CORE)
def test_sentences_of_docstrings_are_short(name):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in nodes(name, kinds):
        paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
        for paragraph in paragraphs:
            if "    " in paragraph:              # a drawing, a formula, or a table
                continue
            for sentence in re.split(r"[.:;?!](?:\s|$)", paragraph):
                assert len(sentence.split()) <= 32, (node.lineno if hasattr(node, "lineno") else 1,
                                                     sentence)
