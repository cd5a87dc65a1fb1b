"""Text models of transformers that torch.export cuts: trained, exported, and alike."""

import math

import pytest
import torch

import offramp
from offramp import ThresholdPolicy, add_exits

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "num_labels": 5,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
FAMILIES = {
    "DistilBert": ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
    "Roberta": ["roberta.encoder.layer.0", "roberta.encoder.layer.1"],
    "Llama": ["model.layers.0", "model.layers.1"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_cut_trained_and_exported(import_or_skip, tmp_path, family):
    transformers = import_or_skip("transformers")
    options = SMALL
    if family == "DistilBert":
        options = {"vocab_size": 50, "dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 48}
        options |= {"num_labels": 5, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    backbone = getattr(transformers, f"{family}ForSequenceClassification")(config)
    ids, mask = torch.randint(3, 50, (6, 9)), torch.ones(6, 9, dtype=torch.int64)
    ids[1, 5:] = mask[1, 5:] = ids[4, 2:] = mask[4, 2:] = 0
    network = add_exits(backbone, at=FAMILIES[family], num_classes=5, example=(ids, mask))
    assert network.ragged is not None
    head = network.exits[0]
    assert getattr(head, "head", head).pool == ("last" if family == "Llama" else "mean")
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-3)
    for _ in range(3):
        labels = torch.arange(6) % 5
        loss = sum(torch.nn.functional.cross_entropy(o, labels) for o in network(ids, mask))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        outputs = network(ids, mask)
        assert torch.equal(outputs[-1], backbone.eval()(ids, mask).logits)
        alone = network(ids[1:2, :5], mask[1:2, :5])
    torch.testing.assert_close(alone[0], outputs[0][1:2], rtol=1e-3, atol=1e-4)
    sure = outputs[0].softmax(-1).amax(-1).sort().values
    policy = ThresholdPolicy((float(sure[2:4].mean()), math.inf), rule="max_probability")
    folder = tmp_path / "bundle"
    session = offramp.Session(offramp.export(network, policy, folder, (ids, mask), plain=False))
    result = session.run(ids.numpy(), mask.numpy())
    expected = torch.stack(outputs)[torch.as_tensor(result.exit_index), torch.arange(6)]
    torch.testing.assert_close(torch.as_tensor(result.output), expected, rtol=1e-3, atol=1e-4)
    assert len(set(result.exit_index.tolist())) == 2
