import pytest
import torch

from offramp.calibration import risk
from offramp.measure.outputs import LABELS, MAPS, OUTPUTS, outputs_judged_by, outputs_of
from offramp.policy.rules import RULES
from offramp.training import fit


@pytest.mark.parametrize(
    ("shape", "outputs"), [((2, 3), LABELS), ((2, 3, 4, 4), MAPS)], ids=["labels", "maps"]
)
def test_logits_tell_what_they_say(shape, outputs):
    logits, labels = torch.arange(2.0).repeat_interleave(3).view(2, 3), torch.zeros(2, 8, 8)
    logits[:, 1] = 5
    logits = logits.view(2, 3, *[1] * (len(shape) - 2)).expand(shape)
    assert outputs_of(logits) is outputs
    predicted = outputs.predict(logits, labels)
    assert predicted.ndim == len(outputs.label_axes)
    assert (predicted == 1).all()


def test_figures_tell_what_they_judge():
    assert outputs_judged_by({"accuracy": 0.5, "mean_iou": 0.3}) is MAPS
    assert outputs_judged_by({"accuracy": 0.5, "mean_iou": None}) is LABELS
    assert outputs_judged_by({"accuracy": 0.5}) is LABELS


def test_tables_by_outputs_have_each():
    tables = [RULES, risk._OTHERS_RISK, fit._TASKS_BY_OUTPUTS]
    assert [list(table) for table in tables] == [[each.name for each in OUTPUTS]] * len(tables)
