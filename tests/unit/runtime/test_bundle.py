"""What is read of a bundle, and what is refused. The ONNX files here are no more than bytes."""

import json
from dataclasses import replace

import pytest

from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.runtime import (
    Bundle,
    Session,
    Step,
    read_bundle,
    with_routing_threshold,
    with_thresholds,
)
from offramp.runtime.bundle import NOBODY_LEAVES, write_bundle
from offramp.runtime.files import TensorSpec, file_sha256


@pytest.fixture
def bundle(tmp_path):
    """Two steps, exit 1 of three is off."""
    steps = []
    for exit_index in (0, 2):
        path = tmp_path / f"step_{exit_index}.onnx"
        path.write_bytes(b"not onnx")
        steps.append(
            Step(
                file=path.name,
                sha256=file_sha256(path),
                exit_index=exit_index,
                temperature=1.0,
                threshold=0.5,
                features=(TensorSpec(name="features_0", dtype="float32", sample_shape=(1, 4, 4)),),
                state=(),
                stage_macs=10,
                head_macs=2,
                exit_macs=12,
                payload_bytes=64,
                parameter_bytes=40,
            )
        )
    made = Bundle(
        folder=tmp_path,
        family="exits",
        steps=tuple(steps),
        num_exits=3,
        class_names=("yes", "no"),
        plain_file=None,
        plain_sha256=None,
        plain_macs=22,
        policy={"kind": "threshold", "rule": "entropy", "thresholds": [0.5, None]},
        recipe=None,
        quantized=None,
        weights_sha256="0" * 64,
        versions={"offramp": "0.1.0"},
    )
    write_bundle(made)
    return made


def edit(bundle, change):
    path = bundle.folder / "bundle.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_was_written_is_read(bundle):
    assert read_bundle(bundle.folder) == bundle
    assert read_bundle(str(bundle.folder)).inputs == bundle.steps[0].features


