import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.policy.confidence import CONFIDENCE_RULES, entropy_confidence

any_float = st.floats(width=32)
finite = st.floats(-1000, 1000, width=32)


def rows_of(values):
    return st.integers(2, 6).flatmap(
        lambda classes: st.lists(
            st.lists(values, min_size=classes, max_size=classes), min_size=1, max_size=5
        )
    )


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
@given(rows=rows_of(any_float))
def test_confidence_is_in_the_unit_interval_or_nan(rule, rows):
    confidence = CONFIDENCE_RULES[rule](torch.tensor(rows))
    assert ((confidence >= 0) & (confidence <= 1) | confidence.isnan()).all()


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
@given(rows=rows_of(finite))
def test_confidence_of_finite_logits_is_a_number(rule, rows):
    assert not CONFIDENCE_RULES[rule](torch.tensor(rows)).isnan().any()


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
@given(rows=rows_of(st.floats(-20, 20, width=32)), shift=st.floats(-20, 20, width=32))
def test_confidence_ignores_a_shift_and_the_order_of_classes(rule, rows, shift):
    logits = torch.tensor(rows)
    confidence = CONFIDENCE_RULES[rule](logits)
    changed = CONFIDENCE_RULES[rule]((logits + shift).flip(1))
    assert torch.allclose(changed, confidence, atol=1e-4)


@given(rows=rows_of(finite))
def test_entropy_equals_the_sum_written_out(rows):
    for row, confidence in zip(rows, entropy_confidence(torch.tensor(rows)).tolist(), strict=True):
        weights = [math.exp(value - max(row)) for value in row]
        probabilities = [weight / sum(weights) for weight in weights]
        entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
        assert confidence == pytest.approx(1 - entropy / math.log(len(row)), abs=1e-5)
