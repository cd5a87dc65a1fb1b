from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from small_backbones import BackboneOf
from torch import nn

from offramp.errors import ArtifactError, BackboneCutError, InvalidArgumentError, ShapeError
from offramp.model.cut import add_exits

CLASSES = 3
Answer = namedtuple("Answer", "logits features")


class InOrder(nn.Module):
    """Calls its children one after the other, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Conv2d(4, 6, 3, stride=2)
        self.flat = nn.Flatten()
        self.classifier = nn.Linear(6 * 3 * 3, CLASSES)

    def forward(self, x):
        return self.classifier(self.flat(self.body(self.stem(x))))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )


def nested() -> nn.Sequential:
    blocks = nn.Sequential(
        OrderedDict(one=nn.Sequential(nn.Linear(5, 5), nn.ReLU()), two=nn.Linear(5, 8))
    )
    return nn.Sequential(OrderedDict(stem=nn.Linear(6, 5), blocks=blocks, last=nn.Linear(8, 3)))


VECTORS, IMAGES = (2, 6), (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("backbone", "at", "shape"),
    [
        pytest.param(perceptron(), [], VECTORS, id="no cut"),
        pytest.param(perceptron(), ["1", "3"], VECTORS, id="sequential"),
        pytest.param(nested(), ["blocks.one.1", "blocks"], VECTORS, id="inside and whole"),
        pytest.param(nested(), ["stem", "blocks.one.0", "blocks.two"], VECTORS, id="nested"),
        pytest.param(nested(), ["blocks"], VECTORS, id="a whole block"),
        pytest.param(InOrder(), ["stem.2", "body", "flat"], IMAGES, id="own forward"),
    ],
)
def test_final_exit_equals_the_backbone(backbone, at, shape):
    x = torch.randn(shape)
    network = add_exits(backbone, at=at, num_classes=CLASSES, example=x).eval()
    backbone.eval()
    outputs = network(torch.cat([x, -x]))
    assert [tuple(output.shape) for output in outputs] == [(4, CLASSES)] * (len(at) + 1)
    assert torch.equal(outputs[-1], backbone(torch.cat([x, -x])))
    assert torch.equal(network.plain()(x), backbone(x))


def test_exits_read_the_features_at_their_path():
    backbone = perceptron()
    heads = [nn.Linear(5, CLASSES), nn.Linear(8, CLASSES)]
    x = torch.randn(VECTORS)
    network = add_exits(backbone, at=["1", "3"], num_classes=CLASSES, example=x, heads=heads)
    first, second, _ = network(x)
    assert torch.equal(first, heads[0](backbone[:2](x)))
    assert torch.equal(second, heads[1](backbone[:4](x)))


def test_modules_are_shared_not_copied():
    backbone = perceptron()
    network = add_exits(backbone, at=["1"], num_classes=CLASSES, example=torch.randn(VECTORS))
    assert {id(p) for p in backbone.parameters()} <= {id(p) for p in network.parameters()}


def test_a_module_that_is_used_twice_runs_twice():
    relu = nn.ReLU()
    backbone = nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 8), relu, nn.Linear(8, CLASSES))
    x = torch.randn(VECTORS)
    network = add_exits(backbone, at=["1"], num_classes=CLASSES, example=x)
    assert torch.equal(network(x)[-1], backbone(x))


def test_cutting_leaves_modes_and_statistics_alone():
    backbone = InOrder().train()
    backbone.stem.eval()
    add_exits(backbone, at=["body"], num_classes=CLASSES, example=torch.randn(IMAGES))
    assert backbone.training
    assert not backbone.stem[1].training
    assert backbone.stem[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("at", "named"),
    [
        (["blocks.on"], "blocks.one"),
        (["stm"], "stem"),
        (["blocks.one.7"], "blocks.one.0"),
        ([""], "stem"),
    ],
)
def test_unknown_path_names_the_nearest(at, named):
    with pytest.raises(BackboneCutError) as caught:
        add_exits(nested(), at=at, num_classes=CLASSES, example=torch.randn(VECTORS))
    message = str(caught.value)
    assert repr(at[0]) in message
    assert named in message.partition("Nearest")[2]


def test_a_string_is_one_path():
    x = torch.randn(VECTORS)
    network = add_exits(nested(), at="blocks.two", num_classes=CLASSES, example=x)
    assert network.num_exits == 2
    with pytest.raises(BackboneCutError, match="cannot be cut after 'layer1'"):
        add_exits(nested(), at="layer1", num_classes=CLASSES, example=x)
    for at, came in (([1], r"\[1\]"), (1, "1"), (None, "None")):
        with pytest.raises(InvalidArgumentError, match=rf"paths of modules.*Got {came}\."):
            add_exits(nested(), at=at, num_classes=CLASSES, example=x)


@pytest.mark.parametrize("backbone", ["resnet18", nn.Flatten, lambda x: x])
def test_a_backbone_is_a_module(backbone):
    with pytest.raises(InvalidArgumentError, match=r"Expected an nn\.Module as the backbone"):
        add_exits(backbone, at=["0"], num_classes=CLASSES, example=torch.randn(VECTORS))


def test_ids_of_another_vocabulary():
    backbone = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ShapeError, match="beyond an embedding: is it of another tokenizer's"):
        add_exits(backbone, at=["0"], num_classes=3, example=torch.tensor([[1, 9]]))


def test_an_example_that_the_backbone_does_not_take():
    with pytest.raises(InvalidArgumentError, match=r"does not take inputs \(2, 7\) of float32"):
        add_exits(perceptron(), at=["1"], num_classes=CLASSES, example=torch.randn(2, 7))


@pytest.mark.parametrize("x", [torch.zeros(1, 1, 8, 8), torch.randn(IMAGES)])
def test_functions_between_children_stay(x):
    """Zeros hide them: children in order speak only for what just calls them."""

    class WithFunctions(InOrder):
        def forward(self, x):
            return self.classifier(self.flat(F.relu(self.body(self.stem(x)))) * 0.5)

    backbone = WithFunctions().eval()
    network = add_exits(backbone, at=["body"], num_classes=CLASSES, example=x).eval()
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(network(images)[-1], backbone(images))


def test_a_sequential_with_a_forward_or_a_hook_of_its_own_stays_whole():
    class Halves(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / 2

    hooked = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    for inner in (Halves(nn.Linear(6, 6), nn.ReLU()), hooked):
        backbone, x = nn.Sequential(inner, nn.Linear(6, CLASSES)), torch.randn(4, 6)
        network = add_exits(backbone, at="0", num_classes=CLASSES, example=torch.zeros(1, 6))
        assert torch.equal(network(x)[-1], backbone(x))
        network.run_stage(0, (x,))
    backbone.register_forward_hook(lambda module, inputs, output: output * 2)
    network = add_exits(backbone, at="0", num_classes=CLASSES, example=torch.zeros(1, 6))
    assert torch.equal(network.eval()(x)[-1], backbone.eval()(x))


def test_dropout_in_place_leaves_what_the_exit_read():
    """It works in place only in training; the exit's gradient needs what it read."""
    backbone = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5, inplace=True), nn.Linear(6, CLASSES))
    network = add_exits(backbone, at="0", num_classes=CLASSES, example=torch.zeros(1, 6)).train()
    sum(logits.square().sum() for logits in network(torch.randn(4, 6))).backward()
    features = network.run_stage(0, (torch.randn(4, 6),))
    before = features[0].clone()
    network.run_stage(1, features)
    assert torch.equal(features[0], before)


