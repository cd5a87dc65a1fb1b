"""Bundles of networks whose tokens halt: a file a group of layers, and one for batches of one.

Shapes: ``B`` batch, ``T`` tokens of the longest sample, ``N`` tokens of all samples together, ``D``
width of a token, ``A`` width of all heads together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import InvalidArgumentError
from offramp.exporting.graph import Graph
from offramp.exporting.onnx import PLAIN, THRESHOLD, tensor_specs
from offramp.exporting.parts import Part
from offramp.families.halting import masked_pass
from offramp.measure.agreement import Reference
from offramp.model.multi_exit import Features
from offramp.policy.confidence import max_probability_confidence
from offramp.routing.halting import HaltingNetwork, advance
from offramp.routing.layers import attend
from offramp.runtime import Bundle
from offramp.runtime.bundle import Padding
from offramp.runtime.files import OnnxFile, TensorSpec
from offramp.runtime.halting_parts import HALTING_OUTPUTS, HaltingParts, HaltingStep

_TRACED_TOKENS = 5
"""Of a text that is traced with: no other size of an axis."""

Meet = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
"""Attention within each sample: of query, key and value, each (N, A), heads, and who is looked at,
shape (N,), everybody if None; to what it makes of each token, shape (N, A)."""


def join_halting(graph: Graph, bundle: Bundle) -> dict[str, str]:
    """Behind every step the tokens that go on are taken out.

    What follows lies inside an ``If``, which an answered sample does not enter.
    """
    parts = bundle.halting
    assert parts is not None
    graph.number(THRESHOLD, parts.threshold)
    embed = parts.embed.name
    x_BTD, is_valid_BT = graph.add(embed, graph.take_inputs(embed))
    batch_axis, num_steps = graph.constant([0]), len(parts.steps)
    tokens = graph.node("Squeeze", [x_BTD, batch_axis])
    if bundle.padding is not None:
        is_valid = graph.node("Squeeze", [is_valid_BT, batch_axis])
        tokens = graph.node("Compress", [tokens, is_valid], axis=0)
    length = graph.node("Shape", [tokens], start=0, end=1)
    zero = numpy_helper.from_array(np.zeros(1, np.float32))
    total = graph.node("ConstantOfShape", [length], value=zero)

    def run(
        inside: Graph, given: Sequence[str], answer: str | None, counts: Sequence[str]
    ) -> Sequence[str]:
        """A step and all that follow: the answer, and the tokens in each step."""
        num_left = num_steps - len(counts)
        *given, stays, part = inside.add(_single_file(len(counts) - 1), [*given, THRESHOLD])
        so_far = part if answer is None else inside.node("Add", [answer, part])
        if num_left == 0:
            return so_far, inside.node("Concat", counts, axis=0)

        def go_on(branch: Graph) -> Sequence[str]:
            kept = [branch.node("Compress", [one, stays], axis=0) for one in given]
            length = branch.node("Shape", kept[:1], start=0, end=1)
            return run(branch, kept, so_far, [*counts, length])

        def stop(branch: Graph) -> Sequence[str]:
            none = branch.constant([0] * num_left)
            return so_far, branch.node("Concat", [*counts, none], axis=0)

        goes_on = inside.node("Gather", [stays, inside.constant(0)])
        return inside.choose(goes_on, go_on, stop)

    answer, counts = run(graph, (tokens, total), None, [length])
    of_steps = graph.node("Unsqueeze", [counts, batch_axis])
    graph.declare(of_steps, TensorProto.INT64, [1, num_steps])
    return dict(
        zip(HALTING_OUTPUTS, (*graph.add(parts.head.name, [answer]), of_steps), strict=True)
    )


def _single_file(step: int) -> str:
    """The part that only the file for single samples holds."""
    return f"single_{step}.onnx"


@dataclass(frozen=True)
class HaltingExport:
    """A network whose tokens halt, and when they do.

    Attributes:
        network: The network, in evaluation mode, on the CPU.
        inputs: Samples to export with.
        threshold: What the sum of a token's scores must reach for it to halt.
        layers_per_step: Layers that run before tokens are dropped again; the last step may have
            fewer.
    """

    network: HaltingNetwork
    inputs: Features
    threshold: float
    layers_per_step: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.layers_per_step <= self.network.num_layers:
            raise InvalidArgumentError(
                "The 'layers_per_step' parameter must be an int in "
                f"[1, {self.network.num_layers}], the network's layers. "
                f"Got {self.layers_per_step}."
            )

    def parts(self) -> dict[str, Part]:
        """Embedding, groups of layers for many samples and for one, and the head."""
        network, inputs, specs = self.network, self._trimmed(), self._specs()
        return {
            **_parts_of(network, self._groups(), inputs, specs),
            PLAIN: _on_inputs(network.plain(), inputs, specs, ("output",)),
        }

    def describe(self, files: Mapping[str, OnnxFile]) -> dict[str, Any]:
        """Describe the network for ``bundle.json``."""
        costs, ragged = self.network.costs(*self._trimmed()), self.network.ragged
        halting = HaltingParts(
            inputs=self._specs(),
            embed=files["embed"],
            steps=tuple(
                HaltingStep(file=files[f"step_{k}"], num_layers=len(group))
                for k, group in enumerate(self._groups())
            ),
            head=files["head"],
            threshold=self.threshold,
            fixed_macs=costs.fixed_macs,
            token_macs=costs.token_macs,
            pair_macs=costs.pair_macs,
        )
        return {
            "steps": (),
            "halting": halting,
            "plain_macs": costs.plain_macs,
            "padding": None if ragged is None else Padding(**asdict(ragged)),
        }

    join = staticmethod(join_halting)

    def reference(self, inputs: Features) -> Reference:
        """Compute the expected answers: the masked pass, which computes every token."""
        first_layers = [group[0] for group in self._groups()]
        return masked_pass(self.network, self.threshold, inputs, first_layers)

    def extremes(self, bundle: Bundle) -> list[tuple[Bundle, HaltingExport]]:
        """The bundle at a threshold that runs every part of it, where tokens stay longest."""
        assert bundle.halting is not None
        return [
            (
                replace(bundle, halting=replace(bundle.halting, threshold=1.0)),
                replace(self, threshold=1.0),
            )
        ]

    def _trimmed(self) -> Features:
        return self.network.trimmed(self.inputs)

    def _specs(self) -> tuple[TensorSpec, ...]:
        inputs = self._trimmed()
        num_tokens = None if self.network.ragged is None else inputs[0].shape[1]
        return tensor_specs(inputs, num_tokens=num_tokens)

    def _groups(self) -> list[range]:
        """Numbers of the layers in each step."""
        num_layers = self.network.num_layers
        starts = range(0, num_layers, self.layers_per_step)
        return [range(at, min(at + self.layers_per_step, num_layers)) for at in starts]


def _parts_of(
    network: HaltingNetwork, groups: list[range], inputs: Features, specs: tuple[TensorSpec, ...]
) -> dict[str, Part]:
    embed = _on_inputs(network.embed, inputs, specs, ("tokens", "is_valid"))
    x_BTD, _ = network.embed(*(tensor[:1] for tensor in inputs))
    parts = {"embed": embed}
    x_ND, total_N = x_BTD.new_zeros(7, x_BTD.shape[2]), x_BTD.new_zeros(7)
    rows_BT, places_N = torch.zeros(3, 5, dtype=torch.int64), torch.arange(7)
    outputs = ("next_tokens", "next_total", "stays", "answer")
    of_tokens = ({0: "tokens"}, {0: "tokens"})
    in_rows = {0: "samples", 1: "longest"}
    for k, group in enumerate(groups):
        parts[f"step_{k}"] = Part(
            call=partial(_run_packed, network, group),
            example=(x_ND, total_N, rows_BT, rows_BT == 0, places_N),
            free_axes=(*of_tokens, in_rows, in_rows, {0: "tokens"}),
            scalars=(THRESHOLD,),
            input_names=("tokens", "total", "rows", "is_token", "places"),
            output_names=outputs,
        )
        parts[f"single_{k}"] = Part(
            call=partial(_run_one, network, group),
            example=(x_ND, total_N),
            free_axes=of_tokens,
            scalars=(THRESHOLD,),
            input_names=("tokens", "total"),
            output_names=outputs,
            is_kept=False,
        )
    parts["head"] = Part(
        call=partial(_answer, network),
        example=(network.read(x_BTD[:, 0]),),
        input_names=("answer",),
        output_names=HALTING_OUTPUTS[:2],
    )
    return parts


def _on_inputs(
    call: Callable[..., Any],
    inputs: Features,
    specs: tuple[TensorSpec, ...],
    output_names: tuple[str, ...],
) -> Part:
    """A part that is given the network's inputs."""
    names = tuple(spec.name for spec in specs)
    first = tuple(tensor[:1] for tensor in inputs)
    if not specs[0].has_tokens:
        return Part(call=call, example=first, input_names=names, output_names=output_names)
    return Part(
        call=call,
        example=tuple(tensor[:, :1].repeat(3, _TRACED_TOKENS) for tensor in first),
        free_axes=({0: "samples", 1: "tokens"},) * len(inputs),
        input_names=names,
        output_names=output_names,
    )


