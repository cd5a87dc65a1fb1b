import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from offramp.calibration.collect import ExitLogits, collect_from_session
from offramp.calibration.controller import fit_controller
from offramp.calibration.thresholds import confidences
from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError
from offramp.exporting.bundle import export
from offramp.families.exits import AdaptiveRunner
from offramp.policy.as_dict import policy_from_dict, policy_to_dict
from offramp.policy.controller import ControllerPolicy, ExitScorer, count_inputs, scorer_inputs
from offramp.policy.policies import Setting
from offramp.runtime import Session, read_bundle
from offramp.zoo.mlp import mlp

INF, NAN = math.inf, math.nan
X = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))


def scorer(num_inputs: int, *, hidden: int = 2, **given) -> ExitScorer:
    """A scorer that says 0 but for what is given."""
    nothing = {
        "mean_F": torch.zeros(num_inputs),
        "scale_F": torch.ones(num_inputs),
        "hidden_FH": torch.zeros(num_inputs, hidden),
        "hidden_bias_H": torch.zeros(hidden),
        "direct_F": torch.zeros(num_inputs),
        "score_H": torch.zeros(hidden),
        "score_bias": torch.tensor(0.0),
    }
    return ExitScorer(**nothing | given)


def controller(num_classes: int = 3, num_exits: int = 3, **given) -> ControllerPolicy:
    scorers = tuple(
        scorer(count_inputs(k, num_classes=num_classes), **given) for k in range(num_exits - 1)
    )
    return ControllerPolicy((0.5,) * (num_exits - 1), scorers)


def random_controller(num_classes: int = 4, num_exits: int = 3) -> ControllerPolicy:
    generator = torch.Generator().manual_seed(3)
    scorers = []
    for k in range(num_exits - 1):
        blank = scorer(count_inputs(k, num_classes=num_classes), hidden=5)
        drawn = {
            name: torch.randn(tensor.shape, generator=generator) / 2
            for name, tensor in blank.tensors.items()
        }
        scorers.append(ExitScorer(**drawn | {"scale_F": drawn["scale_F"].abs() + 0.1}))
    return ControllerPolicy((0.5,) * (num_exits - 1), tuple(scorers))


# ExitScorer


def test_scorer_by_hand():
    one = scorer(
        2,
        hidden=1,
        mean_F=torch.tensor([1.0, 2.0]),
        scale_F=torch.tensor([1.0, 2.0]),
        hidden_FH=torch.tensor([[1.0], [1.0]]),
        hidden_bias_H=torch.tensor([0.5]),
        direct_F=torch.tensor([0.0, 3.0]),
        score_H=torch.tensor([2.0]),
        score_bias=torch.tensor(0.1),
    )
    found = one.score(torch.tensor([[2.0, 4.0], [NAN, 4.0]]))  # standardised: 1 and 1, 0 and 1
    assert found.tolist() == pytest.approx([2 * math.tanh(2.5) + 3.1, 2 * math.tanh(1.5) + 3.1])
    assert one.macs == 2 + 1 + 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean_F": torch.zeros(3)}, r"'mean_F' parameter must be of shape \(2,\). Got \(3,\)"),
        ({"hidden_FH": torch.zeros(2)}, r"'hidden_FH' parameter must be of shape \(F, H\)"),
        ({"score_bias": torch.zeros(1)}, "'score_bias'"),
        ({"scale_F": torch.zeros(2)}, "positive scales"),
        ({"direct_F": torch.tensor([0.0, NAN])}, "finite"),
    ],
)
def test_scorer_whose_numbers_do_not_fit_is_refused(given, message):
    with pytest.raises(InvalidArgumentError, match=message):
        scorer(2, **given)


# What a scorer sees


