"""The bundle: what ``offramp export`` writes and a :class:`~offramp.runtime.Session` runs.

A folder with ``bundle.json`` and ONNX files. Of a network with exits, one file a step: the stages
up to an exit, the exit, and the decision who leaves there; exits that are off have no step of their
own. Of a network that skips blocks, or whose tokens halt, one a part: see ``skip_parts.py`` and
``halting_parts.py``. Beside them, one file holds everything for batches of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from offramp.artifacts import BUNDLE_FOLDER, read_json, write_json
from offramp.decoding import Count, Positive, Share, decode
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.runtime.chosen_on import Choosing
from offramp.runtime.dense import MAP_STRIDES
from offramp.runtime.files import OnnxFile, TensorSpec, has_weights_outside
from offramp.runtime.halting_parts import HaltingParts
from offramp.runtime.preprocessing import (
    AnyPreprocessing,
    Preprocessing,
    TokenizerFile,
    read_texts,
)
from offramp.runtime.skip_parts import SkipParts

BUNDLE_FILE = "bundle.json"
NOBODY_LEAVES = 1e9
"""A threshold above every confidence and every patience, which JSON can hold."""
_MOST_NUMBERS = 2**26
"""A sample of more is refused: inputs are made up to warm up and to time."""
FAMILIES = ("exits", "skip", "halting")
"""Kinds of adaptive networks that a session can run."""
Coefficient = Annotated[int, Meta(ge=-(2**53), le=2**53)]
MacsByLength = Annotated[tuple[Coefficient, ...], Meta(min_length=3, max_length=3)]
MacsBySize = Annotated[
    tuple[Coefficient, ...],
    Meta(min_length=1 + len(MAP_STRIDES), max_length=1 + len(MAP_STRIDES)),
]
SINGLE_OUTPUTS = ("output", "confidence", "step")
"""Outputs of the file for single samples: logits, confidence, number of the step left by.

