"""Writing ONNX files: torch's table of functions is read once, and torch is left as it was."""

from unittest.mock import Mock

import torch
from torch import nn
from torch._export import utils as export_utils
from torch.onnx._internal.exporter import _registration

from offramp.exporting import onnx as onnx_module
from offramp.exporting.onnx import write_onnx


class Double(nn.Module):
    def forward(self, *inputs):
        return 2 * inputs[0]


def test_torch_reads_its_functions_once_for_all_files(tmp_path, monkeypatch):
    read = _registration.onnxscript_apis.get_torchlib_ops
    counted = Mock(side_effect=read)
    monkeypatch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", counted)
    onnx_module._torchlib.cache_clear()
    before = vars(_registration.ONNXRegistry)["from_torchlib"]
    for name in ("a.onnx", "b.onnx"):
        path = tmp_path / name
        write_onnx(Double(), (torch.zeros(1, 3),), path, input_names=["x"], output_names=["y"])
        assert path.exists()
    assert counted.call_count == 1
    assert vars(_registration.ONNXRegistry)["from_torchlib"] is before


def test_a_torch_without_that_table_is_left_alone(monkeypatch):
    monkeypatch.delattr(_registration.ONNXRegistry, "from_torchlib")
    with onnx_module._torchlib_read_once():
        assert not hasattr(_registration.ONNXRegistry, "from_torchlib")


def test_torch_lists_its_operators_once_a_file(tmp_path, monkeypatch):
    counted = Mock(side_effect=export_utils._materialize_cpp_cia_ops)
    monkeypatch.setattr(export_utils, "_materialize_cpp_cia_ops", counted)
    path = tmp_path / "a.onnx"
    write_onnx(Double(), (torch.zeros(1, 3),), path, input_names=["x"], output_names=["y"])
    assert counted.call_count == 1
    assert export_utils._materialize_cpp_cia_ops is counted


def test_a_torch_without_that_list_is_left_alone(monkeypatch):
    monkeypatch.delattr(export_utils, "_materialize_cpp_cia_ops")
    with onnx_module._operators_listed_once():
        assert not hasattr(export_utils, "_materialize_cpp_cia_ops")
