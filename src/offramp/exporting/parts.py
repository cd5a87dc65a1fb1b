"""Many small ONNX files from one run of the exporter, which takes seconds to start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.exporting.onnx import Axes, example_inputs, run_exporter
from offramp.model.multi_exit import Features, as_features
from offramp.runtime.files import OnnxFile, file_sha256

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Part:
    """A function of a network that becomes a file.

    Attributes:
        call: The function, of tensors and scalars to a tensor or several.
        example: Its tensors, each with the batch axis first, one sample at least.
        free_axes: Names of the free axes of each tensor, for a part whose tensors have several;
            axes of one name are of one size, and the example is traced as it is, so that no size
            in it may be 1 or stand for two names. None if the batch axis alone is free.
        scalars: Names of the scalars that follow.
        input_names: Names of the tensors in the file.
        output_names: Names of what comes out.
    """

    call: Callable[..., Any]
    example: Features
    free_axes: tuple[Mapping[int, str], ...] | None = None
    scalars: tuple[str, ...] = ()
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Names of tensors and scalars."""
        return (*self.input_names, *self.scalars)

    def inputs(self) -> Features:
        """What the part is traced with."""
        if self.free_axes is None:
            return example_inputs(self.example, self.scalars)
        # The tracer takes one tensor that is given twice for one input.
        example = tuple(tensor.clone() for tensor in self.example)
        return (*example, *example_inputs((), self.scalars))

    def axes(self, name: str) -> list[Axes]:
        """The free axes of each input, under names of a part of this name alone."""
        free = self.free_axes or ({0: "batch"},) * len(self.example)
        names = {axis for axes in free for axis in axes.values()}
        sizes = {axis: torch.export.Dim(f"{axis}_{name}", min=1) for axis in names}
        by_tensor = [{index: sizes[axis] for index, axis in axes.items()} for axes in free]
        return [*by_tensor, *(None for _ in self.scalars)]


def write_parts(network: nn.Module, parts: Mapping[str, Part], folder: Path) -> dict[str, OnnxFile]:
    """Write parts of a network as ONNX files, their batch sizes free.

    All are traced side by side in one program, each with inputs and a batch size of its own, and
    then cut out of it.
    """
    model = _trace(network, parts)
    from onnx import save
    from onnx.utils import Extractor

    extractor = Extractor(model)
    files = {}
    for name, part in parts.items():
        inputs, outputs = (
            [_inside(name, one) for one in names] for names in (part.all_inputs, part.output_names)
        )
        path = folder / f"{name}.onnx"
        save(_without_prefix(extractor.extract_model(inputs, outputs), _inside(name, "")), path)
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
    """What an input or output of a part is called in the whole program."""
    return f"{part}/{name}"


def _without_prefix(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """Give inputs and outputs the names that they have in the part."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = value.name.removeprefix(prefix)
    for node in model.graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
        node.output[:] = [name.removeprefix(prefix) for name in node.output]
    return model
