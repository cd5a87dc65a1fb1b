"""What commands do, called from Python."""

import json
from pathlib import Path

import pytest

from offramp import InvalidArgumentError, ThresholdPolicy, load
from offramp.runtime import Session
from offramp.workflow.calibrate import calibrate, set_by_hand
from offramp.workflow.export import export
from offramp.workflow.frontier import follow, open_all
from offramp.workflow.wanted import Wanted


def test_commands_work_from_python_and_print_nothing(run, capsys):
    chosen = calibrate(load(run), Wanted(max_drop=0.05))
    assert load(run).policy == chosen.calibration.policy
    assert json.loads(Path(run, "policy.json").read_text())["asked"] == chosen.about["asked"]
    assert chosen.about["asked"] == {"max_drop": 0.05, "rule": "entropy"}
    assert chosen.num_samples == chosen.calibration.num_samples
    exported = export(run, plain=False)
    assert Session(exported.folder).bundle.num_steps == exported.num_steps
    opened = open_all([run])
    curve = follow(opened[0], num_points=2)
    assert len(curve.frontier.exits) == load(run).network.num_exits
    assert capsys.readouterr().out == ""


def test_thresholds_are_set_by_hand_from_python(run, capsys):
    policy = set_by_hand(load(run), "0.5,off", Wanted())
    assert policy == load(run).policy == ThresholdPolicy((0.5, float("inf")))
    with pytest.raises(InvalidArgumentError, match="one per exit but the final one"):
        set_by_hand(load(run), "0.5", Wanted())
    assert capsys.readouterr().out == ""
