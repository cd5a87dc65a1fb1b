"""Bundles of networks whose tokens halt: a file a group of layers, and one for batches of one.

Shapes: ``B`` batch, ``T`` tokens of the longest sample, ``N`` tokens of all samples together, ``D``
width of a token, ``A`` width of all heads together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import InvalidArgumentError
from offramp.exporting.halting_single import THRESHOLD, write_halting_single
from offramp.exporting.onnx import PLAIN_FILE, SINGLE_FILE, tensor_specs
from offramp.exporting.parts import Part, write_parts
from offramp.families.agreement import Reference
from offramp.families.halting import masked_pass
from offramp.model.multi_exit import Features
from offramp.policy.confidence import max_probability_confidence
from offramp.routing.halting import HaltingNetwork, advance
from offramp.routing.layers import attend
from offramp.runtime import Bundle
from offramp.runtime.bundle import Padding
from offramp.runtime.files import OnnxFile, TensorSpec, file_sha256
from offramp.runtime.halting_parts import HALTING_OUTPUTS, HaltingParts, HaltingStep

_TRACED_TOKENS = 5
"""Of a text that is traced with: no other size of an axis."""

Meet = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
"""Attention within each sample: of query, key and value, each (N, A), heads, and who is looked at,
shape (N,), everybody if None; to what it makes of each token, shape (N, A)."""


@dataclass(frozen=True)
class HaltingExport:
    """A network whose tokens halt, and when they do.

    Attributes:
        network: The network, in evaluation mode, on the CPU.
        threshold: What the sum of a token's scores must reach for it to halt.
        layers_per_step: Layers that run before tokens are dropped again; the last step may have
            fewer.
    """

    family: ClassVar[str] = "halting"

    network: HaltingNetwork
    threshold: float
    layers_per_step: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.layers_per_step <= self.network.num_layers:
            raise InvalidArgumentError(
                "The 'layers_per_step' parameter must be an int in "
                f"[1, {self.network.num_layers}], the network's layers. "
                f"Got {self.layers_per_step}."
            )

    def write_files(self, inputs: Features, folder: Path, *, plain: bool) -> dict[str, Any]:
        """Write the ONNX files."""
        network, groups = self.network, self._groups()
        inputs = network.trimmed(inputs)
        num_tokens = None if network.ragged is None else inputs[0].shape[1]
        specs = tensor_specs(inputs, num_tokens=num_tokens)
        ones = [f"single_{k}" for k in range(len(groups))]
        parts = _parts_of(network, groups, inputs, specs)
        if plain:
            parts[Path(PLAIN_FILE).stem] = _on_inputs(network.plain(), inputs, specs, ("output",))
        files = write_parts(network, parts, folder)
        costs = network.costs(*inputs)
        halting = HaltingParts(
            inputs=specs,
            embed=files["embed"],
            steps=tuple(
                HaltingStep(file=files[f"step_{k}"], num_layers=len(group))
                for k, group in enumerate(groups)
            ),
            head=files["head"],
            threshold=self.threshold,
            fixed_macs=costs.fixed_macs,
            token_macs=costs.token_macs,
            pair_macs=costs.pair_macs,
        )
        write_halting_single(
            folder,
            halting,
            [files[name] for name in ones],
            folder / SINGLE_FILE,
            has_padding=network.ragged is not None,
        )
        for name in ones:  # joined into the file for single samples
            (folder / files[name].name).unlink()
        plain_file: OnnxFile | None = files.get(Path(PLAIN_FILE).stem)
        return {
            "steps": (),
            "halting": halting,
            "plain_file": None if plain_file is None else plain_file.name,
            "plain_sha256": None if plain_file is None else plain_file.sha256,
            "plain_macs": costs.plain_macs,
            "single_file": SINGLE_FILE,
            "single_sha256": file_sha256(folder / SINGLE_FILE),
            "padding": None if network.ragged is None else Padding(**asdict(network.ragged)),
        }

    def reference(self, inputs: Features) -> Reference:
        """What the bundle must answer: the masked pass, which computes every token."""
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

    def _groups(self) -> list[range]:
        """Numbers of the layers in each step."""
        num_layers = self.network.num_layers
        starts = range(0, num_layers, self.layers_per_step)
        return [range(at, min(at + self.layers_per_step, num_layers)) for at in starts]


def _parts_of(
    network: HaltingNetwork, groups: list[range], inputs: Features, specs: tuple[TensorSpec, ...]
) -> dict[str, Part]:
    """Embedding, groups of layers for many samples and for one, and the head."""
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
    """Where the tokens of samples stand; those of a single sample in their order.

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
    """What all tokens of each sample add to its answer, shape (B, A).

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
