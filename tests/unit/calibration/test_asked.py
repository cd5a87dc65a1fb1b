import pytest

from offramp.calibration.asked import Asked, cannot_tell

RECORD = {"asked": {"max_drop": 0.01, "rule": "entropy"}, "data": {"num_samples": 2115}}


def asked(target, limit, **more):
    return Asked(target=target, limit=limit, num_samples=2115, **more)


def test_record_of_a_policy_file():
    assert Asked.from_record(RECORD) == asked("max_drop", 0.01)
    risk = {"max_risk": 0.05, "max_drop": None, "risk": "disagreement", "guarantee": 0.95}
    found = Asked.from_record({**RECORD, "asked": risk})
    assert found == asked("max_risk", 0.05, risk="disagreement", guarantee=0.95)


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        {"asked": {"thresholds": "0.1,0.5"}, "data": None},
        {"asked": {"thresholds": "0.1,0.5"}, "data": {"num_samples": 9}},
        {"asked": None, "data": {"num_samples": 9}},
    ],
)
def test_thresholds_by_hand_were_not_asked_for(record):
    assert Asked.from_record(record) is None


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (asked("max_drop", 0.01), "a drop of at most 1 point of accuracy from the final exit"),
        (asked("max_risk", 0.05, risk="disagreement"), "at most 5 % of the answers differ from"),
        (asked("budget_share", 0.5), "at most 50.00 % of the plain network's MACs"),
        (asked("budget_macs", 50_000), "at most 50,000 MACs a sample on average"),
        (asked("budget_ms", 1.5), "at most 1.5 ms a sample on average"),
        (asked("max_drop", 0.01, guarantee=0.95), "samples, guaranteed (probability 0.95)"),
        (asked("max_drop", 0.01, guarantee="mean"), "samples, guaranteed (on average)"),
    ],
)
def test_words_name_the_target_and_the_samples(wanted, words):
    said = wanted.in_words()
    assert words in said
    assert "on 2,115 calibration samples" in said


@pytest.mark.parametrize(
    ("limit", "enough"), [(0.01, 100), (0.05, 20), (0.0, 100), (0.001, 100), (0.02, 50)]
)
def test_samples_can_tell_where_the_target_allows_one_answer(limit, enough):
    wanted = asked("max_drop", limit)
    assert cannot_tell(wanted, enough) is None
    doubt = cannot_tell(wanted, enough - 1)
    assert f"{enough - 1} calibration samples cannot tell a drop" in doubt
    assert doubt.endswith(f"Set at least {enough} aside")


def test_budgets_are_told_by_a_hundred_samples():
    assert "accuracy within a budget" in cannot_tell(asked("budget_share", 0.5), 99)
    assert cannot_tell(asked("budget_share", 0.5), 100) is None


def test_a_guarantee_speaks_for_itself():
    assert cannot_tell(asked("max_drop", 0.01, guarantee=0.95), 9) is None
    assert cannot_tell(None, 9) is None
