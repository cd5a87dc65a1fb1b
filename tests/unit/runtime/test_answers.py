import math

import numpy as np
import pytest

from offramp.results import AdaptiveResult
from offramp.runtime.answers import describe_answers, rule_in_words

ENTROPY = {"kind": "threshold", "rule": "entropy", "thresholds": [0.9], "temperatures": None}


def result(output, **parts):
    output = np.array(output, dtype=np.float32)
    size = len(output)
    standard = {
        "exit_index": np.zeros(size, dtype=np.int64),
        "confidence": np.full(size, 0.75, dtype=np.float32),
        "macs": np.full(size, 30),
    }
    return AdaptiveResult(output=output, **{**standard, **parts})


def describe(answered, policy=ENTROPY, names=("no", "yes"), plain=120, **more):
    plain_macs_B = np.full(len(answered.output), plain)
    return describe_answers(
        answered, policy=policy, class_names=names, plain_macs_B=plain_macs_B, **more
    )


def test_line_tells_class_probability_confidence_exit_and_share():
    (found,) = describe(result([[0.0, math.log(3)]]))
    assert str(found) == (
        "yes  probability 0.750  confidence 0.750 (rule entropy)  exit 0  "
        "25.00 % of the plain network's MACs"
    )


def test_probability_is_that_at_the_temperature_of_the_exit():
    answered = result([[0.0, 2.0], [0.0, 2.0]], exit_index=np.array([0, 1]))
    policy = {**ENTROPY, "temperatures": [1.0, 2.0]}
    found = [answer.probability for answer in describe(answered, policy)]
    assert found == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))])


def test_probability_of_large_logits_is_one():
    (found,) = describe(result([[-1e4, 1e4]]))
    assert found.probability == 1.0


def test_each_sample_has_its_own_plain_macs():
    answered = result([[0.0, 1.0]] * 2)
    found = describe_answers(
        answered, policy=ENTROPY, class_names=(), plain_macs_B=np.array([60, 300])
    )
    assert [answer.macs_share for answer in found] == [0.5, 0.1]
    assert [answer.label for answer in found] == ["1", "1"]


def test_class_token_counts_in_the_depth():
    tokens = np.array([[5, 4, 1]])
    (found,) = describe(result([[0.0, 1.0]], tokens=tokens), {"kind": "halting", "threshold": 0.9})
    assert (found.way, found.rule) == ("2.00 of 3 layers a token", "max_probability")


def test_blocks_are_counted():
    blocks = np.array([[True, False, True]])
    (found,) = describe(result([[0.0, 1.0]], blocks=blocks), {"kind": "gates", "threshold": 0.5})
    assert found.way == "2 of 3 gated blocks"


def test_shares_of_pixels_are_those_of_the_image_not_of_its_cells():
    # Two cells, three pixels: the one in the middle lies between them.
    maps = np.array([[[[9.0, -9.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2)
    policy = {"kind": "dense", "rule": "pixel_share", "pixel_threshold": 0.9, "temperatures": None}
    (found,) = describe(result(maps), policy, size=(1, 3))
    assert found.label == "no 66.67 %, yes 33.33 %"
    assert found.probability is None
    assert found.rule == "pixel_share of pixels surer than 0.9"
    assert "probability" not in str(found)


def test_rules_without_a_name_are_named_by_their_kind():
    assert rule_in_words({"kind": "controller", "thresholds": [0.5]}) == "controller"