def test_backbone_without_children_has_no_path():
    with pytest.raises(BackboneCutError, match="Nearest: none"):
        add_exits(nn.Linear(6, 3), at=["0"], num_classes=CLASSES, example=torch.randn(VECTORS))


@pytest.mark.parametrize("at", [["3", "1"], ["1", "1"]])
def test_cuts_must_be_in_order_once_each(at):
    with pytest.raises(BackboneCutError, match=f"in the order .* once. Got {', '.join(at)}"):
        add_exits(perceptron(), at=at, num_classes=CLASSES, example=torch.randn(VECTORS))


def test_no_cut_after_the_end():
    with pytest.raises(
        BackboneCutError, match=r"after '4': the backbone ends there.*Nearest: 2, 3"
    ):
        add_exits(perceptron(), at=["1", "4"], num_classes=CLASSES, example=torch.randn(VECTORS))


def test_backbone_that_returns_no_tensor_or_logits_beside_others():
    with pytest.raises(BackboneCutError, match=r"tensor of logits\. LSTM returns tuple"):
        add_exits(nn.LSTM(6, 3), at=[], num_classes=CLASSES, example=torch.randn(VECTORS))
    backbone = BackboneOf(
        lambda m, x: Answer(m.b(m.a(x)), x), a=nn.Linear(6, 6), b=nn.Linear(6, CLASSES)
    )
    x = torch.randn(VECTORS)
    network = add_exits(backbone, at=["a"], num_classes=CLASSES, example=x).eval()
    assert torch.equal(network(x)[-1], backbone.eval()(x).logits)


