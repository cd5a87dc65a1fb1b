"""From a network and its policy to a bundle, checked against torch before it is handed out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnxruntime
import torch
from torch import Tensor, nn

import offramp
from offramp.artifacts import atomic_folder
from offramp.decoding import decode
from offramp.errors import ArtifactError, ExportMismatchError, InvalidArgumentError
from offramp.exporting.exits import ExitsExport
from offramp.exporting.graph import Graph, write_single
from offramp.exporting.halting import HaltingExport
from offramp.exporting.onnx import PLAIN
from offramp.exporting.parts import Part, trace_parts, write_parts
from offramp.exporting.skip import SkipExport
from offramp.families import family_of
from offramp.families.agreement import answer_in_batches
from offramp.measure.agreement import SINGLE_SAMPLES, Agreement, Reference, compare
from offramp.model.inputs import Given, as_inputs
from offramp.model.multi_exit import Features
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.choice import Choice
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.policy.rules import RULES
from offramp.runtime import Bundle, Session
from offramp.runtime.bundle import BUNDLE_FILE, check_preprocessing, write_bundle
from offramp.runtime.chosen_on import Choosing
from offramp.runtime.files import OnnxFile
from offramp.runtime.preprocessing import AnyPreprocessing, write_preprocessing
from offramp.zoo import Network


class Exporter(Protocol):
    """A network of a family, samples to export with, and its policy, as a bundle."""

    def parts(self) -> dict[str, Part]:
        """Parts that become files, and the plain network."""
        ...

    def describe(self, files: Mapping[str, OnnxFile]) -> dict[str, Any]:
        """Describe the network for ``bundle.json``, given the file of each part."""
        ...

    def join(self, graph: Graph, bundle: Bundle) -> dict[str, str]:
        """Put the parts together for single samples; the outputs by their names in the file."""
        ...

    def reference(self, inputs: Features) -> Reference:
        """Compute the expected answers: everything is computed, and chosen afterwards."""
        ...

    def extremes(self, bundle: Bundle) -> Sequence[tuple[Bundle, Exporter]]:
        """The bundle at thresholds that run every part of it."""
        ...


EXPORTERS: dict[str, Callable[..., Exporter]] = {
    "exits": ExitsExport,
    "skip": lambda network, inputs, policy: SkipExport(network, inputs, policy.threshold),
    "halting": lambda network, inputs, policy, **steps: HaltingExport(
        network, inputs, policy.threshold, **steps
    ),
}
"""From a family's name to what makes its exporter of a network, samples and a policy."""

_WHOLE = {f"torch.{name}" for name in ("bool", "uint8", "int8", "int16", "int32", "int64")}
"""Types of numbers that are counted with, and never rounded."""
_USUAL = "torch.float32"
_PRECISIONS: tuple[set[str], ...] = (set(), {_USUAL}, {"torch.float64"})
"""Of what precisions weights and samples may be together."""


@torch.no_grad()
def export(
    network: Network,
    policy: Policy | RoutingPolicy | Choice | None,
    folder: Path | str,
    samples: Given,
    *,
    class_names: tuple[str, ...] = (),
    recipe: Mapping[str, Any] | None = None,
    preprocessing: AnyPreprocessing | None = None,
    calibration: Mapping[str, Any] | None = None,
    plain: bool = True,
    layers_per_step: int = 1,
) -> Bundle:
    """Write a network and its policy as a bundle that runs without torch.

    Of a network with exits, every step becomes one ONNX file with a free batch size; exits that are
    off get none, and the stages around them are merged. Of a network that skips blocks, every gate
    and every block becomes one; of one whose tokens halt, every layer, or every few. One more file
    holds everything, for batches of one. Before anything is left behind, the bundle answers the
    samples and is compared with torch.

    Args:
        network: The network, on the CPU.
        policy: Who leaves where, which blocks run, or when a token halts; or a calibration that
            chose it. None: gates and tokens as they were trained; of exits, all on, and left by
            samples that are certain, until ``offramp calibrate`` chooses thresholds.
        folder: Folder to make; a bundle that is there already is replaced.
        samples: Real inputs, shape (N, ...), to compare on; 100 at least say something. A tuple
            or a dict where the network takes several inputs.
        class_names: Name of each class.
        recipe: How the network was trained, to be kept in the bundle.
        preprocessing: How pictures or texts become inputs, to be kept in the bundle: with it, the
            command line takes them as they are.
        calibration: How the policy was chosen, as ``Run.calibration`` has it.
        plain: Whether to add the plain network, so that a device can time its own baseline.
        layers_per_step: Where tokens halt, layers that run before they are dropped; 1 for others.
    Returns:
        What was written.
    Raises:
        ArtifactError: If the folder holds something else or cannot be written, or torch cannot
            export the network.
        ExportMismatchError: If the bundle answers otherwise than the network.
        InvalidArgumentError: If the policy is for another network or of an unknown class, there
            are no such steps, or weights and samples are not all in float32 or all in float64.
        MissingExtraError: If the packages that write ONNX are not installed.
    """
    inputs = as_inputs(samples, network)
    _check_precision(network)
    chosen = _uncalibrated(network) if policy is None else policy
    chosen = chosen.as_policy() if isinstance(chosen, Choice) else chosen
    exporter = _exporter_of(network.eval(), inputs, chosen, layers_per_step)
    described = policy_to_dict(chosen)
    choosing = None if calibration is None else _choosing(calibration)
    with new_bundle_folder(Path(folder)) as making:
        pictures, texts = write_preprocessing(making, preprocessing)
        parts = exporter.parts()
        if not plain:
            del parts[PLAIN]
        models = trace_parts(network, parts)
        files = write_parts(parts, models, making)
        bundle = Bundle(
            folder=making,
            family=family_of(network).name,
            num_exits=network.num_exits,
            class_names=class_names,
            policy=described,
            recipe=recipe,
            quantized=None,
            weights_sha256=_weights_sha256(network),
            versions=_versions(),
            plain_file=files[PLAIN].name if plain else None,
            plain_sha256=files[PLAIN].sha256 if plain else None,
            pictures=pictures,
            texts=texts,
            calibration=choosing,
            **exporter.describe(files),
        )
        _check_preprocessing(bundle)
        bundle = write_single(bundle, exporter.join, models)
        write_bundle(bundle)
        _check_bundle(Session(bundle), exporter, inputs)
    return replace(bundle, folder=Path(folder))


