import json

import pytest
import torch
from torch import nn

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.evaluation.placement import place, propose
from offramp.model.cut import add_exits, cut_paths

CLASSES = 3


class Backwards(nn.Sequential):
    """A Sequential that runs its children from the last to the first."""

    def forward(self, x):
        for child in reversed(self):
            x = child(x)
        return x


class Grid(nn.Module):
    """Gives features no axis of which is one of channels: no head fits."""

    def forward(self, x):
        return x.unflatten(1, (16, 32))


def backbone() -> nn.Sequential:
    """Layers whose time dwarfs that of a head, nested and with a module that stands in twice."""
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Linear(6, 512),
        nn.Sequential(relu, nn.Linear(512, 512), nn.Sequential(relu, nn.Linear(512, 512))),
        Grid(),
        nn.Flatten(),
        Backwards(nn.ReLU(), nn.Linear(512, 512)),
        nn.Linear(512, 512),
        nn.Linear(512, CLASSES),
    )


BACKBONE_PATHS = ["0", "1.0", "1.1", "1.2.0", "1", "2", "3", "4", "5"]
X = torch.ones(64, 6)


def test_proposal_by_hand():
    piece_ms = {"stem": 2.0, "a": 1.0, "b": 1.0, "c": 3.0, "last": 1.0}
    head_ms = {"stem": 0.5, "b": 0.25, "c": 1.5}  # none fits after a; c leaves 1 ms only
    placement = propose(piece_ms, head_ms, num_exits=2, batch_size=7)
    assert json.loads(json.dumps(placement.to_dict())) == {
        "at": ["b"],
        "candidates": [
            {
                "path": "stem",
                "ms": 2.0,
                "share": 0.25,
                "head_ms": 0.5,
                "chosen": False,
                "module": "",
            },
            {"path": "b", "ms": 4.0, "share": 0.5, "head_ms": 0.25, "chosen": True, "module": ""},
        ],
        "total_ms": 8.0,
        "batch_size": 7,
    }
    assert propose(piece_ms, head_ms, num_exits=3, batch_size=7).at == ("stem", "b")


def test_a_head_as_long_as_the_rest_does_not_lose():
    placement = propose({"a": 3.0, "b": 1.0}, {"a": 1.0}, num_exits=2, batch_size=1)
    assert placement.at == ("a",)


@pytest.mark.parametrize("num_exits", [4, 99])
def test_more_exits_than_can_pay_are_refused(num_exits):
    piece_ms = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    head_ms = {"a": 0.5, "b": 0.5, "c": 1.5}
    with pytest.raises(InvalidArgumentError, match=rf"at most 3: .* 2 places .* Got {num_exits}"):
        propose(piece_ms, head_ms, num_exits=num_exits, batch_size=1)


def test_places_are_named_by_the_outermost_module_that_ends_there():
    assert cut_paths(backbone(), X) == BACKBONE_PATHS
    assert cut_paths(nn.Sequential(nn.Sequential(), nn.ReLU()), X) == ["0"]


def test_proposed_paths_are_accepted_and_figures_belong_together():
    network, num_exits = backbone(), 3
    placement = place(network, num_exits=num_exits, example=X, num_classes=CLASSES, rounds=3)
    paths = [row.path for row in placement.candidates]
    assert paths == [path for path in BACKBONE_PATHS if path in paths]
    assert "2" not in paths  # no head fits
    assert placement.at == tuple(row.path for row in placement.candidates if row.chosen)
    assert placement.batch_size == 64
    times = [0.0, *(row.ms for row in placement.candidates), placement.total_ms]
    assert times == sorted(times)
    for row in placement.candidates:
        assert row.share == pytest.approx(row.ms / placement.total_ms)
        assert 0 < row.head_ms <= placement.total_ms - row.ms
    cut = add_exits(network, at=placement.at, num_classes=CLASSES, example=X)
    assert cut.num_exits == num_exits


def test_placing_leaves_modes_statistics_and_the_example_alone():
    network = nn.Sequential(
        nn.ReLU(inplace=True), nn.BatchNorm1d(6), *(nn.Linear(6, 6) for _ in range(20))
    )
    network[1].eval()
    example = -torch.ones(2, 6)
    place(network, num_exits=2, example=example, num_classes=6, rounds=1)
    assert network.training
    assert not network[1].training
    assert network[1].num_batches_tracked == 0
    assert torch.equal(example, -torch.ones(2, 6))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_backbone_of_one_piece_has_no_place_for_an_exit():
    with pytest.raises(InvalidArgumentError, match=r"at most 1: .* 0 places"):
        place(nn.Sequential(nn.Linear(6, CLASSES)), num_exits=2, example=X, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_exits": 1}, "'num_exits' .* at least 2. Got 1"),
        ({"num_exits": 99}, "'num_exits' .* Got 99"),
        ({"rounds": 0}, "'rounds' .* at least 1. Got 0"),
        ({"num_classes": 4}, r"4 outputs.*\(64, 3\)"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    arguments = {"num_exits": 2, "example": X, "num_classes": CLASSES, "rounds": 1}
    with pytest.raises(InvalidArgumentError, match=message):
        place(backbone(), **(arguments | changes))


@pytest.mark.parametrize("shape", [(), (0, 6)])
def test_an_example_without_samples_is_refused(shape):
    with pytest.raises(ShapeError, match="at least one sample"):
        place(backbone(), num_exits=2, example=torch.zeros(shape), num_classes=CLASSES)


def test_no_head_is_tried_on_features_that_are_whole_numbers():
    network = nn.Sequential(
        nn.Identity(), nn.Embedding(10, 64), nn.Flatten(), nn.Linear(512, 512), nn.Linear(512, 3)
    )
    words = torch.randint(10, (64, 8))
    found = place(network, num_exits=2, example=words, num_classes=3, rounds=3)
    assert "0" not in [row.path for row in found.candidates]
