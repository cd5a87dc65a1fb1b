"""Cutting backbones by the graph that torch.fx traces."""

import copy
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_backbones import BackboneOf, DropsInTraining, SmallResNet, SmallViT, tensors_of
from torch import nn

from offramp.errors import BackboneCutError, InvalidArgumentError, ShapeError
from offramp.model.cut import add_exits, cut_paths
from offramp.model.graph import Graph

CLASSES = 3
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def every_cut(backbone, example):
    return list(Graph(backbone, (example,)).places)


def test_every_cut_that_is_called_valid_is_valid():
    for make in (SmallResNet, SmallViT):
        backbone = make(CLASSES).eval()
        expected = backbone(IMAGES)
        paths = every_cut(backbone, IMAGES)
        assert len(paths) >= 15
        for path in paths:
            network = add_exits(
                backbone, at=[path], num_classes=CLASSES, example=IMAGES, heads=[FlatSum()]
            ).eval()
            assert torch.equal(network(IMAGES)[-1], expected), path
            rows = torch.tensor([1])
            features = network.run_stage(0, (IMAGES,))
            alone = network.stages[1](*(f.index_select(0, rows) for f in features))
            assert torch.allclose(alone, expected[1:], atol=1e-5), path


class FlatSum(nn.Module):
    """A head for features of any shape."""

    def forward(self, features):
        return features.flatten(1).float().sum(1, keepdim=True).expand(-1, CLASSES)


def test_all_cuts_at_once_with_shortcuts_crossing():
    backbone = SmallResNet(CLASSES)
    graph = Graph(backbone, (IMAGES,))
    by_position = {position: path for path, position in graph.places.items()}
    at = [by_position[position] for position in sorted(by_position)]
    assert any(not graph.is_narrow(position) for position in by_position)
    heads = [FlatSum() for _ in at]
    network = add_exits(backbone, at=at, num_classes=CLASSES, example=IMAGES, heads=heads)
    assert torch.equal(network.eval()(IMAGES)[-1], backbone.eval()(IMAGES))


def test_an_exit_reads_the_output_of_its_module_whatever_else_crosses():
    backbone = SmallResNet(CLASSES).eval()
    network = add_exits(
        backbone, at=["layer1.bn1"], num_classes=CLASSES, example=IMAGES, heads=[FlatSum()]
    )
    features = network.run_stage(0, (IMAGES,))
    assert len(features) == 2
    expected = backbone.layer1.bn1(backbone.layer1.conv1(backbone.stem(IMAGES)))
    assert torch.equal(features[0], expected)
    assert torch.equal(network.run_exit(0, features), FlatSum()(expected))


