import json
from dataclasses import replace

import pytest
import torch

from offramp.artifacts import SCHEMA_VERSION
from offramp.calibration.chosen import Calibration
from offramp.errors import ArtifactError, DataError, InvalidArgumentError
from offramp.model.checkpoint import save_weights
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, never_leave
from offramp.policy.routing_policy import GatePolicy
from offramp.recipes.exits import find_recipe
from offramp.runs.hub import save_pretrained
from offramp.runs.run import (
    CALIBRATION_SPLIT,
    create_folder,
    is_in_sample,
    load,
    load_batches,
    read_recipe,
    save,
    write_policy,
    write_recipe,
)
from offramp.runtime.preprocessing import Preprocessing, TextPreprocessing
from offramp.zoo.mlp import mlp
from offramp.zoo.skipnet import skipnet


@pytest.fixture
def recipe():
    options = {"in_features": 64, "widths": (16, 8), "num_classes": 10}
    return replace(find_recipe("digits-mlp"), network_options=options, calibration_share=0.2)


@pytest.fixture
def trained(recipe, tmp_path):
    """A run folder of a recipe, as ``offramp train`` leaves it."""
    folder = create_folder(tmp_path / "run")
    write_recipe(folder, recipe=recipe, class_names=tuple("0123456789"), data="somewhere")
    torch.manual_seed(99)
    network = mlp(**recipe.network_options)
    save_weights(network, folder / "model.safetensors")
    return folder, network.eval()


def fresh_network():
    return mlp(in_features=6, widths=(5, 8, 7), num_classes=4)


# save and load


@pytest.mark.parametrize("policy", [None, never_leave(3), PatiencePolicy(2, 3)])
def test_own_network_comes_back_with_its_policy(network, tmp_path, policy):
    save(tmp_path / "run", network, policy=policy, class_names=("a", "b", "c", "d"))
    run = load(tmp_path / "run", fresh_network())
    x = torch.randn(3, 6)
    assert torch.equal(run.network(x)[-1], network(x)[-1])
    assert not run.network.training
    assert run.policy == policy
    assert run.class_names == ("a", "b", "c", "d")
    assert run.recipe is None


def test_own_network_has_to_be_given(network, tmp_path):
    save(tmp_path / "run", network)
    with pytest.raises(InvalidArgumentError, match=r"load\(folder, network=...\)"):
        load(tmp_path / "run")


def test_own_network_has_no_recipe_for_commands_that_need_one(network, tmp_path):
    save(tmp_path / "run", network)
    with pytest.raises(ArtifactError, match="from Python"):
        load(tmp_path / "run", fresh_network()).require_recipe()


def test_run_of_a_recipe_builds_its_own_network(trained, recipe):
    folder, network = trained
    run = load(folder)
    x = torch.randn(2, 64)
    assert torch.equal(run.network(x)[-1], network(x)[-1])
    assert run.require_recipe() == recipe
    assert (run.data, run.policy, run.calibration) == ("somewhere", None, None)


def test_loading_a_run_leaves_the_random_numbers_alone(trained):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load(trained[0])
    assert torch.equal(torch.rand(1), expected)


def test_run_by_a_relative_path_outlives_a_change_of_folder(trained, monkeypatch, tmp_path):
    folder, _ = trained
    monkeypatch.chdir(folder.parent)
    run = load(folder.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.folder == folder
    assert load(run.folder).class_names == run.class_names


def test_calibration_stands_beside_the_policy(trained):
    folder, _ = trained
    policy = ThresholdPolicy((0.5,), rule="margin")
    write_policy(folder, policy, calibration={"asked": {"max_drop": 0.01}})
    run = load(folder)
    assert run.policy == policy
    assert run.calibration["asked"] == {"max_drop": 0.01}


def test_policy_for_another_number_of_exits_is_refused(trained):
    write_policy(trained[0], never_leave(3))
    with pytest.raises(ArtifactError, match=r"policy for 2 exits .* Got one for 3"):
        load(trained[0])


# Networks that skip blocks


def fresh_skip_network():
    return skipnet(in_channels=3, widths=(8, 16), blocks=(2, 2), num_classes=5)


@pytest.mark.parametrize("policy", [None, GatePolicy(0.25)])
def test_own_network_with_gates_comes_back_with_its_policy(skip_network, tmp_path, policy):
    save(tmp_path / "run", skip_network, policy=policy)
    run = load(tmp_path / "run", fresh_skip_network())
    assert run.policy == (policy or GatePolicy(0.5))  # as they were trained
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(run.network(images).logits, skip_network(images).logits)


def test_gates_of_a_run_without_a_policy_run_as_they_were_trained(skip_network, tmp_path):
    save(tmp_path / "run", skip_network)
    (tmp_path / "run" / "policy.json").unlink()
    assert load(tmp_path / "run", fresh_skip_network()).policy == GatePolicy(0.5)


def test_policy_for_another_family_is_refused(trained, skip_network, tmp_path):
    save(tmp_path / "skipping", skip_network, policy=never_leave(1))
    with pytest.raises(ArtifactError, match=r"for gates in .* kind 'threshold'"):
        load(tmp_path / "skipping", fresh_skip_network())
    write_policy(trained[0], GatePolicy(0.5))
    with pytest.raises(ArtifactError, match=r"for exits in .* kind 'gates'"):
        load(trained[0])


def test_what_is_about_exits_refuses_a_network_without_them(trained, skip_network, tmp_path):
    assert load(trained[0]).multi_exit.num_exits == 2
    save(tmp_path / "skipping", skip_network)
    with pytest.raises(InvalidArgumentError, match="skips blocks inside"):
        load(tmp_path / "skipping", fresh_skip_network()).multi_exit  # noqa: B018


def edit(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "recipe.json").unlink(), "Expected a run folder"),
        (lambda folder: (folder / "recipe.json").write_text("{"), "damaged"),
        (edit("recipe.json", recipe={}), "damaged"),
        (edit("recipe.json", recipe=[1]), "damaged"),
        (edit("recipe.json", class_names=None), "damaged"),
        (edit("recipe.json", schema_version=SCHEMA_VERSION + 1), "--upgrade"),
        (lambda folder: (folder / "model.safetensors").unlink(), "--resume"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "Cannot read"),
        (edit("policy.json", policy=None), "damaged"),
        (edit("policy.json", schema_version=SCHEMA_VERSION + 1), "--upgrade"),
    ],
)
def test_damaged_run_is_refused(trained, damage, message):
    folder, _ = trained
    write_policy(folder, never_leave(2))
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


