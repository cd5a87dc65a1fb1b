import math

import pytest
import torch

from offramp.errors import InvalidArgumentError
from offramp.training.losses import distillation_loss, joint_loss, weights_in_epoch


def log_softmax(row: list[float]) -> list[float]:
    log_sum = math.log(sum(math.exp(value) for value in row))
    return [value - log_sum for value in row]


def joint_loss_by_loop(outputs, labels, weights, smoothing, distillation) -> float:
    """The sum written out sample by sample, in plain Python."""
    total = 0.0
    teacher = [log_softmax(row) for row in outputs[-1].tolist()]
    for k, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        for row, label, taught in zip(output.tolist(), labels.tolist(), teacher, strict=True):
            log_p = log_softmax(row)
            target = [smoothing / len(row)] * len(row)
            target[label] += 1 - smoothing
            loss = -sum(t * lp for t, lp in zip(target, log_p, strict=True))
            if k < len(outputs) - 1:
                divergence = sum(
                    math.exp(q) * (q - lp) for q, lp in zip(taught, log_p, strict=True)
                )
                loss = (1 - distillation) * loss + distillation * divergence
            total += weight * loss / len(labels)
    return total


@pytest.fixture
def outputs():
    return tuple(torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))


LABELS = torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("distillation", [0.0, 0.3, 1.0])
def test_joint_loss_equals_a_loop(outputs, smoothing, distillation):
    weights = (0.33, 0.0, 1.5)
    loss = joint_loss(
        outputs, LABELS, weights=weights, label_smoothing=smoothing, distillation=distillation
    )
    expected = joint_loss_by_loop(outputs, LABELS, weights, smoothing, distillation)
    assert loss.item() == pytest.approx(expected)


def test_distillation_from_two_to_one_against_even():
    # Teacher (2/3, 1/3), student even: (2/3) log(4/3) + (1/3) log(2/3).
    teacher = torch.tensor([[math.log(2), 0.0]])
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert distillation_loss(torch.zeros(1, 2), teacher).item() == pytest.approx(expected)


def test_distillation_sends_no_gradient_into_the_teacher(outputs):
    student, _, teacher = outputs
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_final_exit_learns_from_the_labels_only(outputs):
    final = outputs[-1]
    joint_loss(outputs, LABELS, weights=(1, 1, 1), distillation=0.7).backward()
    with_distillation = final.grad.clone()
    final.grad = None
    torch.nn.functional.cross_entropy(final, LABELS).backward()
    torch.testing.assert_close(with_distillation, final.grad)


@pytest.mark.parametrize("weights", [(1.0,), (1.0,) * 4])
def test_one_weight_for_each_exit(outputs, weights):
    with pytest.raises(InvalidArgumentError, match=f"each of the 3 exits. Got {len(weights)}"):
        joint_loss(outputs, LABELS, weights=weights)


# Loss weights by epoch


@pytest.mark.parametrize(
    ("epoch", "share"),
    [(0, 0), (1, 0), (2, 1 / 8), (3, 3 / 8), (4, 5 / 8), (5, 7 / 8), (6, 1), (60, 1)],
)
def test_early_weights_are_those_of_the_middle_of_the_epoch(epoch, share):
    weights = weights_in_epoch((0.5, 4.0, 2.0), epoch=epoch, backbone_epochs=2, ramp_epochs=4)
    assert weights == (0.5 * share, 4.0 * share, 2.0)


def test_weight_of_one_exit_is_always_full():
    assert weights_in_epoch((0.7,), epoch=0, backbone_epochs=1, ramp_epochs=1) == (0.7,)