def _run_packed(
    network: HaltingNetwork,
    group: range,
    x_ND: Tensor,
    total_N: Tensor,
    rows_BT: Tensor,
    is_token_BT: Tensor,
    places_N: Tensor,
    threshold: Tensor,
) -> Features:
    """Layers on the tokens of several samples, which are padded for attention alone."""

    def meet(
        query_NA: Tensor, key_NA: Tensor, value_NA: Tensor, num_heads: int, is_key_N: Tensor | None
    ) -> Tensor:
        # Gathers rows of a table, whatever the table is.
        query, key, value = (F.embedding(rows_BT, t) for t in (query_NA, key_NA, value_NA))
        is_key_BT = is_token_BT
        if is_key_N is not None:
            is_key_BT = is_token_BT & _with_class(is_key_N[rows_BT])
        context_BTA = attend(query, key, value, num_heads, is_key_BT=is_key_BT)
        return context_BTA.flatten(0, 1).index_select(0, places_N)

    laid_out = _LaidOut(rows_BT, is_token_BT)
    return _run_group(network, group, meet, x_ND, total_N, laid_out, threshold)


def _run_one(
    network: HaltingNetwork, group: range, x_ND: Tensor, total_N: Tensor, threshold: Tensor
) -> Features:
    """Layers on the tokens of a single sample."""

    def meet(
        query_NA: Tensor, key_NA: Tensor, value_NA: Tensor, num_heads: int, is_key_N: Tensor | None
    ) -> Tensor:
        is_key = None if is_key_N is None else _with_class(is_key_N)
        return attend(query_NA, key_NA, value_NA, num_heads, is_key_BT=is_key)

    return _run_group(network, group, meet, x_ND, total_N, _LaidOut(), threshold)


