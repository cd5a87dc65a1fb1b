"""The bundle: what ``offramp export`` writes and a :class:`~offramp.runtime.Session` runs.

A folder with ``bundle.json`` and ONNX files. Of a network with exits, one file a step: the stages
up to an exit, the exit, and the decision who leaves there; exits that are off have no step of their
own. Of a network that skips blocks, or whose tokens halt, one a part: see ``skip_parts.py`` and
``halting_parts.py``. Beside them, one file holds everything for batches of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offramp.artifacts import read_json, write_json
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.runtime.files import OnnxFile, TensorSpec, file_sha256, read_spec
from offramp.runtime.halting_parts import HaltingParts, read_halting_parts
from offramp.runtime.skip_parts import SkipParts, read_skip_parts

BUNDLE_FILE = "bundle.json"
NOBODY_LEAVES = 1e9
"""A threshold above every confidence and every patience, which JSON can hold."""
FAMILIES = ("exits", "skip", "halting")
"""Kinds of adaptive networks that a session can run."""
SINGLE_OUTPUTS = ("output", "confidence", "step")
"""What the file for single samples puts out: logits, confidence, number of the step left by.

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
    exit_index: int
    temperature: float
    threshold: float
    features: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    stage_macs: int
    head_macs: int
    exit_macs: int
    payload_bytes: int
    parameter_bytes: int
    exit_macs_by_length: tuple[int, ...] | None = None
    exit_macs_by_size: tuple[int, ...] | None = None
    stage_macs_by_length: tuple[int, ...] | None = None
    stage_macs_by_size: tuple[int, ...] | None = None
    pixel_threshold: float | None = None
    channel_scales: tuple[tuple[float, ...], ...] | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """What the policy compares with there, by the names of the step's last inputs."""
        numbers = {"temperature": self.temperature, "threshold": self.threshold}
        if self.pixel_threshold is not None:
            numbers["pixel_threshold"] = self.pixel_threshold
        return numbers


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Where a bundle for samples of unequal length marks what is no part of a sample.

    Attributes:
        mask_index: Number of the feature that crosses each cut and is 0 on padding, shape (B, T).
        pad_id: Value of the padding in the only input, shape (B, T); None where the inputs hold
            the mask, at the same number.
    """

    mask_index: int
    pad_id: int | None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What ``bundle.json`` says.

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
    """

    folder: Path
    family: str
    steps: tuple[Step, ...]
    num_exits: int
    class_names: tuple[str, ...]
    plain_file: str | None
    plain_sha256: str | None
    plain_macs: int
    policy: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    quantized: str | None
    weights_sha256: str
    versions: Mapping[str, str]
    single_file: str | None = None
    single_sha256: str | None = None
    padding: Padding | None = None
    skip: SkipParts | None = None
    halting: HaltingParts | None = None
    pixel_multiple: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.absolute())

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
    """The numbers of the policy that the file for single samples holds as initialisers.

    Args:
        steps: The steps of the bundle.
    Returns:
        Numbers of every step, by the name of the initialiser.
    """
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
    """Write ``bundle.json``; the ONNX files must lie beside it already.

    Args:
        bundle: What to write.
    """
    content = asdict(bundle)
    del content["folder"]
    # What an older Offramp does not know is written only where it is needed.
    _delete_none(content, "skip", "halting", "pixel_multiple")
    for step in content["steps"]:
        _delete_none(step, "exit_macs_by_size", "pixel_threshold", "channel_scales")
        _delete_none(step, "stage_macs_by_length", "stage_macs_by_size")
    write_json(bundle.folder / BUNDLE_FILE, content)


def _delete_none(content: dict[str, Any], *names: str) -> None:
    for name in names:
        if content[name] is None:
            del content[name]


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
        steps = tuple(_read_step(step) for step in content.pop("steps"))
        class_names = tuple(content.pop("class_names"))
        padding, skip, halting = (content.pop(key, None) for key in ("padding", "skip", "halting"))
        bundle = Bundle(
            folder=folder,
            steps=steps,
            class_names=class_names,
            padding=None if padding is None else Padding(**padding),
            skip=None if skip is None else read_skip_parts(skip),
            halting=None if halting is None else read_halting_parts(halting),
            **content,
        )
        _check_parts(bundle)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder / BUNDLE_FILE} is damaged ({error}). Export the run again."
        ) from error
    for file in bundle.files:
        path = folder / file.name
        if not path.is_file() or file_sha256(path) != file.sha256:
            raise ArtifactError(
                f"{path} is missing or not the file that was exported. "
                "Export the run again or copy the whole folder."
            )
    return bundle


def _check_parts(bundle: Bundle) -> None:
    steps = {
        "exits": bundle.steps,
        "skip": bundle.skip and bundle.skip.steps,
        "halting": bundle.halting and bundle.halting.steps,
    }
    if [family for family, found in steps.items() if found] != [bundle.family]:
        raise ValueError(f"no steps of the family {bundle.family}")
    if any(Path(file.name).name != file.name for file in bundle.files):
        raise ValueError("a file outside the folder")


def _read_step(content: Mapping[str, Any]) -> Step:
    parts: dict[str, Any] = {
        "temperature": float(content["temperature"]),
        "threshold": float(content["threshold"]),
        "features": tuple(read_spec(spec) for spec in content["features"]),
        "state": tuple(read_spec(spec) for spec in content["state"]),
    }
    for name in ("exit_macs", "stage_macs"):
        for by in ("length", "size"):
            numbers = content.get(f"{name}_by_{by}")
            parts[f"{name}_by_{by}"] = None if numbers is None else tuple(map(int, numbers))
    scales = content.get("channel_scales")
    parts["channel_scales"] = (
        None if scales is None else tuple(tuple(map(float, s)) for s in scales)
    )
    pixel_threshold = content.get("pixel_threshold")
    parts["pixel_threshold"] = None if pixel_threshold is None else float(pixel_threshold)
    return Step(**{**content, **parts})
