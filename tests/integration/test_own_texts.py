"""A text network of one's own, of ids and a mask, and sentences in CSV files."""

import csv

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from word_level import word_level

import offramp as off
from offramp.data.preprocessing import text_inputs

GOOD, BAD, OTHER = ("good", "great", "fine"), ("bad", "dull", "poor"), ("a", "the", "film", "was")
VOCABULARY = {"[PAD]": 0, "[UNK]": 1} | {word: 2 + i for i, word in enumerate(GOOD + BAD + OTHER)}
NAMES = ("negative", "positive")


def write_texts(folder):
    random = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 64), ("validation", 48), ("test", 40)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("sentence", "label"))
            for label in random.integers(0, 2, count):
                words = [*random.choice(OTHER, random.integers(5, 9))]
                words.append(random.choice((BAD, GOOD)[label]))
                rows.writerow((" ".join(words), NAMES[label]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "texts")
    tokens = off.TextPreprocessing(tokenizer=word_level(VOCABULARY), max_tokens=12)
    with (folder / "texts" / "train.csv").open(newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    ids, mask = map(torch.from_numpy, text_inputs(texts, tokens, num_inputs=2))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    example = {"input_ids": ids[:2], "attention_mask": mask[:2]}
    network = off.add_exits(
        BertForSequenceClassification(config),
        at="auto",
        num_exits=2,
        num_classes=2,
        example=example,
    )
    off.export(
        network, None, folder / "bundle", (ids, mask), class_names=NAMES, preprocessing=tokens
    )
    return folder


@pytest.fixture
def own(made, workplace):
    (workplace / "texts").symlink_to(made / "texts")
    return made / "bundle"


def test_several_inputs_are_evaluated_timed_and_planned_for(own, figures_of):
    assert figures_of("evaluate", own, "--data", "texts")["num_samples"] == 40
    timing = figures_of("time", own, "--data", "texts", "--batch-size", "1,8")
    assert [row["batch_size"] for row in timing["results"]] == [1, 8]
    assert min(row["plain_ms"] for row in timing["results"]) > 0
    plan = figures_of("plan", own, "--data", "texts", "--mbit", "10", "--rtt-ms", "20")
    first, *_, last = plan["cuts"]
    assert first["bytes_per_request"] > 0
    assert last["bytes_per_request"] == 0


def test_a_text_without_tokens_is_refused(own, refuses):
    refuses("predict", own, "a good film", "", words=("at least one token", "''"))


def test_sentences_are_answered(own, offramp):
    outcome = offramp("predict", own, "a good film", "the film was dull")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert all(" probability " in line for line in outcome.stdout.splitlines())


NET = """
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification

import offramp

preprocessing = offramp.TextPreprocessing.from_tokenizer("words.json", max_tokens=12, pad_id=0)


def build(num_classes):
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    return BertForSequenceClassification(BertConfig(**sizes, **layers, num_labels=num_classes))
"""


def test_texts_train_a_network_of_one_s_own(own, offramp, figures_of, workplace):
    (workplace / "net.py").write_text(NET)
    (workplace / "words.json").write_text(word_level(VOCABULARY))
    network = ("--network", "net.py:build")
    outcome = offramp("train", *network, "--exits", "2", "--data", "texts", "--epochs", "1")
    assert outcome.code == 0, outcome.stderr
    outcome = offramp("calibrate", "runs/net", *network, "--budget-share", "0.7")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert figures_of("evaluate", "runs/net", *network)["num_samples"] == 40
    assert "probability" in offramp("predict", "runs/net", *network, "a fine film").stdout
