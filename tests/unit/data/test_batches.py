from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, TensorDataset

from offramp.calibration.collect import collect
from offramp.data.batches import batches_of, read_batch
from offramp.data.labels import read_labels
from offramp.errors import DataError
from offramp.measure.outputs import LABELS, MAPS
from offramp.model.cut import add_exits
from offramp.training.config import FitConfig
from offramp.training.fit import fit

X = torch.arange(12.0).reshape(6, 2) / 10
Y = torch.tensor([0, 1, 2, 0, 1, 2])
NAMED = namedtuple("NAMED", "image label")


@pytest.fixture
def network():
    backbone = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    return add_exits(backbone, at=["1"], num_classes=3, example=X)


def rows(make):
    return [make(i, X[i], int(Y[i])) for i in range(6)]


class Streamed(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([2, 0, 1], dtype=torch.int16),
        torch.tensor([2, 0, 1], dtype=torch.uint8),
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([[2], [0], [1]]),
        torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]]).to_sparse(),
        torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
        torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.bool),
        np.array([2, 0, 1], dtype=np.uint64),
        [2, 0, 1],
        [np.int32(2), np.int32(0), np.int32(1)],
        [torch.tensor(2), torch.tensor(0), torch.tensor(1)],
    ],
    ids=str,
)
def test_labels_of_one_meaning_become_classes(labels):
    found = read_labels(labels, num_samples=3, num_classes=3, outputs=(LABELS,))
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["cat", "dog"], "'cat': number the class names"),
        ([None, None], "samples without labels"),
        (torch.tensor([0.5, 1.0]), "Got a label of 0.5: regression"),
        (torch.tensor([float("nan"), 1.0]), "NaN"),
        (torch.tensor([1j, 1.0]), "complex64"),
        (torch.tensor([[1, 1, 0], [0, 0, 1]]), r"Got shape \(2, 3\): several classes"),
        (torch.tensor([[0.9, 0.1, 0.0], [0, 0, 1]]), "mixup"),
        (torch.eye(4)[:2], "one-hot of 3 columns"),
        (torch.tensor([0, 1, 2]), r"each of the 2 samples of the batch.*\(3,\)"),
        (torch.tensor(1), r"shape \(\)"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), r"Expected labels of shape \(B,\)"),
        (np.array([{}, {}], dtype=object), "Got dict"),
        ([torch.zeros(2), torch.zeros(3)], "list of several"),
    ],
    ids=str,
)
def test_labels_of_no_single_meaning_are_refused(labels, says):
    with pytest.raises(DataError, match=says) as caught:
        read_labels(labels, num_samples=2, num_classes=3, outputs=(LABELS,))
    assert "\n" not in str(caught.value)


def test_masks_are_read_with_and_without_an_axis_of_classes():
    masks = torch.tensor([[[0, 1], [255, 2]]])
    for given in (masks, masks[:, None], masks.to(torch.uint8), masks.numpy()):
        assert torch.equal(read_labels(given, num_samples=1, outputs=(MAPS,)), masks)
    one_hot = nn.functional.one_hot(torch.tensor([[[0, 1], [1, 2]]])).movedim(-1, 1)
    found = read_labels(one_hot, num_samples=1, num_classes=3, outputs=(MAPS,))
    assert found.tolist() == [[[0, 1], [1, 2]]]
    with pytest.raises(DataError, match="one for each pixel"):
        read_labels(torch.tensor([1]), num_samples=1, outputs=(MAPS,))


