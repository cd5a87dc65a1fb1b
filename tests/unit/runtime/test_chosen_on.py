"""Samples that chose a policy are known again by their hashes."""

import numpy as np
import pytest

from offramp.errors import ArtifactError
from offramp.runtime.chosen_on import ChosenOn, written_hashes

HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)


def chosen_on(hashes):
    return ChosenOn(
        name="mine", split="dev", num_samples=9, class_prior="drawn", sha256="a", hashes=hashes
    )


def test_few_samples_are_counted():
    known = chosen_on(written_hashes(HASHES[:900]))
    assert known.count_among(HASHES[850:1000]) == 50
    assert known.count_among(HASHES[[3, 3, 950]]) == 2
    assert known.count_among(HASHES[1000:]) == 0
    assert chosen_on(None).count_among(HASHES) == 0


def test_of_many_samples_a_part_stands_for_all():
    written = written_hashes(HASHES)
    assert len(written) < 45_000
    known = chosen_on(written)
    assert known.count_among(HASHES) == len(HASHES)
    others = np.random.default_rng(1).integers(0, 2**64, 5_000, dtype=np.uint64)
    assert known.count_among(others) == 0
    both = np.concatenate([HASHES[:5_000], others])
    assert known.count_among(both) == pytest.approx(5_000, rel=0.1)


@pytest.mark.parametrize("hashes", ["AAAA", "no base64"])
def test_damaged_hashes_are_refused(hashes):
    with pytest.raises(ArtifactError, match="8 bytes a sample"):
        chosen_on(hashes).count_among(HASHES)
