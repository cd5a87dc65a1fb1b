import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.metrics import auroc, brier_score, reliability

NAN = math.nan


def answers(seed: int, *, num_samples: int = 40, num_classes: int = 3):
    """Random probabilities without ties, and labels that often follow them."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    p = z.softmax(-1)
    return p, torch.multinomial(p, 1, generator=generator)[:, 0]


def sure(*confidence: float) -> torch.Tensor:
    """Rows of two classes whose class 0 has the given probability."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1)


def auroc_of_answers(p, labels, weights=None):
    return auroc(p.amax(-1), p.argmax(-1) == labels, weights)


FIGURES = {
    "brier": brier_score,
    "ece": lambda *given: reliability(*given).ece,
    "auroc": auroc_of_answers,
}
every_figure = pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
seeds = st.integers(0, 2**16)


# Brier score


def test_brier_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    # 0.09 + 0.04 + 0.01 and 0.01 + 0.49 + 0.36.
    assert brier_score(p, torch.tensor([0, 1])) == pytest.approx((0.14 + 0.86) / 2)


@pytest.mark.parametrize(("label", "score"), [(0, 0), (1, 2)])
def test_brier_extremes(label, score):
    assert brier_score(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([label])) == score


@given(seeds)
def test_brier_of_the_true_probabilities_is_least(seed):
    p, _ = answers(seed, num_samples=1)
    told, _ = answers(seed + 1, num_samples=1)

    def expected(told_N3):
        return sum(float(p[0, c]) * brier_score(told_N3, torch.tensor([c])) for c in range(3))

    assert expected(p) == pytest.approx(1 - float(p.square().sum()))
    assert expected(p) < expected(told)


# Reliability


def test_reliability_by_hand():
    p = sure(0.55, 0.65, 0.9, 0.95, 0.2)  # the last one answers class 1, at 0.8
    found = reliability(p, torch.tensor([0, 1, 0, 0, 1]), num_bins=4)
    assert found.edges == (0, 0.25, 0.5, 0.75, 1)
    assert found.counts == (0, 0, 2, 3)
    assert found.confidence == (None, None, pytest.approx(0.6), pytest.approx(2.65 / 3))
    assert found.accuracy == (None, None, 0.5, 1)
    assert found.ece == pytest.approx((2 * 0.1 + 3 * (1 - 2.65 / 3)) / 5)


@pytest.mark.parametrize(
    ("confidence", "expected"), [(0.5, 1), (0.5 + 1e-9, 2), (0.75, 2), (0.75 + 1e-9, 3), (1.0, 3)]
)
def test_bins_hold_their_upper_edge(confidence, expected):
    counts = reliability(sure(confidence), torch.tensor([0]), num_bins=4).counts
    assert counts.index(1) == expected


@pytest.mark.parametrize("num_bins", range(2, 31))
def test_every_edge_is_in_the_bin_below_it(num_bins):
    edges = reliability(sure(1.0), torch.tensor([0]), num_bins=num_bins).edges
    top = [edge for edge in edges if edge >= 0.5]
    found = reliability(sure(*top), torch.zeros(len(top), dtype=torch.int64), num_bins=num_bins)
    assert found.counts == tuple(float(edge >= 0.5) for edge in edges[1:])


def test_rounding_beyond_one_is_in_the_last_bin():
    assert reliability(sure(1 + 5e-7), torch.tensor([0]), num_bins=2).counts == (0, 1)


def test_one_bin_compares_mean_confidence_with_accuracy():
    found = reliability(sure(0.9, 0.7), torch.tensor([0, 1]), num_bins=1)
    assert (found.counts, found.accuracy) == ((2,), (0.5,))
    assert found.ece == pytest.approx(0.3)


@pytest.mark.parametrize(("label", "ece"), [(0, 0.1), (1, 0.9)])
def test_all_right_and_all_wrong(label, ece):
    labels = torch.full((5,), label)
    assert reliability(sure(*[0.9] * 5), labels).ece == pytest.approx(ece)


def test_labels_drawn_from_the_probabilities_are_calibrated_and_surer_ones_are_not():
    p, labels = answers(0, num_samples=50_000)
    surer = p.log().mul(2).softmax(-1)
    assert reliability(p, labels).ece < 0.01
    assert reliability(surer, labels).ece > 0.05


@pytest.mark.parametrize("num_bins", [0, -1])
def test_no_bins_are_refused(num_bins):
    with pytest.raises(InvalidArgumentError, match=f"at least 1. Got {num_bins}"):
        reliability(sure(0.9), torch.tensor([0]), num_bins=num_bins)


def test_reliability_is_json():
    found = reliability(sure(0.9), torch.tensor([0]), num_bins=2)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {
        "ece": pytest.approx(0.1),
        "edges": [0, 0.5, 1],
        "counts": [0, 1],
        "confidence": [None, 0.9],
        "accuracy": [None, 1],
    }


