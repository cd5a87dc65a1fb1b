"""Many small ONNX files from one run of the exporter, which takes seconds to start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import save
from onnx.utils import Extractor
from torch import Tensor, nn

from offramp.exporting.onnx import Axes, example_inputs, run_exporter
from offramp.model.multi_exit import Features, as_features
from offramp.runtime.files import OnnxFile, file_sha256

MOST = {"positions": 512}
"""Longest text of a network of tokens; the table of positions of BERT is as long."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A function of a network that becomes a file.

    Attributes:
        call: The function, of tensors and scalars to a tensor or several.
        example: Its tensors, each with the batch axis first, one sample at least.
        free_axes: Names of the free axes of each tensor, for a part whose tensors have several;
            axes of one name are of one size, of those without a name torch finds out, and the
            example is traced as it is, so that no size in it may be 1 or stand for two names. None
            if the batch axis alone is free.
        scalars: Names of the scalars that follow.
        input_names: Names of the tensors in the file.
        output_names: Names of what comes out.
        is_kept: Whether it becomes a file of its own, and not only a piece of another.
        is_apart: Whether it is traced apart: what torch folds into weights, such as batch norms, it
            does not fold into those that parts of one program share.
    """

    call: Callable[..., Any]
    example: Features
    free_axes: tuple[Mapping[int, str | None], ...] | None = None
    scalars: tuple[str, ...] = ()
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    is_kept: bool = True
    is_apart: bool = False

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Names of tensors and scalars."""
        return (*self.input_names, *self.scalars)

    def inputs(self) -> Features:
        """The example inputs that the part is traced with."""
        if self.free_axes is None:
            return example_inputs(self.example, self.scalars)
        # The tracer takes one tensor that is given twice for one input.
        example = tuple(tensor.clone() for tensor in self.example)
        return (*example, *example_inputs((), self.scalars))

    def axes(self, name: str) -> list[Axes]:
        """The free axes of each input, under names of a part of this name alone."""
        free = self.free_axes or ({0: "batch"},) * len(self.example)
        sizes: dict[str | None, Any] = {
            axis: torch.export.Dim(f"{axis}_{name}", min=1, max=MOST.get(axis))
            for axis in {axis for axes in free for axis in axes.values() if axis is not None}
        }
        sizes[None] = torch.export.Dim.AUTO
        by_tensor = [{index: sizes[axis] for index, axis in axes.items()} for axes in free]
        return [*by_tensor, *(None for _ in self.scalars)]


def trace_parts(network: nn.Module, parts: Mapping[str, Part]) -> dict[str, onnx.ModelProto]:
    """Make ONNX models of parts of a network, their batch sizes free; by the names of files.

    They are traced side by side in one program, which takes seconds to start, each with inputs and
    a batch size of its own, and then cut out of it.
    """
    together = {name: part for name, part in parts.items() if not part.is_apart}
    programs = [together, *({name: part} for name, part in parts.items() if part.is_apart)]
    return {name: model for program in programs for name, model in _cut(network, program).items()}


def _cut(network: nn.Module, parts: Mapping[str, Part]) -> dict[str, onnx.ModelProto]:
    """Parts of one program."""
    model = _trace(network, parts)
    extractor = Extractor(model)
    models = {}
    for name, part in parts.items():
        inputs, outputs = (
            [_inside(name, one) for one in names] for names in (part.all_inputs, part.output_names)
        )
        extracted = extractor.extract_model(inputs, outputs)
        models[f"{name}.onnx"] = _without_prefix(extracted, _inside(name, ""))
    return models


def write_parts(
    parts: Mapping[str, Part], models: Mapping[str, onnx.ModelProto], folder: Path
) -> dict[str, OnnxFile]:
    """Write the parts that are kept, each as a file; what they are, by the names of the parts."""
    files = {}
    for name, part in parts.items():
        if part.is_kept:
            path = folder / f"{name}.onnx"
            save(models[path.name], path)
            files[name] = OnnxFile(name=path.name, sha256=file_sha256(path))
    return files


def _trace(network: nn.Module, parts: Mapping[str, Part]) -> onnx.ModelProto:
    """All parts in one program."""
    axes: list[Axes] = []
    inputs: Features = ()
    for name, part in parts.items():
        axes += part.axes(name)
        inputs += part.inputs()
    return run_exporter(
        _SideBySide(network, parts.values()),
        inputs,
        axes,
        input_names=[_inside(n, one) for n, part in parts.items() for one in part.all_inputs],
        output_names=[_inside(n, one) for n, part in parts.items() for one in part.output_names],
    )


class _SideBySide(nn.Module):
    """Parts that know nothing of each other, as one module."""

    def __init__(self, network: nn.Module, parts: Iterable[Part]) -> None:
        super().__init__()
        self.network = network
        self._parts = tuple(parts)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """From the inputs of all parts to their outputs, each in order."""
        outputs: list[Tensor] = []
        for part in self._parts:
            count = len(part.all_inputs)
            outputs += as_features(part.call(*tensors[:count]))
            tensors = tensors[count:]
        return tuple(outputs)


def _inside(part: str, name: str) -> str:
    """Name an input or output of a part in the whole program."""
    return f"{part}/{name}"


def _without_prefix(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """Give inputs and outputs the names that they have in the part."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = value.name.removeprefix(prefix)
    for node in model.graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
        node.output[:] = [name.removeprefix(prefix) for name in node.output]
    return model
