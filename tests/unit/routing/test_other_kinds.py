"""Other libraries' networks, from their code to a bundle: trained, calibrated, run, exported."""

import pytest
import torch
from torch import nn

import offramp as off
from offramp.families import family_of

LABELS = torch.arange(16) % 5
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24}


def convnext(transformers):
    config = transformers.ConvNextConfig(
        num_stages=2, depths=[1, 2], hidden_sizes=[8, 12], num_labels=5, layer_scale_init_value=0.5
    )
    return transformers.ConvNextForImageClassification(config), (IMAGES,)


def clip(transformers):
    config = transformers.CLIPConfig(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8}, text_config=SMALL, num_labels=5
    )
    return transformers.CLIPForImageClassification(config), (IMAGES,)


def roberta(transformers):
    config = transformers.RobertaConfig(
        **SMALL, num_labels=5, vocab_size=30, max_position_embeddings=20, pad_token_id=1
    )
    ids_BT = torch.randint(2, 30, (16, 9), generator=torch.Generator().manual_seed(1))
    lengths_B1 = 3 + torch.arange(16)[:, None] % 7
    is_valid_BT = torch.arange(9) < lengths_B1
    model = transformers.RobertaForSequenceClassification(config)
    return model, (ids_BT.where(is_valid_BT, 1), is_valid_BT.long())


def halting(model):
    return off.add_halting(model, gate_scale=4.0, gate_center=0.0)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 16

    def __getitem__(self, index):
        inputs = tuple(tensor[index] for tensor in self.inputs)
        return inputs if len(inputs) > 1 else inputs[0], int(LABELS[index])


@pytest.mark.parametrize(
    ("make", "add", "options"),
    [
        (convnext, off.add_gates, {}),
        (clip, halting, {"halting": off.HaltingConfig(halting_epochs=1)}),
        pytest.param(
            roberta,
            halting,
            {"halting": off.HaltingConfig(halting_epochs=1)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gated convnext", "halting clip", "halting roberta"],
)
def test_it_is_trained_calibrated_run_and_exported(make, add, options, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = make(transformers)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    network = add(model)
    config = off.FitConfig(epochs=2, batch_size=8, learning_rate=1e-3, device="cpu", **options)
    off.fit(network, Pairs(inputs), config=config)
    with torch.no_grad():
        plain = network.plain().eval()(*inputs)
        torch.testing.assert_close(plain, model.eval()(*inputs).logits, rtol=0, atol=0)
    choice = off.calibrate(off.collect(network, Pairs(inputs), thresholds=(0.3, 0.6)), max_drop=0.5)
    family = family_of(network)
    result = family.runner(network, choice).run(*inputs)
    expected = family.reference(network, choice.policy, inputs)
    torch.testing.assert_close(result.output, expected.output, rtol=1e-4, atol=1e-5)
    one_step = {"layers_per_step": 2} if family.name == "halting" else {}
    session = off.Session(
        off.export(network, choice, tmp_path / "b", inputs, plain=False, **one_step)
    )
    for rows in (slice(0, 16), slice(0, 1), slice(3, 4)):
        given = [tensor[rows].numpy() for tensor in inputs]
        answer = session.run(*given)
        torch.testing.assert_close(
            torch.from_numpy(answer.output), result.output[rows], rtol=1e-4, atol=1e-4
        )
