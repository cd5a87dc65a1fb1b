"""The first layers of MiniLM with two exits, as a bundle, and sentences for it."""

import torch

from offramp.data.texts import encode_padded
from offramp.exporting.bundle import export
from offramp.policy.policies import ThresholdPolicy
from offramp.zoo.text import load_tokenizer, minilm

GOOD = ("a warm , funny , engaging film", "wonderful", "one of the best films of the year , truly")
BAD = (
    "dull",
    "a tedious mess that never ends , and never should have begun",
    "bad and boring film",
)


def make_network():
    torch.manual_seed(0)
    return minilm(num_classes=2, depth=2, exits_after=(1,)).eval()


def make_ids():
    return encode_padded(load_tokenizer(), [*GOOD, *BAD])


def make_policy():
    """Half of the sentences leave at the first exit."""
    with torch.no_grad():
        surest = make_network()(make_ids())[0].softmax(-1).amax(-1).sort().values
    return ThresholdPolicy(((surest[2] + surest[3]).item() / 2,), rule="max_probability")


def write_bundle(folder):
    export(make_network(), make_policy(), folder, make_ids())