class _LaidOut(NamedTuple):
    """The positions of samples' tokens; those of a single sample in their order.

    Attributes:
        rows_BT: Their numbers.
        is_token_BT: Where there is one.
    """

    rows_BT: Tensor | None = None
    is_token_BT: Tensor | None = None

    @property
    def class_B(self) -> Tensor:
        """Numbers of the class tokens."""
        if self.rows_BT is None:
            return torch.zeros(1, dtype=torch.int64)
        return self.rows_BT[:, 0]

    def by_sample(self, x_ND: Tensor) -> Tensor:
        """Tokens in the rows of their samples, shape (B, T, D)."""
        return x_ND[None] if self.rows_BT is None else F.embedding(self.rows_BT, x_ND)


def _run_group(
    network: HaltingNetwork,
    group: range,
    meet: Meet,
    x_ND: Tensor,
    total_N: Tensor,
    laid_out: _LaidOut,
    threshold: Tensor,
) -> Features:
    """Layers in a row; tokens that halt on the way are looked at no more, and computed."""
    halts_N: Tensor | None = None
    class_B = laid_out.class_B
    parts_BD = []
    for index in group:
        layer = network.parts().layers[index]
        is_key_N = None if halts_N is None else ~halts_N
        context_NA = meet(*layer.project(x_ND), layer.num_heads, is_key_N)
        x_ND = layer.complete(x_ND, context_NA)
        # The threshold comes in as float32; see the gates of ``skip.py``.
        step = advance(total_N, network.score(x_ND).float(), threshold)
        is_last = index == network.num_layers - 1
        weight_N = 1 - total_N if is_last else step.weight
        if network.readout is None:
            weight_B = weight_N.index_select(0, class_B)
            if halts_N is not None:  # whose class token has halted, is answered
                weight_B = weight_B * ~halts_N.index_select(0, class_B)
            parts_BD.append(weight_B[:, None] * x_ND.index_select(0, class_B))
        else:
            numbers = (weight_N, 1 - total_N, step.halts, *(() if halts_N is None else (halts_N,)))
            table_N3 = torch.stack([number.to(weight_N.dtype) for number in numbers], 1)
            parts_BD.append(_read_all(network, laid_out, x_ND, table_N3))
        total_N, halts_N = step.total, step.halts
    assert halts_N is not None  # a group has at least one layer
    (*_, answer_BD) = accumulate(parts_BD)
    return x_ND, total_N, ~halts_N, answer_BD


def _read_all(
    network: HaltingNetwork, laid_out: _LaidOut, x_ND: Tensor, numbers_NX: Tensor
) -> Tensor:
    """Sum what all tokens of each sample add to its answer, shape (B, A).

    Of each token the table holds its weight, what is left of it, whether it halts here and, behind
    the first layer of a group, whether it has halted before.
    """
    weight_BT, rest_BT, halts_BT, *before = laid_out.by_sample(numbers_NX).unbind(-1)
    weight_BT = torch.where(halts_BT[:, :1] > 0, rest_BT, weight_BT)
    for halted_BT in before:  # nor does who belongs to a sample that is answered
        weight_BT = weight_BT * (1 - halted_BT) * (1 - halted_BT[:, :1])
    if laid_out.is_token_BT is not None:
        weight_BT = weight_BT * laid_out.is_token_BT
    share_BTA = laid_out.by_sample(network.read(x_ND))
    return (weight_BT[..., None] * share_BTA).sum(1)


def _with_class(is_key: Tensor) -> Tensor:
    """Somebody is always looked at, even in a sample that is answered."""
    return is_key | (torch.arange(is_key.shape[-1]) == 0)


def _answer(network: HaltingNetwork, answer_BD: Tensor) -> Features:
    logits_BC = network.head(answer_BD)
    return logits_BC, max_probability_confidence(logits_BC)