def test_folder_without_a_bundle(tmp_path):
    with pytest.raises(ArtifactError, match="offramp export RUN"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("steps"),
        lambda content: content.update(steps=[]),
        lambda content: content.update(steps="many"),
        lambda content: content["steps"][0].pop("threshold"),
        lambda content: content["steps"][0].update(threshold="high"),
        lambda content: content["steps"][0].update(surprise=1),
        lambda content: content["steps"][0].update(file="../step_0.onnx"),
        lambda content: content["steps"][0]["features"][0].pop("sample_shape"),
        lambda content: content.pop("num_exits"),
        lambda content: content.update(class_names=None),
        lambda content: content.update(class_names="ab"),
        lambda content: content.update(num_exits=10**12),
        lambda content: content.update(num_exits=2),
        lambda content: content.update(plain_macs=0),
        lambda content: content.update(folder="elsewhere"),
        lambda content: content.update(quantized="int4"),
        lambda content: content.update(versions=[1]),
        lambda content: content.update(recipe=[1]),
        lambda content: content.update(pixel_multiple=0),
        lambda content: content.update(padding={"mask_index": 1, "pad_id": 0}),
        lambda content: content.update(padding={"mask_index": -1, "pad_id": 0}),
        lambda content: content.update(padding={"mask_index": 1, "pad_id": None}),
        lambda content: content["policy"].update(kind="oracle"),
        lambda content: content["policy"].update(thresholds=[0.5]),
        lambda content: content["policy"].update(thresholds=["high", None]),
        lambda content: content["policy"].update(temperatures=[1.0, 0.0, 1.0]),
        lambda content: content["policy"].update(temperatures=[2.0, 1.0, 1.0]),
        lambda content: content["policy"].update(rule="pixel_share"),
        lambda content: content["steps"].reverse(),
        lambda content: content["steps"].pop(),
        lambda content: content["steps"][0].update(threshold=-5.0),
        lambda content: content["steps"][0].update(threshold=1.5),
        lambda content: content["steps"][0].update(threshold=True),
        lambda content: content["steps"][0].update(threshold="0.5"),
        lambda content: content["steps"][0].update(temperature=0),
        lambda content: content["steps"][0].update(temperature=-1.0),
        lambda content: content["steps"][0].update(temperature=1e300),
        lambda content: content["steps"][0].update(temperature=2.0),
        lambda content: content["steps"][0].update(exit_index=10**9),
        lambda content: content["steps"][0].update(exit_index=-1),
        lambda content: content["steps"][0].update(exit_macs="lots"),
        lambda content: content["steps"][0].update(exit_macs=1.5),
        lambda content: content["steps"][0].update(exit_macs=10**400),
        lambda content: content["steps"][0].update(exit_macs_by_length=[1, 2]),
        lambda content: content["steps"][0].update(pixel_threshold=2),
        lambda content: content["steps"][0].update(channel_scales=[[0.0]]),
        lambda content: content["steps"][0].update(features=[]),
        lambda content: content["steps"][0]["features"][0].update(dtype="object"),
        lambda content: content["steps"][0]["features"][0].update(colour="red"),
        lambda content: content["steps"][0]["features"][0].update(sample_shape="abc"),
        lambda content: content["steps"][0]["features"][0].update(sample_shape=[-1, 4, 4]),
        lambda content: content["steps"][0]["features"][0].update(sample_shape=[10**5, 10**5]),
    ],
)
def test_damaged_description_is_refused(bundle, change):
    edit(bundle, change)
    with pytest.raises(ArtifactError, match=r"is damaged .* Export the run again"):
        read_bundle(bundle.folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(bundle, number):
    path = bundle.folder / "bundle.json"
    path.write_text(path.read_text().replace('"threshold": 0.5', f'"threshold": {number}', 1))
    with pytest.raises(ArtifactError, match=r"bundle\.json: it is damaged"):
        read_bundle(bundle.folder)


def test_previous_schema_is_read(bundle):
    """Schema 1 knew no file for single samples."""

    def as_before(content):
        content["schema_version"] = 1
        del content["single_file"], content["single_sha256"]

    edit(bundle, as_before)
    assert read_bundle(bundle.folder) == bundle


def test_newer_schema_is_refused(bundle):
    edit(bundle, lambda content: content.update(schema_version=99))
    with pytest.raises(ArtifactError, match=r"schema version 99.*pip install --upgrade offramp"):
        read_bundle(bundle.folder)


def test_foreign_file_is_refused(bundle):
    (bundle.folder / "bundle.json").write_text("[1, 2]")
    with pytest.raises(ArtifactError, match="not an Offramp file"):
        read_bundle(bundle.folder)


def test_family_of_a_later_version_is_refused(bundle):
    edit(bundle, lambda content: content.update(family="dreams"))
    with pytest.raises(
        ArtifactError, match=r"family exits, skip, halting .* Got 'dreams'.*upgrade"
    ):
        read_bundle(bundle.folder)


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"other")])
def test_missing_and_changed_files_are_refused(bundle, damage):
    damage(bundle.folder / "step_2.onnx")
    with pytest.raises(ArtifactError, match=r"step_2.onnx is missing or not the file"):
        read_bundle(bundle.folder)


def test_plain_file_is_checked_too(bundle):
    write_bundle(replace(bundle, plain_file="plain.onnx", plain_sha256="0" * 64))
    with pytest.raises(ArtifactError, match=r"plain.onnx is missing"):
        read_bundle(bundle.folder)


def test_file_that_onnxruntime_cannot_load_is_refused_in_one_line(bundle):
    with pytest.raises(ArtifactError, match=r"cannot load .*step_0.onnx") as refused:
        Session(bundle.folder)
    assert "\n" not in str(refused.value)


def test_other_thresholds(bundle):
    changed = with_thresholds(bundle, [0.7])
    assert [step.threshold for step in changed.steps] == [0.7, 0.5]
    assert changed.policy["thresholds"] == [0.7, None]
    write_bundle(with_thresholds(bundle, [float("inf")]))
    assert read_bundle(bundle.folder).steps[0].threshold == NOBODY_LEAVES
    with pytest.raises(InvalidArgumentError, match=r"Expected 1 thresholds.* Got 2"):
        with_thresholds(bundle, [0.1, 0.2])


def test_without_gates_there_is_no_threshold_of_gates(bundle):
    with pytest.raises(InvalidArgumentError, match="family exits: use with_thresholds"):
        with_routing_threshold(bundle, 0.5)


def test_what_an_older_offramp_does_not_know_is_left_out(bundle):
    assert "skip" not in json.loads((bundle.folder / "bundle.json").read_text())
