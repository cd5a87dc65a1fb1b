import pytest

from offramp.measure.profile import Profile


@pytest.fixture
def profile():
    return Profile(
        backend="torch",
        versions={"torch": "2"},
        hardware="a processor",
        threads=1,
        sizes=(1, 10, 20),
        stage_ms=((1.0, 10.0, 12.0), (2.0, 20.0, 24.0)),
        exit_ms=((0.5, 0.6, 0.8), (0.25, 0.25, 0.25)),
        compaction_ms=((0.0, 0.1, 0.2), (0.0, 0.0, 0.0)),
    )


def test_a_full_batch_takes_its_parts(profile):
    assert profile.batch_ms((20, 20)) == pytest.approx(12 + 0.8 + 0.2 + 24 + 0.25)


def test_an_exit_that_is_off_takes_nothing(profile):
    assert profile.batch_ms((20, 20), off={0}) == pytest.approx(12 + 24 + 0.25)


def test_times_grow_evenly_between_the_sizes(profile):
    # 15 samples at stage 0: halfway from 10 to 12 ms; 5.5 at stage 1: halfway from 2 to 20.
    assert profile.batch_ms((15, 5.5), off={0}) == pytest.approx(11 + 11 + 0.25)
    assert profile.asking_ms(0, 15) == pytest.approx(0.7 + 0.15)


def test_below_one_sample_a_part_runs_in_that_share_of_the_batches(profile):
    assert profile.batch_ms((1, 0.3), off={0}) == pytest.approx(1 + 0.3 * 2.25)
    assert profile.batch_ms((1, 0), off={0}) == pytest.approx(1)


def test_figures_are_plain_values(profile):
    content = profile.to_dict()
    assert content["sizes"] == (1, 10, 20)
    assert set(content) == {
        "backend",
        "versions",
        "hardware",
        "threads",
        "sizes",
        "stage_ms",
        "exit_ms",
        "compaction_ms",
    }