@pytest.mark.parametrize("make", [SmallResNet, SmallViT, DropsInTraining])
def test_training_is_the_backbones(make):
    """Dropout, stochastic depth and statistics draw and move alike; gradients are equal."""
    backbone = make(CLASSES).train()
    alone = copy.deepcopy(backbone)
    path = cut_paths(backbone, IMAGES)[1]
    network = add_exits(backbone, at=[path], num_classes=CLASSES, example=IMAGES).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network.plain()(IMAGES).square().sum().backward()
        torch.manual_seed(1)
        alone(IMAGES).square().sum().backward()
    for (name, ours), theirs in zip(
        tensors_of(backbone), dict(tensors_of(alone)).values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        if theirs.requires_grad:
            assert torch.equal(ours.grad, theirs.grad), name


def test_the_mode_is_asked_for_each_time():
    backbone = DropsInTraining(CLASSES)
    network = add_exits(backbone, at=["first"], num_classes=CLASSES, example=IMAGES)
    assert not torch.equal(network.train()(IMAGES)[-1], network(IMAGES)[-1])
    assert torch.equal(network.eval()(IMAGES)[-1], backbone.eval()(IMAGES))


def test_a_stage_that_starts_in_place_leaves_what_its_exit_read():
    backbone = SmallResNet(CLASSES).train()
    network = add_exits(backbone, at=["stem.1"], num_classes=CLASSES, example=IMAGES)
    sum(output.square().sum() for output in network(IMAGES)).backward()
    features = network.run_stage(0, (IMAGES,))
    before = features[0].clone()
    network.run_stage(1, features)
    assert torch.equal(features[0], before)


@pytest.mark.parametrize(
    ("forward", "at", "message"),
    [
        (lambda m, x: m.b(m.a(x)) + m.b(x), "b", "it runs more than once"),
        (lambda m, x: x.shape[0] * m.b(m.a(x)), "a", "no tensor crosses"),
        (lambda m, x: x.sum(0) + m.b(m.a(x)), "a", r"of shape \(6,\) crosses it without a batch"),
        (lambda m, x: (m.a(x), m.b(x))[1], "a", "nothing after it reads its output"),
        (lambda m, x: m.b(x), "a", "it is not called"),
    ],
)
def test_a_cut_that_is_not_possible_says_why_and_where_one_is(forward, at, message):
    backbone = BackboneOf(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    with pytest.raises(BackboneCutError, match=rf"after '{at}': .*{message}.*Nearest: ") as caught:
        add_exits(backbone, at=[at], num_classes=6, example=torch.randn(2, 6))
    assert "\n" not in str(caught.value)


def test_a_backbone_that_asks_for_values_cannot_be_traced():
    backbone = BackboneOf(
        lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.a(m.b(x)), a=nn.Linear(6, 6), b=nn.Tanh()
    )
    with pytest.raises(BackboneCutError, match=r"cannot be followed .*x.sum\(\) > 0"):
        add_exits(backbone, at=["a"], num_classes=6, example=-torch.ones(2, 6))


def test_what_stays_hidden_between_pieces_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    backbone = BackboneOf(lambda m, x: m.b(m.a(x)), a=Counts(), b=nn.Linear(6, 6))
    with pytest.raises(BackboneCutError, match="another output than the backbone"):
        add_exits(backbone, at=["a"], num_classes=6, example=torch.randn(2, 6))


def test_several_inputs():
    backbone = BackboneOf(lambda m, x, y: m.b(m.a(x) + y), inputs=2, a=nn.Linear(6, 6), b=nn.Tanh())
    x, y = torch.randn(2, 2, 6)
    network = add_exits(backbone, at=["a"], num_classes=6, example=(x, y))
    assert torch.equal(network(x, y)[-1], backbone(x, y))
    assert len(network.run_stage(0, (x, y))) == 2


def test_inputs_that_are_not_given_keep_their_defaults():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, mask=None, scale=2.0):
            y = F.relu(self.a(x)) * scale
            return self.b(y) if mask is None else self.b(y * mask)

    backbone, x = Scaled(), torch.randn(2, 6)
    network = add_exits(backbone, at=["a"], num_classes=6, example=x)
    assert torch.equal(network(x)[-1], backbone(x))


def test_auto_shares_the_macs_out():
    backbone = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    network = add_exits(backbone, at="auto", num_exits=3, num_classes=6, example=torch.randn(2, 6))
    assert network.costs(torch.randn(1, 6)).stage_macs == (72, 72, 72)
    traced = add_exits(
        SmallResNet(CLASSES), at="auto", num_exits=3, num_classes=CLASSES, example=IMAGES
    )
    assert [tuple(output.shape) for output in traced(IMAGES)] == [(2, CLASSES)] * 3


def test_a_module_that_runs_twice_and_functions_between():
    backbone = BackboneOf(
        lambda m, x: m.last(m.pool(F.relu(m.b(m.pool(F.relu(m.a(x)))))).flatten(1)),
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 16, 3, padding=1),
        pool=nn.MaxPool2d(2),
        last=nn.Linear(256, CLASSES),
    ).eval()
    graph = Graph(backbone, (IMAGES,))
    assert {"relu", "pool_0", "relu_1"} <= graph.between.keys()
    expected = backbone(IMAGES)
    for path in (*graph.between, *graph.places):
        network = add_exits(
            backbone, at=[path], num_classes=CLASSES, example=IMAGES, heads=[FlatSum()]
        )
        assert torch.equal(network.eval()(IMAGES)[-1], expected), path
    first, second, last = (
        add_exits(backbone, at="auto", num_exits=3, num_classes=CLASSES, example=IMAGES)
        .costs(IMAGES)
        .exit_macs()
    )
    assert first < 0.8 * second
    assert second < last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "auto"}, r"int in \[2, \d+\].*Got None"),
        ({"at": "auto", "num_exits": 1}, "Got 1"),
        ({"at": "auto", "num_exits": 99}, "Got 99"),
        ({"at": ["stem"], "num_exits": 2}, "goes with at="),
    ],
)
def test_num_exits_goes_with_auto(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        add_exits(SmallResNet(CLASSES), num_classes=CLASSES, example=IMAGES, **arguments)


def test_an_example_without_samples():
    with pytest.raises(ShapeError, match=r"at least one sample. Got shape \(0, 3, 16, 16\)"):
        add_exits(SmallResNet(CLASSES), at=["stem"], num_classes=CLASSES, example=IMAGES[:0])


CALLED = {
    "dropout": lambda m, x: F.dropout(m.b(torch.relu(m.a(x))), 0.5, m.training),
    "batch norm": lambda m, x: F.batch_norm(m.b(m.a(x)), m.mean, m.var, training=m.training),
    "noise": lambda m, x: m.b(m.a(x)) + (torch.randn_like(x) if m.training else 0 * x),
}


def with_statistics(run):
    backbone = BackboneOf(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    backbone.register_buffer("mean", torch.zeros(6))
    backbone.register_buffer("var", torch.ones(6))
    return backbone


@pytest.mark.parametrize("copied", ["pickled", "copied"])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", CALLED)
def test_the_mode_survives_copies(name, is_training, copied):
    backbone, x = with_statistics(CALLED[name]), torch.randn(9, 6)
    network = add_exits(backbone, at=["a"], num_classes=6, example=x).train(is_training)
    again = pickle.loads(pickle.dumps(network)) if copied == "pickled" else copy.deepcopy(network)
    for mode in (True, False):
        found = []
        for each in (network, again):
            torch.manual_seed(0)
            found.append(each.train(mode)(x)[-1])
        assert torch.equal(*found)
    again.train()
    assert not torch.equal(again(x)[-1], again.eval()(x)[-1])
    again.eval()
    assert torch.equal(again(x)[-1], again(x)[-1])


def test_copies_keep_the_keys_and_share_modules_as_before():
    network = add_exits(SmallResNet(CLASSES), at=["layer1"], num_classes=CLASSES, example=IMAGES)
    again = pickle.loads(pickle.dumps(network))
    assert list(again.state_dict()) == list(network.state_dict())
    assert "stages.0.layer1.conv1.weight" in again.state_dict()
    assert torch.equal(again.eval()(IMAGES)[-1], network.eval()(IMAGES)[-1])


def test_a_branch_of_training_that_is_switched_off():
    def run(m, x):
        x = torch.relu(m.a(x))
        if m.training and m.aux:
            return m.b(x), x
        return m.b(torch.relu(m.c(x)) + x)

    backbone = BackboneOf(run, **{name: nn.Linear(6, 6) for name in "abc"})
    backbone.aux, x = False, torch.randn(4, 6)
    network = add_exits(backbone, at=["a"], num_classes=6, example=x)
    for mode in (True, False):
        assert torch.equal(network.train(mode)(x)[-1], backbone.train(mode)(x))
    backbone.aux = True
    with pytest.raises(BackboneCutError, match="in training it returns more than logits"):
        add_exits(backbone, at=["a"], num_classes=6, example=x)


def without_gradient(m, x):
    with torch.no_grad():
        x = m.a(x)
    return m.b(x)


def moves_its_buffer(m, x):
    m.mean.mul_(0.9)
    return m.b(m.a(x)) - m.mean


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda m, x: m.b(m.a(x)) * float(torch.rand(1) < 2), "draws random numbers"),
        (lambda m, x: m.b(m.a(x)) * random.random(), "draws random numbers"),
        (lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(x), r"line \d+ of test_graph_cut.py"),
        (lambda m, x: m.b(m.a(x)) if len(x) > 1 else m.b(x), r"line \d+ of test_graph_cut.py"),
        (lambda m, x: m.b(m.a(x) - m.a.weight.mean(0) - x.mean(0)), "other samples of its batch"),
    ],
)
def test_what_pieces_would_not_do_is_refused_in_one_line(run, why):
    backbone, x = with_statistics(run), torch.zeros(1, 6)
    with pytest.raises(BackboneCutError, match=why) as caught:
        add_exits(backbone, at=["a"], num_classes=6, example=x)
    assert "\n" not in str(caught.value)
    assert backbone.mean.tolist() == [0.0] * 6


