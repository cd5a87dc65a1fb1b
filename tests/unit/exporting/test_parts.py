import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from offramp.errors import ArtifactError
from offramp.exporting.parts import Part, trace_parts, write_parts
from offramp.runtime.files import file_sha256


@pytest.fixture
def network():
    return nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 2)}).eval()


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {name: np.asarray(x, dtype=np.float32) for name, x in inputs.items()})


def test_every_part_is_a_file_of_its_own_with_a_batch_size_of_its_own(network, tmp_path):
    """Though they share weights, and have inputs of one name and outputs of another."""
    first, second, example = network["first"], network["second"], (torch.zeros(1, 3),)
    names = {"input_names": ("x",), "output_names": ("y",)}
    parts = {
        "one": Part(call=first, example=example, **names),
        "two": Part(call=lambda x: second(first(x)), example=example, **names),
        "is_large": Part(
            call=lambda x, least: (x.sum(1) >= least, x),
            example=example,
            scalars=("least",),
            input_names=("x",),
            output_names=("large", "same"),
        ),
    }
    files = write_parts(parts, trace_parts(network, parts), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files.values()}
    for file in files.values():
        assert file.sha256 == file_sha256(tmp_path / file.name)
    for size in (1, 2, 7):
        x = torch.randn(size, 3)
        with torch.no_grad():
            expected = [first(x), second(first(x))]
        for name, y in zip(("one", "two"), expected, strict=True):
            np.testing.assert_allclose(run(tmp_path / f"{name}.onnx", x=x)[0], y, atol=1e-6)
        large, same = run(tmp_path / "is_large.onnx", x=x, least=0.5)
        assert large.tolist() == (x.sum(1) >= 0.5).tolist()
        np.testing.assert_array_equal(same, x)
    one = onnxruntime.InferenceSession(tmp_path / "one.onnx")
    assert [value.name for value in one.get_inputs()] == ["x"]
    assert (tmp_path / "one.onnx").stat().st_size < (tmp_path / "two.onnx").stat().st_size


def test_what_torch_cannot_export_is_refused_in_one_line(network):
    part = Part(
        call=lambda x: x if bool(x.sum() > 0) else -x,
        example=(torch.zeros(1, 3),),
        input_names=("x",),
        output_names=("y",),
    )
    with pytest.raises(ArtifactError, match="cannot export this network") as refused:
        trace_parts(network, {"branching": part})
    assert "\n" not in str(refused.value)
