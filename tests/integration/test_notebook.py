"""The tutorial notebook is committed as it ran, and runs anew on a small part of the data."""

import io
import json
import os
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"
PICTURES = 4
"""Letters, exits, easy and hard, accuracy against MACs."""
SAMPLES = 120
"""Of train and of test: at batch 1 each costs the clock a few milliseconds."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of emnist47; where there is none, one with made-up images in its format."""
    if "OFFRAMP_DATA" in os.environ:
        return (Path(os.environ["OFFRAMP_DATA"]) / "emnist47").resolve()
    folder = tmp_path_factory.mktemp("emnist47")
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (47, 28, 28))
    names = [chr(ord("0") + label) for label in range(47)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in ("train", "test"):
        labels = generator.integers(0, 47, SAMPLES)
        noisy = np.clip(patterns[labels] + generator.normal(0, 100, (SAMPLES, 28, 28)), 0, 255)
        images = [{"bytes": as_png(pixels.astype(np.uint8)), "path": None} for pixels in noisy]
        table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}.parquet")
    return folder


def as_png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(data):
    """The notebook after a run on few images, for an epoch."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = f"DATA = {str(data)!r}\nEPOCHS = 1\nSAMPLES = {SAMPLES}"
    NotebookClient(notebook, timeout=300).execute()
    return notebook


@pytest.fixture(params=["committed", "executed"])
def notebook(request):
    return request.getfixturevalue(request.param)


pytestmark = pytest.mark.filterwarnings("default")  # of Jupyter's own packages


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(notebook) -> str:
    outputs = outputs_of(notebook)
    values = [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(values + [output.get("text", "") for output in outputs])


def test_every_cell_ran_in_order_without_an_error(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert [output for output in outputs_of(notebook) if output.output_type == "error"] == []


def test_pictures_and_costs_are_shown(notebook):
    pictures = [o for o in outputs_of(notebook) if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES
    # The tutorial's own MACs, heads counted, and those of the plain network.
    assert "((850944, 1947648, 3044352), 2948096)" in text_of(notebook)


def test_the_small_run_had_few_images(executed):
    assert f"{SAMPLES} images to train on, {SAMPLES} to test, 47 classes" in text_of(executed)


def test_the_committed_run_had_all_images_and_no_noise(committed):
    assert "106,810 images to train on, 18,800 to test, 47 classes" in text_of(committed)
    assert "(101499, 5311)" in text_of(committed)  # to train on, to calibrate on
    assert [output.text for output in outputs_of(committed) if output.get("name") == "stderr"] == []
    assert "\x1b" not in text_of(committed)
