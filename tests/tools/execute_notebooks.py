"""Runs the pages of tutorials/ from a clean kernel.

    python tests/tools/execute_notebooks.py                 run all, with the exercises' answers
    python tests/tools/execute_notebooks.py --write 03 04   run these and store their outputs
    python tests/tools/execute_notebooks.py --links         correct the lines of links to functions

Needs the packages of tutorials/requirements.txt. tests/test_tutorials.py uses the functions below.
"""

import argparse
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TUTORIALS = ROOT / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("[0-9]*.ipynb"))
PAGES = [*NOTEBOOKS, *sorted(TUTORIALS.glob("*.md"))]
LINKED = [*PAGES, ROOT / "README.md"]              # they link to functions by line

# A link to a function: [distill.renoise](../distill.py#L75)
FUNCTION_LINK = re.compile(r"\[`?(\w+)\.([\w.]+)`?\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)\)")
HEADLINE = re.compile(r"^(.+?) \.{3,} (-?[\d.]+)  \(within ([\d.]+)\)$", re.M)
ANSWER = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def texts_of_outputs(cell):
    """What a code cell printed or showed as text."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        yield "".join(output.get("text", "") or data.get("text/markdown", ""))


def headlines(cells):
    """{name: (value, within)} of the lines that figures.result printed."""
    found = {}
    for cell in cells:
        for text in texts_of_outputs(cell):
            for name, value, within in HEADLINE.findall(text):
                found[name] = float(value), float(within)
    return found


def answers(cells):
    """The code in the folded answers of a notebook, in order."""
    found = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for folded in re.findall(r"<details>.*?</details>", "".join(cell["source"]), re.S):
                found += ANSWER.findall(folded)
    return found


def execute(path, with_answers=True):
    """Runs a notebook in a clean kernel with one thread -> it, with outputs, without answers."""
    import nbformat
    from nbclient import NotebookClient
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    count = len(notebook.cells)
    if with_answers:
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in answers(notebook.cells)]
    NotebookClient(notebook, timeout=900, kernel_name="python3",
                   resources={"metadata": {"path": str(TUTORIALS)}}).execute()
    notebook.cells = notebook.cells[:count]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = join_streams(cell.outputs)
    return notebook


def join_streams(outputs):
    """Text printed piece by piece as one output, as a reader sees it."""
    joined = []
    for output in outputs:
        same = joined and output.output_type == joined[-1].output_type == "stream"
        if same and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def function_line(module, name):
    """The line of the definition that a link should point to."""
    sys.path[:0] = [str(ROOT), str(TUTORIALS), str(TUTORIALS / "cards")]
    sys.path.insert(0, str(ROOT / "tests" / "tools"))
    definition_line = importlib.import_module("figures").definition_line
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return definition_line(target)


def correct_links(text):
    """Links to functions with today's line numbers."""
    def corrected(match):
        module, name, path, _ = match.groups()
        label = match[0][:match[0].index("](")]
        return f"{label}]({path}#L{function_line(module, name)})"
    return FUNCTION_LINK.sub(corrected, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("pages", nargs="*", metavar="START", help="how the names of pages start")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--links", action="store_true", help="only correct links to functions")
    args = parser.parse_args()
    chosen = [path for path in NOTEBOOKS if path.name.startswith(tuple(args.pages or [""]))]
    unknown = [start for start in args.pages if not any(p.name.startswith(start) for p in chosen)]
    if unknown:
        parser.error(f"no page starts with {unknown[0]}")
    if args.links and (args.pages or args.write):
        parser.error("--links corrects the links of all pages and runs none: give it alone")
    if args.links:
        for path in LINKED:
            text = path.read_text(encoding="utf-8")
            path.write_text(correct_links(text), encoding="utf-8")
        return
    import nbformat
    for path in chosen:
        start = time.time()
        notebook = execute(path, with_answers=not args.write)
        if args.write:
            nbformat.write(notebook, path)
        print(f"{path.stem:28}{time.time() - start:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