def test_inputs_of_the_first_exit_by_hand():
    inputs, (p, known) = scorer_inputs(0, torch.tensor([[0.75, 0.25]]).log(), (), num_early=2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    seen = [1 - entropy, 0.75, 0.5]
    doubts = [-math.log(1 - confidence + 1e-3) for confidence in seen]
    assert inputs[0].tolist() == pytest.approx([0.75, 0.25, *seen, *doubts], abs=1e-5)
    assert p[0].tolist() == pytest.approx([0.75, 0.25])
    assert known[0, :3].tolist() == pytest.approx(seen, abs=1e-5)
    assert known[0, 3:].isnan().all()


def test_agreement_with_the_exit_before_is_seen():
    before, now = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.1, 0.9]])
    _, state = scorer_inputs(0, before.log(), (), num_early=2)
    inputs, _ = scorer_inputs(1, now.log(), state, num_early=2)
    assert inputs[0, -2:].tolist() == pytest.approx([0.6 * 0.1 + 0.4 * 0.9, 0.4])
    assert inputs.shape[1] == count_inputs(1, num_classes=2)


def test_state_has_one_layout_whichever_exits_are_off():
    logits = torch.randn(3, 5, 4)
    for asked in ((0, 1, 2), (1, 2), (0, 2), (2,)):
        state = ()
        for k in asked:
            inputs, state = scorer_inputs(k, logits[k], state, num_early=3)
            assert inputs.shape == (5, count_inputs(k, num_classes=4))
            assert [tuple(tensor.shape) for tensor in state] == [(5, 4), (5, 9)]
        is_known = [not state[1][:, 3 * k].isnan().any() for k in range(3)]
        assert is_known == [k in asked for k in range(3)]


# ControllerPolicy


def test_confidence_grows_with_the_score_and_half_means_that_leaving_pays():
    logits = torch.randn(4, 3)
    for bias, expected in ((-2.0, 0.018), (0.0, 0.5), (1.0, 0.881)):
        policy = controller(score_bias=torch.tensor(bias))
        leave, confidence, _ = policy.step(0, logits, ())
        assert confidence.tolist() == pytest.approx([expected] * 4, abs=1e-3)
        assert leave.tolist() == [bias >= 0] * 4


def test_nan_never_leaves_before_the_final_exit_and_is_not_known_after():
    policy = random_controller().with_thresholds((0.0, 0.0))
    broken, whole = torch.tensor([[NAN, 0.0, 0.0, 1.0]]), torch.tensor([[3.0, 0.0, 0.0, 1.0]])
    leave, confidence, state = policy.step(0, broken, ())
    assert not leave.any()
    assert confidence.isnan().all()
    leave, confidence, _ = policy.step(1, whole, state)
    assert leave.all()
    torch.testing.assert_close(confidence, policy.step(1, whole, ())[1])
    assert policy.step(2, broken, state)[0].all()


def test_final_exit_lets_everyone_go_with_the_largest_probability():
    leave, confidence, _ = controller(2).step(2, torch.tensor([[0.3, 0.7]]).log(), ())
    assert leave.all()
    assert confidence.tolist() == pytest.approx([0.7])


def test_temperature_divides_the_logits():
    policy, logits = random_controller(), torch.randn(5, 4)
    _, found, _ = policy.decide(0, logits, (), Setting(2.0, 0.5))
    _, expected, _ = policy.decide(0, logits / 2, (), Setting(1.0, 0.5))
    assert torch.equal(found, expected)


def test_an_exit_that_is_off_is_not_asked():
    logits = torch.randn(3, 50, 4)
    said = ExitLogits(
        logits_KNC=logits, labels_N=torch.zeros(50, dtype=torch.long), costs=_costs_of_three()
    )
    policy = random_controller()
    without = confidences(said, policy, frozenset({0}))
    assert np.isnan(without[0]).all()
    changed = replace(said, logits_KNC=torch.cat([torch.randn(1, 50, 4), logits[1:]]))
    np.testing.assert_array_equal(confidences(changed, policy, frozenset({0})), without)
    assert not np.allclose(without[1], confidences(said, policy)[1])


def _costs_of_three():
    return mlp(in_features=6, widths=(5, 8, 7), num_classes=4).costs(X)