# AUROC


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.9, 0.8, 0.1], [True, True, False], 1),
        ([0.1, 0.2, 0.9], [True, True, False], 0),
        ([0.5, 0.5, 0.5], [True, False, True], 0.5),
        ([0.9, 0.6, 0.4, 0.6], [True, True, False, False], 3.5 / 4),
        ([0.7, NAN, 0.0], [True, False, True], 1),
        ([0.7, NAN, 0.0], [False, True, False], 0),
        ([NAN, NAN], [True, False], 0.5),
    ],
)
def test_auroc_by_hand(confidence, correct, expected):
    found = auroc(torch.tensor(confidence), torch.tensor(correct))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("is_right", [True, False])
def test_auroc_of_all_right_or_all_wrong_is_none(is_right):
    confidence, correct = torch.tensor([0.9, 0.2, 0.4]), torch.full((3,), is_right)
    assert auroc(confidence, correct) is None
    correct[1] = not is_right
    assert auroc(confidence, correct) is not None
    assert auroc(confidence, correct, torch.tensor([1, 0, 1])) is None


@given(seeds)
def test_auroc_is_the_share_of_pairs_in_order(seed):
    p, labels = answers(seed, num_samples=20)
    confidence, correct = (p.amax(-1) * 8).round() / 8, p.argmax(-1) == labels
    pairs = confidence[correct][:, None] - confidence[~correct]
    if pairs.numel():
        expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
        assert auroc(confidence, correct) == pytest.approx(float(expected))


@pytest.mark.parametrize("outside", [-0.1, 1.1, math.inf])
def test_confidence_out_of_range_is_refused(outside):
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\], or NaN"):
        auroc(torch.tensor([NAN, 0.5, outside]), torch.tensor([True, False, True]))


def test_confidences_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"Got \(3,\) and \(2,\)"):
        auroc(torch.zeros(3), torch.zeros(2, dtype=torch.bool))


# All of them


@every_figure
@given(seed=seeds)
def test_weight_is_repetition(figure, seed):
    p, labels = answers(seed)
    times = torch.randint(0, 4, labels.shape, generator=torch.Generator().manual_seed(seed))
    times[0] = 1
    repeated = figure(p.repeat_interleave(times, 0), labels.repeat_interleave(times))
    assert figure(p, labels, times) == pytest.approx(repeated)
    assert figure(p, labels, times / 7) == pytest.approx(repeated)


@every_figure
@given(seed=seeds)
def test_order_of_samples_and_names_of_classes_do_not_matter(figure, seed):
    p, labels = answers(seed)
    shuffled, named = torch.randperm(40), torch.randperm(3)
    weights = torch.rand(40)
    expected = figure(p, labels, weights)
    assert figure(p[shuffled], labels[shuffled], weights[shuffled]) == pytest.approx(expected)
    assert figure(p[:, named], named.argsort()[labels], weights) == pytest.approx(expected)


@every_figure
def test_single_precision_and_gradients_are_no_hindrance(figure):
    p, labels = answers(0)
    assert figure(p.float().requires_grad_(), labels) == pytest.approx(figure(p, labels), abs=1e-6)


@pytest.mark.parametrize("figure", [brier_score, reliability])
@pytest.mark.parametrize(
    "row", [[NAN] * 3, [2.0, 0.0, 0.0], [0.6, 0.6, -0.2], [0.3] * 3, [0.6] * 3]
)
def test_what_is_no_distribution_is_refused(figure, row):
    with pytest.raises(InvalidArgumentError, match="Got row 1 from"):
        figure(torch.tensor([[0.5, 0.5, 0.0], row]), torch.tensor([0, 1]))


@pytest.mark.parametrize("figure", [brier_score, reliability])
@pytest.mark.parametrize("label", [-1, 2])
def test_label_that_is_no_class_is_refused(figure, label):
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\], one of 2 classes"):
        figure(sure(0.9), torch.tensor([label]))


@pytest.mark.parametrize("figure", [brier_score, reliability])
@pytest.mark.parametrize(("p_shape", "num_labels"), [((4, 2), 3), ((4,), 4), ((1, 4, 2), 4)])
def test_probabilities_of_another_shape_are_refused(figure, p_shape, num_labels):
    with pytest.raises(ShapeError, match=r"shape \(N, C\) and labels of shape \(N,\)"):
        figure(torch.ones(p_shape) / 2, torch.zeros(num_labels, dtype=torch.int64))


@every_figure
@pytest.mark.parametrize("weight", [-1.0, NAN, math.inf])
def test_weight_that_is_none_is_refused(figure, weight):
    with pytest.raises(InvalidArgumentError, match="finite and not negative"):
        figure(sure(0.9, 0.8), torch.tensor([0, 1]), torch.tensor([1.0, weight]))


@every_figure
def test_weights_of_another_number_are_refused(figure):
    with pytest.raises(ShapeError, match=r"weights of shape \(2,\)"):
        figure(sure(0.9, 0.8), torch.tensor([0, 1]), torch.ones(3))


@every_figure
@pytest.mark.parametrize("num_samples", [0, 2])
def test_samples_that_weigh_nothing_are_refused(figure, num_samples):
    p, labels = sure(0.9, 0.8)[:num_samples], torch.tensor([0, 1])[:num_samples]
    with pytest.raises(InvalidArgumentError, match="at least one sample of positive weight"):
        figure(p, labels, torch.zeros(num_samples))
