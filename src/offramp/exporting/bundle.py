"""From a network and its policy to a bundle, checked against torch before it is handed out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import offramp
from offramp.artifacts import atomic_folder
from offramp.errors import ArtifactError, ExportMismatchError, InvalidArgumentError
from offramp.exporting.onnx import StepModule, plan_steps, write_onnx
from offramp.exporting.single import write_single
from offramp.inference.agreement import (
    SINGLE_SAMPLES,
    Agreement,
    answer_in_batches,
    compare_with_all_exits,
)
from offramp.measure.cost import ExitCosts, parameter_bytes, payload_bytes
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.policies import Policy, State, never_leave
from offramp.runtime import Bundle, Session, Step, with_thresholds
from offramp.runtime.bundle import BUNDLE_FILE, Padding, TensorSpec, file_sha256, write_bundle

PLAIN_FILE = "plain.onnx"
_LENGTHS = (8, 16, 32)
"""In tokens: where the MACs of samples of unequal length are counted."""
SINGLE_FILE = "single.onnx"


@torch.no_grad()
def export(
    network: MultiExitNetwork,
    policy: Policy,
    folder: Path | str,
    samples: Tensor | Features,
    *,
    class_names: tuple[str, ...] = (),
    recipe: Mapping[str, Any] | None = None,
    plain: bool = True,
) -> Bundle:
    """Write a network and its policy as a bundle that runs without torch.

    Every step becomes one ONNX file with a free batch size; exits that are off get none, and the
    stages around them are merged. One more file holds all steps, for batches of one. Before
    anything is left behind, the bundle answers the samples and is compared with torch.

    Args:
        network: The network, on the CPU.
        policy: Who leaves where.
        folder: Folder to make; a bundle that is there already is replaced.
        samples: Real inputs, shape (N, ...), to compare on; 100 at least say something. A tuple
            where the network takes several inputs.
        class_names: Name of each class.
        recipe: How the network was trained, to be kept in the bundle.
        plain: Whether to add the plain network, so that a device can time its own baseline.
    Returns:
        What was written.
    Raises:
        ArtifactError: If the folder holds something else or cannot be written, or torch cannot
            export the network.
        ExportMismatchError: If the bundle answers otherwise than the network.
        InvalidArgumentError: If the policy is for another network or of an unknown class.
        MissingExtraError: If the packages that write ONNX are not installed.
    """
    if policy.num_exits != network.num_exits:
        raise InvalidArgumentError(
            f"Expected a policy for the network's {network.num_exits} exits. "
            f"Got one for {policy.num_exits}."
        )
    described = policy_to_dict(policy)
    inputs = as_features(samples)
    network = network.eval()
    with new_bundle_folder(Path(folder)) as making:
        files = _write_files(network, policy, inputs, making, plain=plain)
        bundle = Bundle(
            folder=making,
            family="exits",
            num_exits=network.num_exits,
            class_names=class_names,
            policy=described,
            recipe=recipe,
            quantized=None,
            weights_sha256=_weights_sha256(network),
            versions=_versions(),
            **files,
        )
        write_bundle(bundle)
        check_parity(Session(bundle), network, policy, inputs)
    return replace(bundle, folder=Path(folder))


def _write_files(
    network: MultiExitNetwork, policy: Policy, inputs: Features, folder: Path, *, plain: bool
) -> dict[str, Any]:
    """Write the ONNX files; what the bundle says of them."""
    costs = network.costs(*inputs).with_decisions(policy.decision_macs)
    steps = _write_steps(network, policy, inputs, costs, folder)
    write_single(folder, steps, folder / SINGLE_FILE)
    return {
        "steps": steps,
        "plain_file": PLAIN_FILE if plain else None,
        "plain_sha256": _write_plain(network, inputs, folder) if plain else None,
        "plain_macs": costs.plain_macs,
        "single_file": SINGLE_FILE,
        "single_sha256": file_sha256(folder / SINGLE_FILE),
        "padding": None if network.ragged is None else Padding(**asdict(network.ragged)),
    }


def check_parity(
    session: Session, network: MultiExitNetwork, policy: Policy, samples: Tensor | Features
) -> Agreement:
    """Make sure that a bundle answers what the network answers, at every exit.

    Args:
        session: Runs the bundle.
        network: The network it was exported from, in evaluation mode.
        policy: The policy it was exported with.
        samples: Real inputs, shape (N, ...); a tuple where the network takes several.
    Returns:
        How the answers compare.
    Raises:
        ExportMismatchError: If they differ by more than DESIGN's rule for two engines allows.
    """
    inputs = as_features(samples)
    few = tuple(tensor[:SINGLE_SAMPLES] for tensor in inputs)
    ones = answer_in_batches(session, few, batch_size=1)
    _check(compare_with_all_exits(ones, network, policy, few))
    # Nobody leaves: so every branch of the file for single samples is run.
    nobody = with_thresholds(session.bundle, [math.inf] * (len(session.bundle.steps) - 1))
    ones = answer_in_batches(Session(nobody), few, batch_size=1)
    _check(compare_with_all_exits(ones, network, never_leave(network.num_exits), few))
    result = session.run(*(tensor.numpy() for tensor in inputs))
    return _check(compare_with_all_exits(result, network, policy, inputs))


def _check(agreement: Agreement) -> Agreement:
    if not agreement.holds:
        worst = max(range(len(agreement.differences)), key=agreement.differences.__getitem__)
        raise ExportMismatchError(
            f"The bundle should answer what torch answers, but {agreement.moved} of "
            f"{agreement.num_samples} samples left elsewhere ({agreement.moved_far} of them far "
            f"from a threshold), and logits differ by up to {agreement.differences[worst]:.2g} at "
            f"exit {worst}. Nothing was written: please report this."
        )
    return agreement


def _write_steps(
    network: MultiExitNetwork, policy: Policy, inputs: Features, costs: ExitCosts, folder: Path
) -> tuple[Step, ...]:
    exit_macs = costs.exit_macs(policy.off_exits)
    by_length = _macs_by_length(network, policy, inputs)
    features = _first_sample(network, inputs)
    num_tokens = None if network.ragged is None else features[0].shape[1]
    state: State = ()
    steps = []
    for plan in plan_steps(policy):
        k, is_last = plan.exit_index, plan.exit_index == network.num_exits - 1
        setting = policy.setting(k)
        module = StepModule(network, policy, plan, num_features=len(features)).eval()
        next_features = features
        for stage in plan.stages:
            next_features = network.run_stage(stage, next_features)
        _, _, next_state = policy.step(k, network.run_exit(k, next_features), state)
        specs = _specs(features, state, num_tokens)
        handed_on = () if is_last else _specs(next_features, next_state, num_tokens)
        path = folder / f"step_{k}.onnx"
        write_onnx(
            module,
            (*features, *state),
            path,
            scalars=("temperature", "threshold"),
            input_names=[spec.name for spec in specs],
            output_names=["output", "confidence", "leave", *(f"next_{s.name}" for s in handed_on)],
            free_tokens=[spec.has_tokens for spec in specs],
        )
        steps.append(
            Step(
                file=path.name,
                sha256=file_sha256(path),
                exit_index=k,
                temperature=float(setting.temperature),
                threshold=float(setting.threshold),
                features=specs[: len(features)],
                state=specs[len(features) :],
                stage_macs=sum(costs.stage_macs[stage] for stage in plan.stages),
                head_macs=costs.head_macs[k],
                exit_macs=exit_macs[k],
                payload_bytes=0 if is_last else payload_bytes(*next_features, *next_state),
                parameter_bytes=parameter_bytes(module),
                exit_macs_by_length=None if by_length is None else by_length[k],
            )
        )
        features, state = next_features, next_state
    return tuple(steps)


def _first_sample(network: MultiExitNetwork, inputs: Features) -> Features:
    """A batch of one to export with; of two tokens at least, since one is special to the tracer."""
    sample = network.trimmed(tuple(tensor[:1] for tensor in inputs))
    if network.ragged is None or sample[0].shape[1] > 1:
        return sample
    return tuple(tensor.repeat(1, 2) for tensor in sample)


def _specs(features: Features, state: State, num_tokens: int | None) -> tuple[TensorSpec, ...]:
    """What describes the tensors; the axis of so many tokens is free."""
    named = [(f"features_{i}", tensor, num_tokens) for i, tensor in enumerate(features)]
    named += [(f"state_{i}", tensor, None) for i, tensor in enumerate(state)]
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            sample_shape=(
                (None, *tensor.shape[2:])
                if tokens is not None and tensor.shape[1:2] == (tokens,)
                else tuple(tensor.shape[1:])
            ),
        )
        for name, tensor, tokens in named
    )


def _macs_by_length(
    network: MultiExitNetwork, policy: Policy, inputs: Features
) -> tuple[tuple[int, ...], ...] | None:
    """MACs up to each exit as a polynomial in a sample's tokens; None where all are of one size.

    Layers cost so much a token, attention so much a pair of tokens: three lengths say it all.
    """
    if network.ragged is None:
        return None
    at_length = np.array(
        [
            network.costs_at(length, inputs)
            .with_decisions(policy.decision_macs)
            .exit_macs(policy.off_exits)
            for length in _LENGTHS
        ]
    )
    powers = np.vander(_LENGTHS, 3, increasing=True)
    numbers_3K = np.linalg.solve(powers, at_length).round().astype(np.int64)
    if (powers @ numbers_3K != at_length).any():
        raise ArtifactError(
            "The MACs of this network are no polynomial of degree 2 in its tokens, which a bundle "
            "could write down. Run it with torch."
        )
    return tuple(tuple(numbers.tolist()) for numbers in numbers_3K.T)


def _write_plain(network: MultiExitNetwork, inputs: Features, folder: Path) -> str:
    path = folder / PLAIN_FILE
    plain = network.plain().eval()
    example = _first_sample(network, inputs)
    num_tokens = None if network.ragged is None else example[0].shape[1]
    specs = _specs(example, (), num_tokens)
    write_onnx(
        plain,
        example,
        path,
        input_names=[spec.name for spec in specs],
        output_names=["output"],
        free_tokens=[spec.has_tokens for spec in specs],
    )
    return file_sha256(path)


def _versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (offramp, torch, onnxruntime)}


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def new_bundle_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place when the block has ended well.

    Args:
        folder: Where the bundle shall be; a bundle that is there already is replaced.
    Raises:
        ArtifactError: If the folder holds something that is no bundle, or cannot be made.
    """
    is_bundle = (folder / BUNDLE_FILE).is_file()
    if not is_bundle and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise ArtifactError(f"{folder} exists and is no bundle. Choose another folder with --out.")
    with atomic_folder(folder, instead="Choose another with --out.") as making:
        yield making