def test_complex_features_want_a_head_of_the_callers():
    backbone = BackboneOf(
        lambda m, x: m.b(m.a(x).abs()),
        a=nn.Linear(6, 6, dtype=torch.complex64),
        b=nn.Linear(6, CLASSES),
    )
    x = torch.randn(2, 6, dtype=torch.complex64)
    with pytest.raises(ShapeError, match=r"type torch\.complex64: cut elsewhere"):
        add_exits(backbone, at=["a"], num_classes=CLASSES, example=x)


def test_backbone_with_another_number_of_outputs():
    with pytest.raises(InvalidArgumentError, match=r"4 outputs.*\(2, 3\)"):
        add_exits(perceptron(), at=["1"], num_classes=4, example=torch.randn(VECTORS))


def test_checkpoint_of_the_backbone_loads_key_for_key_and_comes_back():
    backbone, trained = InOrder(), InOrder()
    x = torch.randn(IMAGES)
    trained(torch.randn(IMAGES))  # moves its statistics
    network = add_exits(backbone, at=["stem.1", "body"], num_classes=CLASSES, example=x)
    network.load_backbone_state_dict(trained.state_dict())
    assert torch.equal(network.eval()(x)[-1], trained.eval()(x))
    back = network.backbone_state_dict()
    assert back.keys() == trained.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in trained.state_dict().items())
    InOrder().load_state_dict(back)


def test_weights_that_no_stage_uses_are_kept():
    backbone = InOrder()
    backbone.register_parameter("spare", nn.Parameter(torch.ones(3)))
    backbone.register_buffer("scale", torch.full((1,), 5.0))
    network = add_exits(backbone, at=["body"], num_classes=CLASSES, example=torch.randn(IMAGES))
    assert network.backbone_state_dict().keys() == backbone.state_dict().keys()
    assert network.state_dict()["unused.spare"].tolist() == [1, 1, 1]


def test_tied_weights_have_two_keys_and_one_place():
    backbone = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    backbone[2].weight = backbone[0].weight
    network = add_exits(backbone, at=["1"], num_classes=6, example=torch.randn(VECTORS))
    back = network.backbone_state_dict()
    assert torch.equal(back["0.weight"], back["2.weight"])


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_checkpoint_of_another_backbone_changes_nothing(change):
    network = add_exits(InOrder(), at=["body"], num_classes=CLASSES, example=torch.randn(IMAGES))
    state = {key: tensor + 1 for key, tensor in network.backbone_state_dict().items()}
    if change == "missing":
        del state["body.bias"]
    elif change == "unknown":
        state["body.other"] = torch.ones(1)
    else:
        state["body.bias"] = torch.ones(2)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(
        ArtifactError, match=r"with 11 tensors. 1 are .*, first 'body\.(bias|other)'"
    ):
        network.load_backbone_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_one_head_for_each_cut():
    with pytest.raises(InvalidArgumentError, match=r"each of the 2 cuts. Got 1"):
        add_exits(
            perceptron(),
            at=["1", "3"],
            num_classes=CLASSES,
            example=torch.randn(VECTORS),
            heads=[nn.Linear(5, CLASSES)],
        )


def test_the_example_is_left_as_it_was():
    backbone = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    example = torch.full((1, 4), -1.0)
    add_exits(backbone, at=["0"], num_classes=3, example=example)
    assert (example == -1).all()


def test_exits_answer_in_the_floats_of_the_backbone():
    class Half(InOrder):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    images = torch.randn(IMAGES)
    backbone = Half().bfloat16().eval()
    network = add_exits(backbone, at=["body"], num_classes=CLASSES, example=images.bfloat16())
    first, last = network.eval()(images)
    assert first.dtype == last.dtype == torch.float32
    assert torch.equal(last, backbone(images))


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_a_quantised_network_is_refused_by_its_layer():
    quantised = torch.ao.quantization.quantize_dynamic(perceptron(), {nn.Linear})
    with pytest.raises(BackboneCutError, match=r"its layer '0' is quantised.*depend on the others"):
        add_exits(quantised, at=["1"], num_classes=CLASSES, example=torch.randn(VECTORS))


def test_a_backbone_that_fails_in_training_is_refused_by_its_own_error():
    class Large(InOrder):
        def forward(self, x):
            if self.training:
                F.avg_pool2d(x, 9)
            return super().forward(x)

    with pytest.raises(BackboneCutError, match=r"in training it fails on the example: .*too small"):
        add_exits(Large(), at=["body"], num_classes=CLASSES, example=torch.randn(IMAGES))


def test_samples_that_depend_on_their_batch():
    class Centred(InOrder):
        def forward(self, x):
            return super().forward(x - x.mean(0, keepdim=True))

    with pytest.raises(
        BackboneCutError, match=r"depend on the other samples.*fixed means in place"
    ):
        add_exits(Centred(), at=["body"], num_classes=CLASSES, example=torch.randn(IMAGES))