@pytest.mark.parametrize("run", [without_gradient, moves_its_buffer])
def test_what_torch_fx_would_lose_is_kept_by_torch_export(run):
    backbone, x = with_statistics(run), torch.randn(2, 6)
    network = add_exits(backbone, at=["a"], num_classes=6, example=x).eval()
    assert torch.equal(network(x)[-1], backbone.eval()(x))
    network(x)[-1].sum().backward()
    assert (backbone.a.weight.grad is None) == (run is without_gradient)


def test_modules_that_run_in_another_order_in_training():
    backbone = BackboneOf(
        lambda m, x: m.c(m.a(m.b(x)) if m.training else m.b(m.a(x))),
        **{name: nn.Linear(6, 6) for name in "abc"},
    )
    with pytest.raises(BackboneCutError, match=r"after a, b together: in training"):
        add_exits(backbone, at=["a", "b"], num_classes=6, example=torch.randn(2, 6))


def test_a_method_train_of_its_own_is_refused():
    class FrozenNorm(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    backbone = FrozenNorm(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    with pytest.raises(BackboneCutError, match=r"own method train\(\) sets the mode of '1'"):
        add_exits(backbone, at=["0"], num_classes=CLASSES, example=torch.randn(2, 6))


def test_what_the_forward_sets_is_no_stand_in_afterwards():
    def run(m, x):
        m.seen = m.a(x)
        return m.b(m.seen)

    backbone = BackboneOf(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    add_exits(backbone, at=["a"], num_classes=6, example=torch.randn(2, 6))
    assert isinstance(backbone.seen, torch.Tensor)


def test_torchscript_is_refused():
    backbone = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what comes after TorchScript
        scripted = torch.jit.script(backbone)
    with pytest.raises(BackboneCutError, match="pass the module that it was made of"):
        add_exits(scripted, at=["0"], num_classes=CLASSES, example=torch.randn(2, 6))


def test_of_a_compiled_module_the_one_that_was_compiled_is_cut():
    backbone, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES)), torch.ones(2, 6)
    compiled = torch.compile(backbone, backend="eager")
    network = add_exits(compiled, at="1", num_classes=CLASSES, example=x)
    assert torch.equal(network(x)[-1], backbone(x))
    assert network.backbone_state_dict().keys() == backbone.state_dict().keys()


class OddlyNamed(nn.Module):
    """A backbone whose parts are called as attributes of torch.fx's own modules are."""

    def __init__(self):
        super().__init__()
        self.meta, self.graph = nn.Linear(8, 8), nn.Linear(8, 8)
        self.code = nn.Parameter(torch.randn(8))
        self.register_buffer("print_readable", torch.randn(8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.relu(self.meta(x)) * self.code + self.print_readable
        return self.fc(F.relu(self.graph(x)))


def test_parts_may_have_any_name():
    backbone, x = OddlyNamed(), torch.randn(4, 8)
    network = add_exits(backbone, at=["meta", "graph"], num_classes=CLASSES, example=x)
    for copied in (network, pickle.loads(pickle.dumps(network))):
        assert torch.equal(copied.eval()(x)[-1], backbone.eval()(x))


def test_a_part_named_by_a_word_of_python_is_refused():
    backbone = BackboneOf(
        lambda m, x: m.fc(F.relu(m.attention["global"](x))),
        attention=nn.ModuleDict({"global": nn.Linear(8, 8)}),
        fc=nn.Linear(8, CLASSES),
    )
    with pytest.raises(
        BackboneCutError, match=r"'attention\.global.* is named by a word of Python's"
    ):
        add_exits(backbone, at=["fc"], num_classes=CLASSES, example=torch.randn(2, 8))