Of a network with exits; those of others are in ``skip_parts.py`` and ``halting_parts.py``.
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One ONNX file: from an exit to the next.

    It maps ``(features..., state..., temperature, threshold)`` to
    ``(output, confidence, leave, features..., state...)``: what comes after ``leave`` goes into the
    next step as it is. The last step hands on nothing, and everybody leaves there.

    Attributes:
        file: Name of the ONNX file in the bundle's folder.
        sha256: Hash of that file.
        exit_index: The exit that the step ends with, as numbered in the network.
        temperature: Divides the logits before the confidence is taken; an input of the step.
        threshold: What the policy compares with there; an input of the step.
        features: What comes in: the network's inputs at the first step, then what the step before
            handed on.
        state: What the policy remembers of each sample.
        stage_macs: MACs a sample of the stages in it.
        head_macs: MACs a sample of the exit head in it.
        exit_macs: MACs of a sample that leaves here, all steps before counted; of the mean sample,
            where samples are of unequal length.
        payload_bytes: Bytes a sample that the step hands on.
        parameter_bytes: Bytes of weights in it.
        exit_macs_by_length: For samples of unequal length, ``exit_macs`` of one of T tokens as
            numbers c0, c1, c2: c0 + c1 T + c2 T^2.
        exit_macs_by_size: For images of any size, ``exit_macs`` as numbers to be multiplied with
            :func:`~offramp.runtime.dense.map_cells`.
        stage_macs_by_length: ``stage_macs`` in the same numbers as ``exit_macs_by_length``; None
            in bundles that were exported before they were written.
        stage_macs_by_size: ``stage_macs`` in the same numbers as ``exit_macs_by_size``.
        pixel_threshold: How sure a pixel must be to count as sure; an input of the step, where the
            policy counts pixels, else None.
        channel_scales: Of each feature, by how much a number of 8 bits counts in each channel, so
            that it can cross a link in int8; empty for one that is not float32. None in bundles
            that were exported before links were.
    """

    file: str
    sha256: str
    exit_index: Count
    temperature: Positive
    threshold: Annotated[float, Meta(ge=0, le=NOBODY_LEAVES)]
    features: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    state: tuple[TensorSpec, ...]
    stage_macs: Count
    head_macs: Count
    exit_macs: Count
    payload_bytes: Count
    parameter_bytes: Count
    exit_macs_by_length: MacsByLength | None = None
    exit_macs_by_size: MacsBySize | None = None
    stage_macs_by_length: MacsByLength | None = None
    stage_macs_by_size: MacsBySize | None = None
    pixel_threshold: Share | None = None
    channel_scales: tuple[tuple[Positive, ...], ...] | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """Numbers that the policy compares with there, by the names of the step's last inputs."""
        numbers = {"temperature": self.temperature, "threshold": self.threshold}
        if self.pixel_threshold is not None:
            numbers["pixel_threshold"] = self.pixel_threshold
        return numbers


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Padding of a bundle for samples of unequal length: how it is marked.

    Attributes:
        mask_index: Number of the feature that crosses each cut and is 0 on padding, shape (B, T).
        pad_id: Value of the padding in the only input, shape (B, T); None where the inputs hold
            the mask, at the same number.
    """

    mask_index: Count
    pad_id: Annotated[int, Meta(ge=-(2**31), le=2**31)] | None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Content of ``bundle.json``.

    Attributes:
        folder: Where the bundle is, as an absolute path: files are loaded later too.
        family: Kind of adaptive network.
        steps: In the order in which they run; empty for a network of another family than exits.
        num_exits: Exits of the network, those that are off counted.
        class_names: Name of each class; empty where none were given.
        plain_file: The plain network as one ONNX file, for timing on the device; None if left out.
        plain_sha256: Hash of that file.
        plain_macs: MACs a sample of the plain network; of the mean sample that it was exported
            with, where samples are of unequal size. :meth:`Session.plain_macs` says of any sample.
        policy: The policy as in ``policy.json``.
        recipe: How the network was trained, as in ``recipe.json``; None for a network of the
            user's own.
        quantized: "int8", or None for float32.
        weights_sha256: Hash of the run's weights.
        versions: Of the packages that wrote it.
        single_file: All steps in one ONNX file for batches of one; None in bundles of schema 1.
        single_sha256: Hash of that file.
        padding: For samples of unequal length, where padding is marked; else None.
        skip: The parts of a network that skips blocks; else None.
        halting: The parts of a network whose tokens halt; else None.
        pixel_multiple: Of a network that says a class for every pixel, and takes images of any
            size: of what height and width are multiples. None for other networks.
        pictures: How a picture becomes an input; None where that was not said, or for texts.
        texts: The tokenizer, beside the ONNX files; None where that was not said, or for pictures.
        calibration: How the policy was chosen; None where that was not said.
    """

    folder: Path
    family: str
    steps: tuple[Step, ...]
    num_exits: Annotated[int, Meta(ge=1, le=10_000)]
    class_names: tuple[str, ...]
    plain_file: str | None
    plain_sha256: str | None
    plain_macs: Annotated[int, Meta(ge=1, le=2**53)]
    policy: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    quantized: Literal["int8"] | None
    weights_sha256: str
    versions: Mapping[str, str]
    single_file: str | None = None
    single_sha256: str | None = None
    padding: Padding | None = None
    skip: SkipParts | None = None
    halting: HaltingParts | None = None
    pixel_multiple: Annotated[int, Meta(ge=1, le=1024)] | None = None
    pictures: Preprocessing | None = None
    texts: TokenizerFile | None = None
    calibration: Choosing | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.absolute())

    @property
    def preprocessing(self) -> AnyPreprocessing | None:
        """The way from samples to inputs; None if the bundle does not say it."""
        return self.pictures if self.texts is None else read_texts(self.folder, self.texts)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The network's inputs."""
        if self.skip is not None:
            return (self.skip.input,)
        return self.steps[0].features if self.halting is None else self.halting.inputs

    @property
    def num_steps(self) -> int:
        """Steps of whatever family it is."""
        routed = self.skip or self.halting
        return len(self.steps if routed is None else routed.steps)

    @property
    def files(self) -> tuple[OnnxFile, ...]:
        """All its ONNX files."""
        named = [(step.file, step.sha256) for step in self.steps]
        extra = [(self.plain_file, self.plain_sha256), (self.single_file, self.single_sha256)]
        named += [(name, str(sha256)) for name, sha256 in extra if name is not None]
        files = tuple(OnnxFile(name=name, sha256=sha256) for name, sha256 in named)
        routed = self.skip or self.halting
        return files if routed is None else (*files, *routed.files)