def check_parity(
    session: Session,
    network: Network,
    policy: Policy | RoutingPolicy,
    samples: Given,
) -> Agreement:
    """Make sure that a bundle answers what the network answers, whichever way samples go."""
    halting = session.bundle.halting
    layers_per_step = 1 if halting is None else halting.steps[0].num_layers
    inputs = as_inputs(samples, network)
    return _check_bundle(session, _exporter_of(network, inputs, policy, layers_per_step), inputs)


def _check_bundle(session: Session, exporter: Exporter, inputs: Features) -> Agreement:
    few = tuple(tensor[:SINGLE_SAMPLES] for tensor in inputs)
    result = session.run(*(tensor.numpy() for tensor in inputs))
    agreement = _check(compare(result, exporter.reference(inputs)))
    # At the policy's own thresholds some parts may never run: extreme ones run them all.
    others = [(Session(bundle), extreme) for bundle, extreme in exporter.extremes(session.bundle)]
    for answering, expected in ((session, exporter), *others):
        reference = expected.reference(few)
        # Single samples are answered by another file, and must pass all of it too.
        for batch_size in (1, SINGLE_SAMPLES):
            answers = answer_in_batches(answering, few, batch_size=batch_size)
            _check(compare(answers, reference))
    return agreement


def _check_precision(network: nn.Module) -> None:
    """Refuse weights that a bundle cannot hold as they are."""
    quantized = {
        name: str(value.dtype) if isinstance(value, Tensor) else "quantised"
        for name, value in network.state_dict().items()
        if not isinstance(value, Tensor) or value.is_quantized  # some modules keep tuples
    }
    precisions = {name: _precision(weight) for name, weight in network.named_parameters()}
    if set(precisions.values()) - _WHOLE in _PRECISIONS:
        precisions = {}
    odd = {name: kind for name, kind in precisions.items() if kind not in _WHOLE | {_USUAL}}
    for name, precision in (quantized | odd).items():
        raise InvalidArgumentError(
            f"A bundle computes in float32 or all in float64 precision, and {name} is {precision}. "
            "Export the network as it was before it was cast or quantised, or network.float(), "
            "and a policy calibrated on that."
        )


def _precision(weight: Tensor) -> str:
    """The type of its numbers; the class of a quantised one, which may claim to be float32."""
    return str(weight.dtype) if type(weight) is nn.Parameter else type(weight).__name__


def _exporter_of(
    network: Network, inputs: Features, policy: Policy | RoutingPolicy, layers_per_step: int
) -> Exporter:
    family = family_of(network)
    make = EXPORTERS[family.name]
    if family.name == "halting":
        make = partial(make, layers_per_step=layers_per_step)
    elif layers_per_step != 1:
        raise InvalidArgumentError(
            "The 'layers_per_step' parameter is for networks whose tokens halt. "
            f"Got {layers_per_step} for a {type(network).__name__}."
        )
    if not isinstance(policy, family.policy):
        raise InvalidArgumentError(
            "Expected a network with exits and a policy for them, one that skips blocks and a "
            "GatePolicy, or one whose tokens halt and a HaltingPolicy. "
            f"Got {type(network).__name__} and {type(policy).__name__}."
        )
    if policy.num_exits != network.num_exits:
        raise InvalidArgumentError(
            f"Expected a policy for the network's {network.num_exits} exits. "
            f"Got one for {policy.num_exits}."
        )
    return make(network, inputs, policy)


def _check(agreement: Agreement) -> Agreement:
    if not agreement.holds:
        worst = max(range(len(agreement.differences)), key=agreement.differences.__getitem__)
        raise ExportMismatchError(
            f"The bundle should answer what torch answers, but {agreement.moved} of "
            f"{agreement.num_samples} samples went another way ({agreement.moved_far} of them far "
            f"from a threshold), and logits differ by up to {agreement.differences[worst]:.2g} at "
            f"exit {worst}. Nothing was written: please report this."
        )
    return agreement


def _uncalibrated(network: Network) -> Policy | RoutingPolicy:
    trained: RoutingPolicy | None = family_of(network).as_trained
    if trained is not None:
        return trained
    rules = RULES[network.outputs.name]
    return rules.make(rules.default, (1.0,) * (network.num_exits - 1))


def _check_preprocessing(bundle: Bundle) -> None:
    try:
        check_preprocessing(bundle)
    except ArtifactError as error:
        raise InvalidArgumentError(
            f"The 'preprocessing' parameter must make inputs of the network. Got {error}."
        ) from error


def _choosing(calibration: Mapping[str, Any]) -> Choosing:
    return decode({k: v for k, v in calibration.items() if k != "policy"}, Choosing)


def _versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (offramp, torch, onnxruntime)}


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def new_bundle_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place where the block ends well."""
    is_bundle = (folder / BUNDLE_FILE).is_file()
    if not is_bundle and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise ArtifactError(f"{folder} exists and is no bundle. Choose another folder.")
    with atomic_folder(folder, instead="Choose another folder.") as making:
        yield making
