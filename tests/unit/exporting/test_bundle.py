import math
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import offramp.exporting.bundle as export_module
from offramp.calibration.chosen import Calibration
from offramp.errors import ArtifactError, ExportMismatchError, InvalidArgumentError
from offramp.exporting.bundle import check_parity, export
from offramp.exporting.graph import write_single
from offramp.exporting.onnx import plan_steps
from offramp.exporting.quantize import quantize
from offramp.families.exits import AdaptiveRunner
from offramp.model.multi_exit import MultiExitNetwork
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, never_leave
from offramp.runtime import PlainSession, Session, read_bundle
from offramp.runtime.files import file_sha256
from offramp.runtime.preprocessing import Preprocessing, TextPreprocessing
from offramp.zoo.mlp import mlp

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
POLICIES = {
    "thresholds": ThresholdPolicy((0.03, 0.02)),
    "an exit off": ThresholdPolicy((math.inf, 0.09), rule="margin"),
    "temperatures": ThresholdPolicy((0.5, 0.5), "max_probability", (0.5, 0.5, 2.0)),
    "patience": PatiencePolicy(2, 3),
}


@pytest.fixture(scope="module", params=POLICIES.values(), ids=POLICIES)
def exported(request, tmp_path_factory):
    """A network, its policy, and the bundle that was written of them."""
    torch.manual_seed(0)
    network = mlp(in_features=6, widths=(5, 8, 7), num_classes=4).eval()
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    names = ("a", "b", "c", "d")
    export(network, request.param, folder, X, class_names=names, plain=False)
    return network, request.param, folder


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_session_answers_as_the_runner_does(exported, batch_size):
    network, policy, folder = exported
    session, runner = Session(folder), AdaptiveRunner(network, policy)
    for batch in X.split(batch_size)[:8]:
        found, expected = session.run(batch), runner.run(batch)
        assert found.exit_index.tolist() == expected.exit_index.tolist()
        assert found.macs.tolist() == expected.macs.tolist()
        np.testing.assert_allclose(found.output, expected.output, atol=1e-5)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)


def test_single_samples_run_as_one_graph_that_skips(exported):
    _, _, folder = exported
    bundle = read_bundle(folder)
    one_by_one = [Session(folder).run(x) for x in X[:40, None]]
    step_by_step = Session(replace(bundle, single_file=None)).run(X[:40])
    assert [int(r.exit_index[0]) for r in one_by_one] == step_by_step.exit_index.tolist()
    found = np.concatenate([result.output for result in one_by_one])
    np.testing.assert_allclose(found, step_by_step.output, atol=1e-6)
    # What an If skips is inside it: the main graph holds no more than the first step.
    single = onnx.load(folder / bundle.single_file).graph
    first = onnx.load(folder / bundle.steps[0].file).graph
    assert [node.op_type for node in single.node] == [
        *(node.op_type for node in first.node),
        "If",
    ]


def test_a_wrong_file_for_single_samples_is_found(tmp_path, network, monkeypatch):
    policy = ThresholdPolicy((0.03, 0.02))
    other = mlp(in_features=6, widths=(5, 8, 7), num_classes=4).eval()
    others = export(other, policy, tmp_path / "other", X, plain=False)

    def write_another(bundle, *_):
        shutil.copy(others.folder / others.single_file, bundle.folder)
        return replace(bundle, single_file=others.single_file, single_sha256=others.single_sha256)

    monkeypatch.setattr(export_module, "write_single", write_another)
    with pytest.raises(ExportMismatchError, match=r"of 64 samples went another way"):
        export(network, policy, tmp_path / "bundle", X, plain=False)
    assert not (tmp_path / "bundle").exists()


def test_the_samples_spread_over_the_exits(exported):
    network, policy, _ = exported
    on = {k for k in range(3) if not policy.is_off(k)}
    if isinstance(policy, PatiencePolicy):
        on = {1, 2}  # one exit alone is no streak
    assert set(AdaptiveRunner(network, policy).run(X).exit_index.tolist()) == on