def single_numbers(steps: Sequence[Step]) -> dict[str, float]:
    """The numbers of the policy that the file for single samples holds as initialisers."""
    return {
        f"{name}_{i}": number
        for i, step in enumerate(steps)
        for name, number in step.numbers.items()
    }


def with_thresholds(bundle: Bundle, thresholds: Sequence[float]) -> Bundle:
    """The same bundle with other thresholds; its ONNX files need not change.

    Args:
        bundle: The bundle, of a network with exits.
        thresholds: One per step but the last, where everybody leaves; +inf for nobody.
    Returns:
        What to write or to run.
    Raises:
        InvalidArgumentError: If there is not one threshold per step but the last, or the network
            has no exits.
    """
    if bundle.family != "exits":
        raise InvalidArgumentError(
            f"Expected a bundle of a network with exits. One threshold steers that of "
            f"{bundle.folder}, of the family {bundle.family}: use with_routing_threshold."
        )
    if len(thresholds) != len(bundle.steps) - 1:
        raise InvalidArgumentError(
            f"Expected {len(bundle.steps) - 1} thresholds, one per step but the last. "
            f"Got {len(thresholds)}."
        )
    changed = [
        replace(step, threshold=min(float(threshold), NOBODY_LEAVES))
        for step, threshold in zip(bundle.steps[:-1], thresholds, strict=True)
    ]
    by_exit = {
        step.exit_index: step.threshold if step.threshold < NOBODY_LEAVES else None
        for step in changed
    }
    named = [by_exit.get(k) for k in range(bundle.num_exits - 1)]
    return replace(
        bundle,
        steps=(*changed, bundle.steps[-1]),
        policy={**bundle.policy, "thresholds": named},
    )


def with_routing_threshold(bundle: Bundle, threshold: float) -> Bundle:
    """The same bundle with another threshold of its gates or tokens; its ONNX files stay.

    Args:
        bundle: The bundle, of a network that skips blocks or whose tokens halt.
        threshold: In [0, 1]; 0 runs every block, and lets every token halt after the first layer.
    Returns:
        What to write or to run.
    Raises:
        InvalidArgumentError: If the threshold is not in [0, 1], or the bundle has exits.
    """
    if bundle.family == "exits":
        raise InvalidArgumentError(
            "Expected a bundle of a network that skips blocks or whose tokens halt. "
            f"{bundle.folder} holds one of the family exits: use with_thresholds."
        )
    if not 0 <= threshold <= 1:
        raise InvalidArgumentError(f"The 'threshold' parameter must be in [0, 1]. Got {threshold}.")
    skip, halting = bundle.skip, bundle.halting
    return replace(
        bundle,
        skip=None if skip is None else replace(skip, threshold=float(threshold)),
        halting=None if halting is None else replace(halting, threshold=float(threshold)),
        policy={**bundle.policy, "threshold": float(threshold)},
    )