@pytest.mark.parametrize(
    ("thresholds", "inputs", "message"),
    [
        ((0.5,), (), "must hold 1 scorers"),
        ((1.5,), (10,), "in .0, 1., or inf"),
        ((0.5,), (7,), "scorer of exit 0 must have 7 inputs"),
        ((0.5, 0.5), (10, 12), "scorer of exit 1 must have 18 inputs.*Got 12"),
    ],
)
def test_policy_whose_parts_do_not_fit_is_refused(thresholds, inputs, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ControllerPolicy(thresholds, tuple(scorer(n) for n in inputs))


def test_logits_of_other_classes_are_refused():
    with pytest.raises(ShapeError, match="of 3 classes"):
        controller(3).step(0, torch.zeros(1, 5), ())


# Dictionaries


def test_policy_survives_json_to_the_bit():
    policy = random_controller().with_thresholds((0.25, INF))
    text = json.dumps(policy_to_dict(policy), allow_nan=False)
    read = policy_from_dict(json.loads(text))
    assert read == policy
    assert hash(read) == hash(policy)
    assert read != random_controller()
    assert policy.scorers[0] != policy.scorers[1]
    assert policy.scorers[0] != "scorer"
    assert ControllerPolicy((), ()) == policy_from_dict(policy_to_dict(ControllerPolicy((), ())))


@pytest.mark.parametrize(
    "damage",
    [
        {"scorers": None},
        {"scorers": []},
        {"scorers": [{}, {}]},
        {"scorers": "ab"},
        {"thresholds": [0.5, 2.0]},
        {"mean_F": [1.0]},
        {"mean_F": ["x"] * 10},
        {"hidden_FH": [[1.0], [1.0, 2.0]]},
        {"mean_F": [True] * 10},
        {"hidden_FH": [[[1.0]]]},
        {"colour": 1.0},
        {"score_bias": None},
        {"score_bias": 10**39},
        {"score_bias": "0"},
        {"score_bias": 10**400},
        {"score_bias": INF},
    ],
)
def test_damaged_controller_is_refused(damage):
    content = policy_to_dict(random_controller())
    (name,) = damage
    if name in content:
        content |= damage
    else:
        content["scorers"][0] |= damage
    with pytest.raises(ArtifactError, match="Expected a policy, got a damaged one"):
        policy_from_dict(content)


# In a bundle


@pytest.fixture(scope="module", params=[(), (0,), (1,)], ids=["all on", "0 off", "1 off"])
def exported(request, tmp_path_factory):
    """A network, a controller fitted to it, and the bundle that was written of them."""
    torch.manual_seed(0)
    network = mlp(in_features=6, widths=(5, 8, 7), num_classes=4).eval()
    with torch.no_grad():
        logits = torch.stack(network(X))
    labels = logits[-1].argmax(-1)
    said = ExitLogits(logits_KNC=logits, labels_N=labels, costs=network.costs(X))
    policy = fit_controller(said)
    off = frozenset(request.param)
    medians = np.median(confidences(said, policy, off), axis=1)
    policy = policy.with_thresholds([INF if k in off else medians[k] for k in range(2)])
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export(network, policy, folder, X, plain=False)
    return network, policy, folder


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_session_answers_as_the_runner_does(exported, batch_size):
    network, policy, folder = exported
    session, runner = Session(folder), AdaptiveRunner(network, policy)
    left = set()
    for batch in X.split(batch_size)[:20]:
        found, expected = session.run(batch), runner.run(batch)
        assert found.exit_index.tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(found.output, expected.output, atol=1e-5)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)
        left.update(expected.exit_index.tolist())
    assert left == {0, 1, 2} - policy.off_exits


def test_bundle_hands_the_state_on(exported):
    _, policy, folder = exported
    bundle = read_bundle(folder)
    assert [(s.dtype, s.sample_shape) for s in bundle.steps[-1].state] == [
        ("float32", (4,)),
        ("float32", (6,)),
    ]
    assert policy_from_dict(bundle.policy) == policy


def test_heads_of_a_bundle_are_collected_without_what_deciding_takes(exported):
    network, policy, folder = exported
    found = collect_from_session(Session(folder), [(X, torch.zeros(len(X), dtype=torch.int64))])
    on = [k for k in range(3) if not policy.is_off(k)]
    assert policy.macs(on[0]) > 0
    assert found.costs.head_macs == tuple(network.costs(X).head_macs[k] for k in on)


def test_nan_goes_to_the_end_in_a_bundle_too(exported):
    _, _, folder = exported
    spoilt = X[:6].clone()
    spoilt[:3] = NAN
    assert Session(folder).run(spoilt).exit_index[:3].tolist() == [2, 2, 2]
    assert Session(folder).run(spoilt[:1]).exit_index.tolist() == [2]
