import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from offramp.calibration.collect import collect
from offramp.errors import DataError, InvalidArgumentError, ShapeError
from offramp.families.exits import AdaptiveRunner
from offramp.model.cut import add_exits
from offramp.model.inputs import as_inputs
from offramp.model.ragged import Ragged
from offramp.policy.policies import never_leave

CONFIG = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    num_labels=3,
)
IDS = torch.arange(1, 28).reshape(3, 9)
TYPES = torch.tensor([[0] * 5 + [1] * 4] * 3)
MASK = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 4 + [0] * 5])
TOKENS = {"input_ids": IDS, "token_type_ids": TYPES, "attention_mask": MASK}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG).eval()


def exits_on(bert, example):
    network = add_exits(bert, at=["bert.encoder.layer.0"], num_classes=3, example=example)
    return network.eval()


GIVEN = {
    "ids": (IDS, {"input_ids": IDS}),
    "numpy": (IDS.numpy().astype(np.int32), {"input_ids": IDS}),
    "ids and mask": ((IDS, MASK), {"input_ids": IDS, "attention_mask": MASK}),
    "bool mask": ([IDS, MASK.bool()], {"input_ids": IDS, "attention_mask": MASK}),
    "as forward has them": ((IDS, MASK, TYPES), TOKENS),
    "dict": (TOKENS, TOKENS),
    "lists": ({name: value.tolist() for name, value in TOKENS.items()}, TOKENS),
    "what a tokenizer gives": (BatchEncoding(TOKENS), TOKENS),
    "no mask": (
        {"token_type_ids": TYPES, "input_ids": IDS},
        {"token_type_ids": TYPES, "input_ids": IDS},
    ),
}


@pytest.mark.parametrize("form", GIVEN)
def test_a_text_model_takes_its_inputs_by_name_or_as_its_forward_does(form, bert):
    given, named = GIVEN[form]
    expected = bert(**named).logits.detach()
    for network in (exits_on(bert, given), exits_on(bert, IDS)):
        torch.testing.assert_close(network(given)[-1], expected)
        found = AdaptiveRunner(network, never_leave(2)).run(given).output
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(network.plain()(given), expected)
        logits = collect(network, [(given, [0, 1, 2])])
        torch.testing.assert_close(logits.logits_KNC[-1], expected)
    assert network.input_names == ("input_ids", "attention_mask")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((IDS, TYPES, MASK), "hides the first token of text 0. Pass a dict"),
        ((IDS, TYPES), "hides the first token"),
        ((IDS, torch.zeros_like(IDS), MASK), "hides every token of text 0"),
        ((MASK, IDS), "an attention mask of 0 and 1. Got values from 1 to 27"),
        ((IDS, torch.ones_like(IDS), MASK), "token types that are 0 at a text's first token"),
        ({"input_ids": IDS, "attention_mask": 0 * MASK}, "hides every token"),
        ({"inputs_embeds": IDS}, "Got the keys 'inputs_embeds'"),
        ({**TOKENS, "position_ids": IDS}, "Got the keys"),
        ((IDS, MASK[:, :4]), r"Got \(3, 9\), \(3, 4\)"),
        (IDS.float(), "whole numbers. Got float32"),
        ("a film", "turn it into token ids"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_texts_that_could_mean_something_else_are_refused(given, says, bert):
    network = exits_on(bert, IDS)
    runner = AdaptiveRunner(network, never_leave(2))
    for take in (runner.run, network, lambda given: exits_on(bert, given)):
        with pytest.raises(InvalidArgumentError, match=says) as caught:
            take(given)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=says):
        collect(network, [(given, [0, 1, 2])])
    with pytest.raises(ShapeError, match=r"ids of shape \(B, T\).*Got \(9,\)"):
        runner.run(IDS[0])


def test_three_parts_are_no_pair_for_a_network_of_several_inputs(bert):
    with pytest.raises(DataError, match="Expected pairs"):
        collect(exits_on(bert, IDS), [(IDS, MASK, torch.tensor([0, 1, 2]))])