def write_bundle(bundle: Bundle) -> None:
    """Write ``bundle.json``; the ONNX files must lie beside it already."""
    content = asdict(bundle)
    del content["folder"]
    # What an older Offramp does not know is written only where it is needed.
    _delete_none(content, "skip", "halting", "pixel_multiple", "pictures", "texts", "calibration")
    front = (content.get("calibration") or {}).get("front") or {"points": ()}
    for point in front["points"]:
        _delete_none(point, "mean_iou")
    for step in content["steps"]:
        _delete_none(step, "exit_macs_by_size", "pixel_threshold", "channel_scales")
        _delete_none(step, "stage_macs_by_length", "stage_macs_by_size")
    write_json(bundle.folder / BUNDLE_FILE, content)


def _delete_none(content: dict[str, Any], *names: str) -> None:
    for name in names:
        if content[name] is None:
            del content[name]


def is_bundle(folder: Path) -> bool:
    """Tell a bundle from a run folder, which any other folder is read as."""
    return (folder / BUNDLE_FILE).is_file()


def find_bundle(run: Path) -> Path:
    """Find the bundle that a folder is, or that is in a run folder."""
    found = next((folder for folder in (run, run / BUNDLE_FOLDER) if is_bundle(folder)), None)
    if found is None:
        raise ArtifactError(
            f"Expected a bundle, or a run folder with one in it. {run} has none. "
            f"Make one: offramp export {run}"
        )
    return found


def read_bundle(folder: Path | str) -> Bundle:
    """Read a bundle and make sure that its files are whole.

    Args:
        folder: The bundle's folder.
    Returns:
        What it says.
    Raises:
        ArtifactError: If it is no bundle, damaged, incomplete, of another family or too new.
    """
    folder = Path(folder)
    if not (folder / BUNDLE_FILE).is_file():
        raise ArtifactError(
            f"Expected a bundle with a {BUNDLE_FILE} in it. {folder} has none. "
            "Make one: offramp export RUN"
        )
    content = read_json(folder / BUNDLE_FILE)
    family = content.get("family")
    if family not in FAMILIES:
        raise ArtifactError(
            f"Expected a bundle of family {', '.join(FAMILIES)} in {folder}. Got {family!r}: "
            "it needs a newer Offramp. pip install --upgrade offramp"
        )
    try:
        if "folder" in content:
            raise ArtifactError("Object contains unknown field 'folder'")
        bundle = decode({**_migrated(content), "folder": folder}, Bundle)
        _check(bundle)
    except ArtifactError as error:
        raise ArtifactError(
            f"{folder / BUNDLE_FILE} is damaged ({error}). Export the run again."
        ) from error
    for file in bundle.files:
        _check_file(folder / file.name, file.sha256)
    if bundle.texts is not None:
        read_texts(folder, bundle.texts)
    return bundle


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """A bundle as it is written today.

    The first ones wrote 2 where nobody leaves, but for patience, whose threshold was a count.
    """
    policy, steps = content.get("policy"), content.get("steps")
    if not isinstance(policy, dict) or policy.get("kind") == "patience":
        return content
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return content
    return content | {
        "steps": [
            step | {"threshold": NOBODY_LEAVES} if step.get("threshold") == 2.0 else step
            for step in steps
        ]
    }


def _check_file(path: Path, sha256: str) -> None:
    content = path.read_bytes() if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        raise ArtifactError(
            f"{path} is missing or not the file that was exported. "
            "Export the run again or copy the whole folder."
        )
    if has_weights_outside(content):
        raise ArtifactError(
            f"{path} keeps weights in another file, which no hash covers. Expected all of them "
            "inside. Export the run again."
        )


@dataclass(frozen=True, kw_only=True)
class _PolicyNumbers:
    """Fields of policies of all kinds; ``offramp.policy`` makes one of them, which takes torch."""

    kind: Literal["threshold", "patience", "controller", "dense", "agreement", "gates", "halting"]
    rule: str | None = None
    thresholds: tuple[Share | None, ...] | None = None
    temperatures: tuple[Positive, ...] | None = None
    threshold: Share | None = None
    patience: Annotated[int, Meta(ge=2)] | None = None
    num_exits: int | None = None
    pixel_threshold: Share | None = None
    scorers: tuple[Mapping[str, Any], ...] | None = None


