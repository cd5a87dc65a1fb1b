"""The tutorial notebook runs from its first cell to its last on a small part of the data."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"
SMALL = "DATA = None\nEPOCHS = 2\nREPORT_AFTER = (1, 2)\nSUBSET = 3000"


@pytest.fixture(scope="module")
def printed() -> str:
    """Everything that the cells print when the notebook runs with few images and epochs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = SMALL
    # The kernel starts where the tests do, so that a relative OFFRAMP_DATA means the same.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": os.getcwd()}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("OFFRAMP_DATA" not in os.environ, reason="needs OFFRAMP_DATA")
@pytest.mark.filterwarnings("default")  # of Jupyter's own packages
def test_the_notebook_prints_its_tables(printed: str) -> None:
    assert "3,000 images to train on, 3,000 to test, 47 classes" in printed
    assert "['850,944', '1,947,648', '3,044,352']" in printed
    for epoch in (1, 2):
        table = printed.split(f"after epoch {epoch}\n")[1].splitlines()
        assert table[0].split() == ["exit", "accuracy", "share", "leaving"]
        assert [line.split()[0] for line in table[1:4]] == ["0", "1", "2"]
        assert table[4].split()[:4] == ["accuracy", "with", "early", "exit"]
        assert table[5].split()[:2] == ["mean", "MACs"]
    timing = printed.split("milliseconds a batch\n")[1].splitlines()
    assert [line.split()[0] for line in timing[1:5]] == ["1", "32", "256", "1024"]