def test_description_is_complete(exported):
    network, policy, folder = exported
    bundle = read_bundle(folder)
    assert [step.exit_index for step in bundle.steps] == [
        k for k in range(3) if not policy.is_off(k)
    ]
    costs = network.costs(X)
    assert bundle.plain_macs == costs.plain_macs
    assert sum(step.stage_macs for step in bundle.steps) == sum(costs.stage_macs)
    assert bundle.steps[-1].payload_bytes == 0
    width = {0: 5, 1: 8}[bundle.steps[0].exit_index]
    state_bytes = 16 if isinstance(policy, PatiencePolicy) else 0
    assert bundle.steps[0].payload_bytes == 4 * width + state_bytes
    assert sum(step.parameter_bytes for step in bundle.steps) == sum(
        4 * p.numel() for step in bundle.steps for p in _parameters_up_to(network, policy, step)
    )
    assert bundle.class_names == ("a", "b", "c", "d")
    assert set(bundle.versions) == {"offramp", "torch", "onnxruntime"}


def _parameters_up_to(network, policy, step):
    plan = {plan.exit_index: plan for plan in plan_steps(policy)}[step.exit_index]
    modules = [network.stages[k] for k in plan.stages] + [network.exits[step.exit_index]]
    return [p for module in modules for p in module.parameters()]


def test_head_of_an_exit_that_is_off_is_nowhere(tmp_path, network):
    export(network, never_leave(3), tmp_path / "bundle", X, plain=False)
    assert [path.name for path in sorted((tmp_path / "bundle").iterdir())] == [
        "bundle.json",
        "single.onnx",
        "step_2.onnx",
    ]
    plain_size = sum(p.numel() for p in network.plain().parameters())
    for name in ("single.onnx", "step_2.onnx"):
        weights = onnx.load(tmp_path / "bundle" / name).graph.initializer
        sizes = sum(math.prod(w.dims) for w in weights if w.data_type == onnx.TensorProto.FLOAT)
        assert plain_size <= sizes <= plain_size + 8  # constants of the decision


