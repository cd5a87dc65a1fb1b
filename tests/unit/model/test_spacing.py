import pytest

from offramp.model.spacing import choose_cuts


@pytest.mark.parametrize(
    ("cumulative", "total", "num_exits", "cuts"),
    [
        pytest.param([1, 2, 3, 4, 5, 6, 7], 8, 2, (3,), id="half"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], 8, 4, (1, 3, 5), id="quarters"),
        pytest.param([3, 5], 8, 2, (0,), id="a tie goes to the earlier"),
        pytest.param([4, 4, 4], 8, 2, (0,), id="no time between them"),
        # 12 is nearest to both 8 and 16; 3 and 12 cost 25 + 16, 12 and 20.5 cost 16 + 20.25.
        pytest.param([3, 12, 20.5], 24, 3, (1, 2), id="each once"),
        # 14 is nearest to 8, but 14 and 23 cost 36 + 49, 0 and 14 only 64 + 4.
        pytest.param([0, 14, 23], 24, 3, (0, 1), id="all cuts together"),
        pytest.param([1, 2], 300, 3, (0, 1), id="all there are"),
        # 54 and 54.5 are nearer to a third and two thirds than 54 and 92.
        pytest.param([54, 54.5, 92], 100, 3, (0, 2), id="two in one place"),
    ],
)
def test_cuts_are_nearest_to_equal_shares(cumulative, total, num_exits, cuts):
    assert choose_cuts(cumulative, total=total, num_exits=num_exits) == cuts
