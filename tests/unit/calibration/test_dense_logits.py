import itertools
import math

import numpy as np
import pytest
import torch

from offramp import (
    AgreementPolicy,
    DenseLogits,
    DensePolicy,
    InfeasibleTargetError,
    InvalidArgumentError,
    NotCalibratedError,
    ThresholdPolicy,
    calibrate,
    calibrate_with_guarantee,
    collect,
    evaluate,
    fit_temperatures,
    frontier,
)
from offramp.calibration.collect import write_logits
from offramp.calibration.thresholds import confidences
from offramp.data.images import Normalisation, make_loader
from offramp.data.masks import MaskBatches
from offramp.errors import ShapeError
from offramp.families.exits import AdaptiveRunner
from offramp.measure.dense import confusion_matrices, label_maps, mean_iou
from offramp.measure.outputs import IGNORED_LABEL
from offramp.policy.confidence import DENSE_RULES
from offramp.zoo.segmentation import segmentation

INF = math.inf
CLASSES = 3
IMAGES = 10


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = segmentation(num_classes=CLASSES, widths=(4, 6), stages=3, head_width=4).eval()
    with torch.no_grad():
        for exit_head in network.exits:
            exit_head.head[-2].weight *= 20  # as sure as a network that has learnt something
    return network


@pytest.fixture(scope="module")
def loader():
    torch.manual_seed(1)
    masks = torch.randint(CLASSES, (IMAGES, 16, 20))
    masks[:, 3:5] = IGNORED_LABEL
    contrast = torch.linspace(0.1, 1, IMAGES)[:, None, None, None]
    images = (contrast * torch.randint(256, (IMAGES, 3, 16, 20))).to(torch.uint8)
    normalise = Normalisation(mean=0.5, deviation=0.3)
    batches = MaskBatches(images, masks.to(torch.uint8), normalise=normalise)
    return make_loader(batches, batch_size=4)


@pytest.fixture(scope="module")
def logits(network, loader):
    return collect(network, loader)


def test_collect_keeps_half_precision_and_counts_at_full(network, loader, logits):
    assert isinstance(logits, DenseLogits)
    assert logits.logits_KNC.dtype == torch.float16
    assert logits.logits_KNC.shape == (3, IMAGES, CLASSES, 8, 10)
    images, masks = loader.dataset.__getitems__(list(range(IMAGES)))
    for k, output in enumerate(network(images)):
        counts = confusion_matrices(label_maps(output, (16, 20)), masks, num_classes=CLASSES)
        assert torch.equal(logits.confusion_KNCC[k], counts)
        assert logits.quality_K[k] == pytest.approx(mean_iou(counts.sum(0)).item())


def test_figures_come_from_the_sum_of_matrices(logits):
    exit_N = np.arange(IMAGES) % 3
    chosen = logits.confusion_KNCC[torch.from_numpy(exit_N), torch.arange(IMAGES)]
    figures = logits.figures(exit_N)
    assert figures.quality == figures.mean_iou == pytest.approx(mean_iou(chosen.sum(0)).item())
    assert figures.accuracy == pytest.approx((chosen.sum(0).diagonal().sum() / chosen.sum()).item())


def test_taken_images_keep_what_belongs_to_them(logits):
    taken = logits.take([4, 4, 7])
    assert torch.equal(taken.confusion_KNCC, logits.confusion_KNCC[:, [4, 4, 7]])
    assert torch.equal(taken.labels_N, logits.labels_N[[4, 4, 7]])


@pytest.fixture(scope="module")
def pixel_threshold(logits):
    """What half of the pixels reach."""
    return logits.logits_KNC.float().softmax(2).amax(2).median().item()


@pytest.mark.parametrize("rule", DENSE_RULES)
def test_confidences_are_those_of_the_rule(logits, rule, pixel_threshold):
    policy = DensePolicy((0.2, 0.3), rule=rule, pixel_threshold=pixel_threshold)
    confidence_KN = confidences(logits, policy)
    assert len(np.unique(confidence_KN)) > IMAGES / 2
    for k, logits_NChw in enumerate(logits.logits_KNC):
        expected_N = DENSE_RULES[rule](logits_NChw, pixel_threshold)
        np.testing.assert_allclose(confidence_KN[k], expected_N, atol=1e-6)


@pytest.mark.parametrize("rule", DENSE_RULES)
def test_a_drop_of_mean_iou_is_kept_at_the_least_cost_of_all_thresholds(logits, rule):
    most = 0.01
    chosen = calibrate(logits, max_drop=most, rule=rule)
    policy = chosen.policy  # with the threshold of pixels that it chose, if it counts them
    confidence_KN = confidences(logits, policy)
    best = INF
    cuts = [[INF, *np.unique(confidence_KN[k])] for k in (0, 1)]
    for thresholds in itertools.product(*cuts):
        reached = logits.measure(policy.with_thresholds(thresholds))
        if reached.mean_iou >= logits.quality_K[-1] - most:
            best = min(best, reached.mean_macs)
    assert chosen.mean_iou >= logits.quality_K[-1] - most - 1e-9
    assert chosen.mean_macs <= best * 1.05