# Folders


def test_empty_folder_may_exist(tmp_path):
    assert create_folder(tmp_path) == tmp_path
    assert create_folder(tmp_path / "a" / "b").is_dir()


def test_folder_that_holds_something_is_kept(network, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"Choose another folder, or go on .*resume=True"):
        save(tmp_path, network)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_folder_comes_first(network, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"Expected save\(folder, network\)"):
        save(network, tmp_path / "run")


def test_a_calibration_is_no_policy_but_has_one(network, tmp_path):
    chosen = Calibration(policy=never_leave(3), accuracy=0.5, mean_macs=10.0)
    with pytest.raises(InvalidArgumentError, match=r"Got Calibration: take its \.policy"):
        save(tmp_path / "run", network, policy=chosen)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Choose another folder"):
        create_folder(tmp_path / "file" / "run")


@pytest.mark.parametrize("data", [None, "/somewhere"])
def test_recipe_file_comes_back(recipe, tmp_path, data):
    write_recipe(tmp_path, recipe=recipe, class_names=("a",), data=data)
    assert read_recipe(tmp_path) == (recipe, ("a",), data)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(height=2, width=3, resize="shorter_side", mean=(0.1, 0.2, 0.3)),
        TextPreprocessing(tokenizer='{"model": {}}', max_tokens=9, pad_id=1),
    ],
)
def test_preprocessing_of_an_own_network_comes_back(network, tmp_path, preprocessing):
    save(tmp_path / "run", network, preprocessing=preprocessing)
    assert load(tmp_path / "run", network).preprocessing == preprocessing
    assert save_pretrained(tmp_path / "run", tmp_path / "shared").is_dir()
    assert load(tmp_path / "shared", network).preprocessing == preprocessing


# Data of a recipe


def test_train_and_calibration_are_cut_from_train_and_test_is_whole(recipe):
    train, names, train_print = load_batches(recipe, "train")
    calibration, _, calibration_print = load_batches(recipe, CALIBRATION_SPLIT)
    test, _, test_print = load_batches(recipe, "test")
    assert set(train.rows_N.tolist()).isdisjoint(calibration.rows_N.tolist())
    assert len(train) + len(calibration) == 1797 - len(test)
    assert len(calibration) / (1797 - len(test)) == pytest.approx(0.2, abs=0.01)
    assert names == tuple("0123456789")
    assert len({train_print, calibration_print, test_print}) == 3


def test_fingerprint_repeats_and_follows_the_seed(recipe):
    first = load_batches(recipe, CALIBRATION_SPLIT)[2]
    assert load_batches(recipe, CALIBRATION_SPLIT)[2] == first
    other = replace(recipe, fit=replace(recipe.fit, seed=1))
    assert load_batches(other, CALIBRATION_SPLIT)[2] != first


def test_only_training_images_are_augmented(recipe):
    augmented = replace(recipe, augment=lambda images: images + 10)
    assert load_batches(augmented, "train")[0][0][0].min() >= 9
    for split in (CALIBRATION_SPLIT, "test"):
        assert load_batches(augmented, split)[0][0][0].max() <= 1


def test_recipe_without_calibration_data_says_what_to_do(recipe):
    whole = replace(recipe, calibration_share=0.0)
    assert len(load_batches(whole, "train")[0]) == 1347
    with pytest.raises(
        InvalidArgumentError, match="thresholds by hand, or train with calibration_share"
    ):
        load_batches(whole, CALIBRATION_SPLIT)


def test_missing_data_of_a_recipe(recipe, tmp_path):
    with pytest.raises(DataError, match="not found"):
        load_batches(recipe, "train", str(tmp_path))


def test_data_that_trained_or_chose_thresholds_is_in_sample(trained, recipe):
    folder, _ = trained
    fingerprint = load_batches(recipe, CALIBRATION_SPLIT)[2]
    about = {
        "name": "digits",
        "split": CALIBRATION_SPLIT,
        "num_samples": 9,
        "class_prior": "uniform",
    }
    write_policy(folder, never_leave(2), calibration={"data": {**about, "sha256": fingerprint}})
    run = load(folder)
    assert is_in_sample(run, CALIBRATION_SPLIT, fingerprint)
    assert is_in_sample(run, "train", load_batches(recipe, "train")[2])
    assert not is_in_sample(run, "test", load_batches(recipe, "test")[2])


@pytest.mark.parametrize("calibration", [None, {}, {"data": None}])
def test_thresholds_by_hand_make_nothing_but_train_in_sample(trained, calibration):
    folder, _ = trained
    write_policy(folder, never_leave(2), calibration=calibration)
    assert not is_in_sample(load(folder), "calibration", "any")
    assert is_in_sample(load(folder), "train", "any")