def _check(bundle: Bundle) -> None:
    """Raise for what no single field shows."""
    steps = {
        "exits": bundle.steps,
        "skip": bundle.skip and bundle.skip.steps,
        "halting": bundle.halting and bundle.halting.steps,
    }
    if [family for family, found in steps.items() if found] != [bundle.family]:
        raise ArtifactError(f"no steps of the family {bundle.family}")
    if any(Path(file.name).name != file.name for file in bundle.files):
        raise ArtifactError("a file outside the folder")
    free = 8 * (bundle.pixel_multiple or 1)  # as made-up inputs have it
    for spec in bundle.inputs:
        if prod(free if size is None else size for size in spec.sample_shape) > _MOST_NUMBERS:
            raise ArtifactError(f"{spec.name} of more than {_MOST_NUMBERS} numbers a sample")
    check_preprocessing(bundle)
    if bundle.padding is not None:
        marked = [step.features for step in bundle.steps[1:]]
        if bundle.padding.pad_id is None:
            marked.append(bundle.inputs)
        if any(bundle.padding.mask_index >= len(features) for features in marked):
            raise ArtifactError("padding.mask_index: no such feature")
    exits = [step.exit_index for step in bundle.steps]
    if exits and (exits != sorted(set(exits)) or exits[-1] != bundle.num_exits - 1):
        raise ArtifactError(f"steps of exits {exits}, which do not grow up to the final one")
    _check_policy(bundle)


def check_preprocessing(bundle: Bundle) -> None:
    """Raise where prepared samples are no inputs of the network."""
    if bundle.pictures is not None and bundle.texts is not None:
        raise ArtifactError("pictures and texts: one of them")
    first = bundle.inputs[0]
    if bundle.pictures is not None:
        shape, multiple = bundle.pictures.shape, bundle.pixel_multiple or 1
        if len(bundle.inputs) > 1 or first.dtype[:5] != "float" or not first.fits(shape, multiple):
            raise ArtifactError(f"pictures of shape {shape} for inputs {_shapes(bundle)}")
    if bundle.texts is not None and (len(first.sample_shape) != 1 or first.dtype[:3] != "int"):
        raise ArtifactError(f"token ids for inputs {_shapes(bundle)}")


def _shapes(bundle: Bundle) -> str:
    return ", ".join(f"{spec.dtype} {spec.sample_shape}" for spec in bundle.inputs)


def _check_policy(bundle: Bundle) -> None:
    """Raise where the policy is not for these exits, or the steps hold other temperatures."""
    try:
        policy = decode(bundle.policy, _PolicyNumbers)
    except ArtifactError as error:
        raise ArtifactError(f"policy.{error}") from error
    counts = {"thresholds": bundle.num_exits - 1, "temperatures": bundle.num_exits}
    for name, count in counts.items():
        found = getattr(policy, name)
        if found is not None and len(found) != count:
            raise ArtifactError(f"policy.{name}: Expected {count} numbers, got {len(found)}")
    if policy.rule == "pixel_share" and policy.pixel_threshold is None:
        raise ArtifactError("policy: Object lacks the field pixel_threshold")
    counts_exits = policy.kind == "patience" and policy.thresholds is None
    for i, step in enumerate(bundle.steps):
        expected = policy.temperatures[step.exit_index] if policy.temperatures else 1.0
        if step.temperature != expected:
            raise ArtifactError(
                f"steps[{i}].temperature: Expected {expected} as in the policy, "
                f"got {step.temperature}"
            )
        if step.threshold > 1 and step.threshold != NOBODY_LEAVES and not counts_exits:
            raise ArtifactError(
                f"steps[{i}].threshold: Expected a number in [0, 1], or {NOBODY_LEAVES:g} where "
                f"nobody leaves, got {step.threshold}"
            )
