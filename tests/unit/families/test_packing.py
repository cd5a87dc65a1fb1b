"""Attention within each sample, whatever way it goes, against one sample at a time."""

import pytest
import torch

from offramp.families.packing import Packing
from offramp.routing.layers import attend

CPU = torch.device("cpu")
LENGTHS = {
    "one sample": [7],
    "one token each": [1, 1, 1],
    "of one length": [5, 5, 5],
    "about one length": [3, 16, 1, 8],
    "two lengths": [12, 90, 10, 88, 11, 89],
    "far apart": [200, 150, 100],
    "one token more": [16, 17],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_token_attends_to_its_own_sample(lengths):
    tokens = sum(lengths)
    # As layers with one matrix for all three have them: views of a wider tensor.
    query, key, value = torch.randn(tokens, 3 * 12).chunk(3, dim=-1)
    found = Packing(lengths, CPU).attend(query, key, value, num_heads=3)
    parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    expected = [attend(q[None], k[None], v[None], 3)[0] for q, k, v in parts]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("of one length", 1), ("about one length", 1), ("two lengths", 2), ("far apart", 3)],
)
def test_few_calls_where_they_pay(monkeypatch, name, calls):
    made = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        made.append(args[0].shape)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    x = torch.randn(sum(LENGTHS[name]), 4)
    Packing(LENGTHS[name], CPU).attend(x, x, x, num_heads=1)
    assert len(made) == calls


def test_where_tokens_lie():
    packing = Packing([2, 3], CPU)
    assert packing.lengths_B.tolist() == [2, 3]
    assert packing.starts_B.tolist() == [0, 2]
    assert packing.sample_N.tolist() == [0, 0, 1, 1, 1]