def test_both_thresholds_are_chosen(logits):
    chosen = calibrate(logits, max_drop=0.005)
    assert chosen.policy.rule == "pixel_share"
    for pixel_threshold in (0.5, 0.7, 0.9):
        fixed = DensePolicy((INF, INF), pixel_threshold=pixel_threshold)
        assert chosen.mean_macs <= calibrate(logits, max_drop=0.005, rule=fixed).mean_macs
    assert calibrate(logits, budget_share=0.7).mean_macs <= 0.7 * logits.costs.plain_macs


def test_agreement_says_what_the_least_is(logits):
    least = logits.measure(AgreementPolicy((0, 0))).mean_macs
    assert least < logits.costs.plain_macs
    with pytest.raises(InfeasibleTargetError) as caught:
        calibrate(logits, budget_macs=least - 1, rule="agreement")
    assert caught.value.best_achievable == pytest.approx(least)
    assert calibrate(logits, budget_macs=least, rule="agreement").mean_macs == least
    assert len(frontier(logits, logits, num_points=4, rule="agreement").points) > 1


def test_agreement_keeps_its_memory(logits):
    chosen = calibrate(logits, budget_share=0.9, rule="agreement")
    assert chosen.mean_macs <= 0.9 * logits.costs.plain_macs
    assert logits.measure(chosen.policy) == chosen


def test_calibration_is_what_runs(network, loader, logits):
    policy = calibrate(logits, budget_share=0.7).policy
    expected = logits.measure(policy)
    found = evaluate(AdaptiveRunner(network, policy), loader, logits)
    assert found.mean_macs == pytest.approx(expected.mean_macs)
    assert found.mean_iou == pytest.approx(expected.mean_iou)
    assert found.accuracy == pytest.approx(expected.accuracy)
    assert found.final_exit_mean_iou == pytest.approx(logits.quality_K[-1])
    assert [row["mean_iou"] for row in found.to_dict()["exits"]] == pytest.approx(logits.quality_K)


@pytest.mark.parametrize("rule", DENSE_RULES)
def test_thresholds_inside_the_range_let_the_same_images_leave(
    network, loader, logits, rule, pixel_threshold
):
    policy = DensePolicy((0, 0), rule=rule, pixel_threshold=pixel_threshold)
    middle_K = np.median(confidences(logits, policy), axis=1)
    policy = policy.with_thresholds(tuple(middle_K[:2]))  # of ten: between two of them
    expected = logits.measure(policy)
    found = evaluate(AdaptiveRunner(network, policy), loader, logits)
    assert found.exits[0].share == 0.5
    assert found.mean_macs == pytest.approx(expected.mean_macs)
    assert found.mean_iou == pytest.approx(expected.mean_iou)


def test_frontier_is_in_mean_iou(logits):
    found = frontier(logits, logits, num_points=4).to_dict()
    assert found["exits"][1]["mean_iou"] == pytest.approx(logits.quality_K[1])
    assert all(point["pixel_threshold"] is not None for point in found["points"])
    assert min(logits.quality_K) <= found["area"] <= max(logits.quality_K) + 0.1


def test_temperatures_go_by_the_pixels_that_have_a_class(logits):
    temperatures = fit_temperatures(logits)
    assert all(t > 1 for t in temperatures)  # labels are noise: any sureness is too much


def test_a_guarantee_is_about_pixels(logits):
    loose = calibrate_with_guarantee(
        logits, max_risk=0.9, risk="pixel_error_gap", guarantee=0.5, rule="mean_entropy"
    )
    assert loose.guarantee.num_tested == 7
    assert "of an image's pixels wrong" in loose.guarantee.sentence("scenes")
    with pytest.raises(InfeasibleTargetError, match=r"about .* would do"):
        calibrate_with_guarantee(logits, max_risk=0.01, risk="pixel_error_gap")
    with pytest.raises(InvalidArgumentError, match="mean IoU is no mean over images"):
        calibrate_with_guarantee(logits, max_risk=0.01)


@pytest.mark.parametrize("rule", ["entropy", "max_probability"])
def test_rules_of_whole_samples_are_refused(logits, rule):
    with pytest.raises(InvalidArgumentError, match="must be one of pixel_share"):
        calibrate(logits, max_drop=0.01, rule=rule)


def test_logits_of_whole_samples_are_no_dense_ones(logits):
    with pytest.raises(ShapeError, match=r"\(K, N, C, H, W\)"):
        DenseLogits(
            logits_KNC=logits.logits_KNC[..., 0, 0],
            labels_N=logits.labels_N,
            costs=logits.costs,
            confusion_KNCC=logits.confusion_KNCC,
        )


def test_logits_of_every_pixel_are_not_kept_in_a_file(logits, tmp_path):
    with pytest.raises(InvalidArgumentError, match="those of every pixel"):
        write_logits(tmp_path / "logits", logits)
    assert not list(tmp_path.iterdir())


def test_a_policy_for_whole_samples_is_refused_where_pixels_have_classes(network, loader):
    images, _ = loader.dataset.__getitems__([0, 1, 2])
    with pytest.raises(ShapeError, match="of one for every pixel DensePolicy is sure"):
        AdaptiveRunner(network, ThresholdPolicy((0.9, 0.9))).run(images)
    with pytest.raises(NotCalibratedError, match="DensePolicy"):
        AdaptiveRunner(network, None)