def test_padding_by_id_and_by_mask_must_agree(network):
    network.ragged = Ragged(mask_index=0, pad_id=0)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = (ids != 0).long()
    (found,) = as_inputs({"attention_mask": mask, "input_ids": ids}, network)
    assert torch.equal(found, ids)
    (padded,) = as_inputs({"attention_mask": mask, "input_ids": ids + 1}, network)
    assert padded.tolist() == [[6, 7, 8], [9, 10, 0]]
    for wrong, says in (
        ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "mask of 0 where the id is 0"),
        ({"input_ids": ids, "token_type_ids": mask}, "one token type"),
        ({"input_ids": ids, "attention_mask": 0 * mask}, "hides every token"),
        ((ids, mask), "Expected one input"),
    ):
        with pytest.raises(InvalidArgumentError, match=says):
            as_inputs(wrong, network)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(2, 6)
        self.end = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, image, meta):
        return self.end(torch.relu(self.first(image) + self.second(meta)))


def test_inputs_are_named_as_in_forward():
    backbone, image, meta = TwoInputs().eval(), torch.randn(3, 4), torch.randn(3, 2)
    expected = backbone(image, meta)
    for example in ((image, meta), {"meta": meta, "image": image, "idx": 0}):
        network = add_exits(backbone, at=["end.1"], num_classes=3, example=example).eval()
        assert network.input_names == ("image", "meta")
        for given in ((image, meta), {"meta": meta, "label": 0, "image": image}):
            torch.testing.assert_close(network(given)[-1], expected)
    for given, says in (
        (image, "the inputs image, meta. Got 1"),
        ({"image": image}, "in the order image, meta"),
    ):
        with pytest.raises(InvalidArgumentError, match=says):
            network(given)
    with pytest.raises(InvalidArgumentError, match="in the order image, meta"):
        add_exits(backbone, at=["end.1"], num_classes=3, example={"meta": meta})


def test_floats_become_those_of_the_weights_and_other_kinds_are_refused():
    backbone = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    network = add_exits(backbone, at=["1"], num_classes=3, example=x).eval()
    expected = backbone(x.float())
    for given in (x, x.numpy(), x.float(), {"pixel_values": x}, {"x": x}, [x]):
        assert torch.equal(network(given)[-1], expected)
    assert network.double()(x)[-1].dtype == torch.float64
    network.float()
    with pytest.raises(ShapeError, match=r"a batch axis first, \(B, 4\) of float32. Got \(4,\)"):
        network(x[0])
    with pytest.raises(InvalidArgumentError, match="Got uint8: scale it to floats"):
        network(torch.zeros(3, 4, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="does not take inputs"):
        add_exits(backbone, at=["1"], num_classes=3, example=torch.zeros(3, 5))


def test_an_error_of_the_backbone_s_own_code_is_one_line_that_says_what_to_do():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(4, 3)

        def forward(self, x, memory=None, mask=None):
            seen = 0 if memory is None else memory.get_seq_length()
            return self.last(self.first(x) + seen)

    given = (torch.randn(2, 4), torch.ones(2, 4))
    says = r"does not take inputs .*get_seq_length'\. Give them in the order of its forward"
    with pytest.raises(ShapeError, match=says) as raised:
        add_exits(Remembers(), at=["first"], num_classes=3, example=given)
    assert "\n" not in str(raised.value)


def test_token_types_that_cannot_be_a_mask_are_taken_by_position(bert):
    types = TYPES.clone()
    types[:, 0], types[:, 2] = 1, 1
    types[:, 1] = 0
    bert.eval()
    network = exits_on(bert, (IDS, MASK, types))
    expected = bert(input_ids=IDS, attention_mask=MASK, token_type_ids=types).logits
    torch.testing.assert_close(network.eval()(IDS, MASK, types)[-1], expected)


LEFT = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 2]])


@pytest.mark.parametrize("kind", ["layer list", "export"])
def test_texts_padded_left_are_taken_as_the_backbone_takes_them(kind, bert):
    backbone, at = bert, "bert.encoder.layer.0"
    if kind == "export":
        sizes = {"vocab_size": 60, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
        config = GPT2Config(**sizes, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        backbone, at = GPT2ForSequenceClassification(config).eval(), "transformer.h.0"
    given = {"input_ids": LEFT, "attention_mask": (LEFT != 0).long()}
    network = add_exits(backbone, at=[at], num_classes=3, example=given).eval()
    expected = backbone(**given).logits
    for each in (given, tuple(given.values())):
        torch.testing.assert_close(network(each)[-1], expected)
        found = AdaptiveRunner(network, never_leave(2)).run(each).output
        torch.testing.assert_close(found, expected)
    alone = {name: value[:1] for name, value in given.items()}
    torch.testing.assert_close(network(alone)[0], network(given)[0][:1])
    with pytest.raises(InvalidArgumentError, match="hides the first token of text 0"):
        network(LEFT + torch.arange(5), given["attention_mask"])  # what is hidden is no one id