class Residual(nn.Module):
    """Hands on two tensors, of which the next stage uses both."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, skip=None):
        return self.linear(x).relu(), x if skip is None else x + skip


class SumHead(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, x, skip):
        return self.linear(x + skip)


def test_several_tensors_cross_a_cut(tmp_path):
    torch.manual_seed(0)
    network = MultiExitNetwork([Residual(6), Residual(6)], [SumHead(6), SumHead(6)]).eval()
    policy = ThresholdPolicy((0.1,))
    export(network, policy, tmp_path / "bundle", X, plain=False)
    assert [spec.name for spec in read_bundle(tmp_path / "bundle").steps[1].features] == [
        "features_0",
        "features_1",
    ]
    found = Session(tmp_path / "bundle").run(X)
    assert set(found.exit_index) == {0, 1}
    expected = AdaptiveRunner(network, policy).run(X)
    np.testing.assert_allclose(found.output, expected.output, atol=1e-5)


def test_bundle_is_replaced_and_nothing_else_is(tmp_path, network):
    folder = tmp_path / "bundle"
    export(network, ThresholdPolicy((0.1, 0.1)), folder, X, plain=False)
    export(network, never_leave(3), folder, X, plain=False)
    assert len(read_bundle(folder).steps) == 1
    assert list(tmp_path.iterdir()) == [folder]

    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear reader")
    with pytest.raises(ArtifactError, match="exists and is no bundle"):
        export(network, never_leave(3), other, X)
    assert (other / "letter.txt").read_text() == "dear reader"
    assert sorted(tmp_path.iterdir()) == [folder, other]


def test_mismatch_writes_nothing_and_names_the_exit(tmp_path, network, monkeypatch):
    other = mlp(in_features=6, widths=(5, 8, 7), num_classes=4).eval()
    export(other, never_leave(3), tmp_path / "other", X, plain=False)
    with pytest.raises(ExportMismatchError, match="at exit 2"):
        check_parity(Session(tmp_path / "other"), network, never_leave(3), X)

    def broken(*arguments, **options):
        raise ExportMismatchError("logits differ")

    monkeypatch.setattr(export_module, "_check_bundle", broken)
    with pytest.raises(ExportMismatchError):
        export(network, never_leave(3), tmp_path / "bundle", X, plain=False)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_policy_for_another_network_is_refused(tmp_path, network):
    with pytest.raises(InvalidArgumentError, match=r"3 exits. Got one for 2"):
        export(network, never_leave(2), tmp_path / "bundle", X)
    assert not (tmp_path / "bundle").exists()


def test_a_calibration_stands_for_its_policy(tmp_path, network):
    policy = ThresholdPolicy((0.03, 0.02))
    chosen = Calibration(policy=policy, accuracy=0.5, mean_macs=10.0)
    bundle = export(network, chosen, tmp_path / "bundle", X, plain=False)
    assert bundle.policy == policy_to_dict(policy)


class Branching(nn.Module):
    def forward(self, x):
        return x if bool(x.sum() > 0) else -x


def test_network_that_torch_cannot_export_is_refused_in_one_line(tmp_path):
    network = MultiExitNetwork([Branching()], [nn.Linear(6, 3)]).eval()
    with pytest.raises(ArtifactError, match="cannot export this network") as refused:
        export(network, never_leave(1), tmp_path / "bundle", X)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_weights_decide_the_hash(tmp_path, network):
    first = export(network, never_leave(3), tmp_path / "a", X, plain=False)
    with torch.no_grad():
        network.exits[-1].bias.add_(1)
    changed = export(network, never_leave(3), tmp_path / "a", X, plain=False)
    assert first.weights_sha256 != changed.weights_sha256


def test_plain_network_is_added_and_what_export_returns_is_what_is_read(tmp_path, network):
    written = export(network, never_leave(3), tmp_path / "bundle", X)
    assert read_bundle(tmp_path / "bundle") == written
    with torch.no_grad():
        expected = network.plain()(X)
    np.testing.assert_allclose(PlainSession(written).run(X), expected, atol=1e-5)


def test_branches_that_no_sample_takes_are_checked_too(tmp_path, network, monkeypatch):
    """Everybody leaves at once; a wrong weight waits behind the If."""

    def write_and_spoil(bundle, *arguments):
        written = write_single(bundle, *arguments)
        path = bundle.folder / written.single_file
        model = onnx.load(path)
        (branch,) = (node for node in model.graph.node if node.op_type == "If")
        later = next(a.g for a in branch.attribute if a.name == "else_branch")
        matrix = next(w for w in later.initializer if len(w.dims) == 2)
        matrix.CopyFrom(
            onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(matrix), matrix.name)
        )
        onnx.save(model, path)
        return replace(written, single_sha256=file_sha256(path))

    monkeypatch.setattr(export_module, "write_single", write_and_spoil)
    with pytest.raises(ExportMismatchError, match="logits differ"):
        export(network, ThresholdPolicy((0.0, 0.0)), tmp_path / "bundle", X, plain=False)


def test_networks_in_double_precision_are_exported(tmp_path, network):
    inputs, policy = X.double(), ThresholdPolicy((0.03, 0.02))
    export(network.double(), policy, tmp_path / "bundle", inputs)
    found = Session(tmp_path / "bundle").run(inputs[:1])
    expected = AdaptiveRunner(network, policy).run(inputs[:1])
    assert found.output.dtype == np.float64
    np.testing.assert_allclose(found.output, expected.output, atol=1e-12)


# Precision


class UnderAutocast(nn.Module):
    """Computes in half precision although its weights are float32."""

    def __init__(self, precision):
        super().__init__()
        self.layer, self.precision = nn.Linear(6, 6), precision

    def forward(self, x):
        with torch.autocast("cpu", self.precision):
            return self.layer(x).float()


def small():
    return mlp(in_features=6, widths=(5, 8), num_classes=4)


def with_weight(weight):
    network = small()
    network.register_parameter("extra", nn.Parameter(weight, requires_grad=False))
    return network


def with_half_heads():
    network = small()
    network.exits.half()
    return network


def with_a_head_in_double():
    network = small()
    network.exits[0].double()
    return network


class Packed(nn.Module):
    """Keeps its weights as quantised modules do: packed, as something else than a tensor."""

    def get_extra_state(self):
        return (b"weights", 0.1)


def with_packed_weights():
    network = small()
    network.extra = Packed()
    return network


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (small().half(), r"stages.0.* is torch.float16"),
        (small().bfloat16(), r"stages.0.* is torch.bfloat16"),
        (with_half_heads(), r"exits.0.* is torch.float16"),
        (with_a_head_in_double(), r"exits.0.* is torch.float64"),
        (with_weight(torch.zeros(2, dtype=torch.complex64)), "extra is torch.complex64"),
        (with_packed_weights(), "extra._extra_state is quantised"),
    ],
    ids=["float16", "bfloat16", "heads", "a head", "complex", "quantised"],
)
def test_weights_of_another_precision_are_refused_before_anything_is_written(
    tmp_path, network, words
):
    with pytest.raises(InvalidArgumentError, match=f"all in float64 precision, and {words}"):
        export(network, ThresholdPolicy((0.5,)), tmp_path / "bundle", X)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("precision", [torch.float16, torch.float64])
def test_samples_of_another_precision_become_the_network_s(tmp_path, precision):
    samples = X.to(precision)
    bundle = export(small(), ThresholdPolicy((0.5,)), tmp_path / "bundle", samples, plain=False)
    assert Session(bundle).run(X.numpy()).output.dtype == np.float32


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_inside_is_refused(tmp_path, precision):
    stages = [UnderAutocast(precision), nn.Linear(6, 5)]
    network = MultiExitNetwork(stages, [nn.Linear(6, 4), nn.Linear(5, 4)])
    with pytest.raises(ArtifactError, match="computes in half precision inside"):
        export(network, ThresholdPolicy((0.5,)), tmp_path / "bundle", X)


def test_buffers_that_are_not_computed_with_may_be_of_any_precision(tmp_path):
    network = small()
    for precision in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        buffer = torch.tensor(1, dtype=precision)
        network.register_buffer(str(precision).replace(".", "_"), buffer)
    bundle = export(network, ThresholdPolicy((0.5,)), tmp_path / "bundle", X, plain=False)
    assert Session(bundle).run(X[:3]).output.dtype == np.float32


def pictures_network():
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 2))]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)) for _ in stages]
    return MultiExitNetwork(stages, heads).eval()


CHOSEN = {
    "asked": {"max_drop": 0.01},
    "data": {
        "name": "mine",
        "split": "validation",
        "num_samples": 9,
        "class_prior": "as drawn",
        "sha256": "0" * 64,
    },
    "reached": {"accuracy": 0.5, "mean_macs": 3.0},
}


def test_preprocessing_and_calibration_are_kept(tmp_path):
    preprocessing = Preprocessing(height=8, width=8, channels=1, mean=0.5, deviation=0.25)
    bundle = export(
        pictures_network(),
        ThresholdPolicy((0.3,)),
        tmp_path / "bundle",
        torch.randn(20, 1, 8, 8),
        preprocessing=preprocessing,
        plain=False,
        calibration={"policy": {"kind": "threshold"}, **CHOSEN},
    )
    read = read_bundle(tmp_path / "bundle")
    assert read == bundle
    assert read.preprocessing == preprocessing
    assert (read.calibration.data.split, read.calibration.guarantee) == ("validation", None)
    small = quantize(bundle, tmp_path / "int8", torch.randn(20, 1, 8, 8))
    assert read_bundle(tmp_path / "int8").preprocessing == preprocessing
    assert (small.calibration.data, small.calibration.reached) == (read.calibration.data, None)


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        (Preprocessing(height=9, width=8, channels=1), r"\(1, 9, 8\)"),
        (Preprocessing(height=8, width=8), r"\(3, 8, 8\)"),
        (TextPreprocessing(tokenizer='{"model": {}}', max_tokens=3), "token ids"),
        ({"height": 8}, "Got a dict"),
    ],
)
def test_preprocessing_for_other_inputs_is_refused(preprocessing, words, tmp_path):
    with pytest.raises(InvalidArgumentError, match=words):
        export(
            pictures_network(),
            ThresholdPolicy((0.3,)),
            tmp_path / "bundle",
            torch.randn(20, 1, 8, 8),
            preprocessing=preprocessing,
            plain=False,
        )
    assert not (tmp_path / "bundle").exists()


def test_without_a_policy_every_exit_is_on_and_left_by_the_certain(network, tmp_path):
    bundle = export(network, None, tmp_path / "bundle", X, plain=False)
    assert [step.threshold for step in bundle.steps] == [1.0, 1.0, 0.0]
    assert bundle.policy["rule"] == "entropy"
    assert set(Session(bundle).run(X).exit_index.tolist()) == {2}


def test_without_a_policy_gates_are_as_they_were_trained(skip_network, tmp_path):
    images = torch.randn(20, 3, 16, 16)
    bundle = export(skip_network, None, tmp_path / "bundle", images, plain=False)
    assert bundle.policy["threshold"] == 0.5
