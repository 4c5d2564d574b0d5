"""Every notebook of tutorials/, executed from a clean kernel, must not raise: python -m pytest tests/execute_notebooks.py

Apart from the other tests, for the time it takes (some ten minutes on 2 CPU cores) and for tutorials/requirements.txt, which it needs.
"""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "tutorials").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