FORMS = {
    "pairs": rows(lambda i, x, y: (x, y)),
    "pairs as lists": rows(lambda i, x, y: [x, y]),
    "numpy": rows(lambda i, x, y: (x.double().numpy(), np.int32(y))),
    "lists": rows(lambda i, x, y: (x.tolist(), y)),
    "file names": rows(lambda i, x, y: (x, y, f"{i}.png")),
    "numbers": rows(lambda i, x, y: (x, y, i)),
    "numbers and dicts": rows(lambda i, x, y: (x, y, i, {"id": i})),
    "named": rows(lambda i, x, y: NAMED(x, y)),
    "dicts": rows(lambda i, x, y: {"image": x, "label": y, "index": i}),
    "dicts of more": rows(lambda i, x, y: {"m": None, "b": [0] * i, "img": x, "target": y}),
    "processor": rows(lambda i, x, y: {"pixel_values": x, "labels": y}),
    "tensors": (X, Y),
    "tensors in a list": [X, Y],
    "arrays": (X.numpy(), Y.tolist()),
    "columns": {"pixel_values": X, "labels": Y},
    "columns of lists": {"pixel_values": X.tolist(), "labels": Y.tolist()},
    "lists of lists": (X.tolist(), Y.tolist()),
    "lists in lists": rows(lambda i, x, y: [x.tolist(), y]),
    "data set": TensorDataset(X, Y),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_of_one_meaning_is_collected_and_trained_on(form, network):
    data = FORMS[form]
    expected = torch.stack(network.eval()(X)).detach()
    found = collect(network, data, batch_size=4)
    torch.testing.assert_close(found.logits_KNC, expected)
    assert found.labels_N.tolist() == Y.tolist()
    before = network.state_dict()["stages.0.0.weight"].clone()
    fit(network, data, data, FitConfig(epochs=1, device="cpu", batch_size=4))
    assert not torch.equal(before, network.state_dict()["stages.0.0.weight"])


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(FORMS["dicts of more"], 4),
        lambda: DataLoader(FORMS["pairs"], 4, collate_fn=list),
        lambda: DataLoader(FORMS["dicts"], 4, collate_fn=list),
        lambda: DataLoader([(X[:1], Y[:1]), (X[1:], Y[1:])], batch_size=None),
        lambda: DataLoader(Streamed(FORMS["pairs"]), 5),
        lambda: Streamed(FORMS["pairs"]),
        lambda: iter(FORMS["dicts"]),
        lambda: zip(X.split(5), Y.split(5), strict=True),
        lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    ],
)
def test_whatever_yields_samples_or_batches_is_collected(data, network):
    found = collect(network, data(), batch_size=5)
    torch.testing.assert_close(found.logits_KNC, torch.stack(network.eval()(X)).detach())
    assert found.labels_N.tolist() == Y.tolist()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (X, "Expected samples with labels"),
        ((X,), "Got Tensor without labels"),
        ([], "empty data set"),
        ("train", "Got str"),
        (5, "Got int"),
        ((X, Y[:3]), "Got lengths 3, 6"),
        ({"train": TensorDataset(X, Y)}, "choose one"),
        (rows(lambda i, x, y: {"image": x}), "Got none among the keys 'image'"),
        (rows(lambda i, x, y: {"image": x, "label": y, "labels": y}), "Got several"),
        (rows(lambda i, x, y: {"a": x, "b": x, "label": y}), "Got the keys 'a', 'b'"),
        (rows(lambda i, x, y: (x, y, y)), "part 3 may be inputs, labels or weights"),
        (rows(lambda i, x, y: (x, i, y)), "part 3 may be inputs, labels or weights"),
        (rows(lambda i, x, y: (x, torch.tensor(i), Y[i])), "part 3 may be inputs, labels"),
        (rows(lambda i, x, y: (x, x, y)), "part 3 may be inputs, labels or weights"),
        (rows(lambda i, x, y: (x, y, 0.5)), "part 3 may be inputs, labels or weights"),
        (rows(lambda i, x, y: (x, -1)), r"in \[0, 2\].*Got -1. Where that stands"),
        (rows(lambda i, x, y: (x, 3)), r"in \[0, 2\].*Got 3"),
        (rows(lambda i, x, y: (x[: 1 + i % 2], y)), r"Got \(1,\) and \(2,\): resize"),
        (rows(lambda i, x, y: ("a film", y)), "'a film': turn it into token ids"),
        (rows(lambda i, x, y: (Image.new("L", (2, 2)), y)), "a PIL image"),
        ((torch.zeros(6, 3), Y), r"does not take inputs.*Its example was \(B, 2\) of float32"),
        ((X[:, None], Y), r"input of 2 axes.*Got \(6, 1, 2\)"),
        ((X.to(torch.uint8), Y), "Got uint8: scale it to floats"),
        ((X * float("nan"), Y), "says NaN"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_data_of_no_single_meaning_is_refused(data, says, network):
    with pytest.raises(DataError, match=says) as caught:
        collect(network, data)
    assert "\n" not in str(caught.value)


def test_a_part_that_comes_again_is_left_out_where_it_is_no_class(network):
    videos = torch.tensor([7, 7, 7, 8, 8, 8])
    assert read_batch((X, Y, videos), network)[1].tolist() == Y.tolist()
    with pytest.raises(DataError, match="part 3"):
        read_batch((X, Y, videos))  # of how many classes is not known


def test_loaders_without_a_batch_are_refused(network):
    none = DataLoader(TensorDataset(X, Y), 8, drop_last=True)
    config = FitConfig(epochs=1, device="cpu")
    for read in (lambda: fit(network, none, config=config), lambda: collect(network, none)):
        with pytest.raises(DataError, match="6 samples, batch_size=8, drop_last=True"):
            read()
    with pytest.raises(DataError, match="The loader gave none"):
        fit(network, DataLoader(Streamed([]), 8), config=config)


def test_what_fit_cannot_shuffle_says_what_would_do(network):
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    chain = ChainDataset([Streamed(FORMS["pairs"])])
    for data, says in ((batches, "batch_size=None"), (chain, "wrap it in a DataLoader")):
        with pytest.raises(DataError, match=says) as caught:
            fit(network, data, config=FitConfig(epochs=1, device="cpu"))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="without labels"):
        fit(network, [(X,), (X,)], config=FitConfig(epochs=1, device="cpu"))


def test_a_loader_of_the_users_stays_as_it_is():
    loader = DataLoader(TensorDataset(X, Y), 4)
    assert [len(batch[0]) for batch in batches_of(loader)] == [4, 2]
    assert loader.collate_fn is torch.utils.data.default_collate


def test_classes_are_balanced_whatever_form_the_labels_have(network):
    data = [{"image": X[i], "label": torch.tensor([int(i > 4)])} for i in range(6)]
    fit(network, data, config=FitConfig(epochs=1, device="cpu", class_balance="sampling"))


def test_logits_are_ordinary_tensors(network):
    logits = collect(network, (X, Y))
    head = nn.Linear(3, 3)
    nn.functional.cross_entropy(head(logits.logits_KNC[0]), logits.labels_N).backward()
    assert head.weight.grad.abs().sum() > 0
