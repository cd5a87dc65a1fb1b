"""A bundle of a network that skips blocks, put together by hand so that its answers are known.

An input row is (p0, p1, value). Gate 0 runs its block where p0 reaches the threshold, and remembers
p1 for gate 1, which goes by it. Block 0 adds 10 to the row; block 1 keeps its last two columns and
doubles them, the way around it keeps them as they are.
"""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import offramp.runtime.loading as loading
from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError
from offramp.exporting.graph import write_single
from offramp.exporting.skip import join_skip
from offramp.runtime import (
    Bundle,
    PlainSession,
    Session,
    read_bundle,
    with_routing_threshold,
    with_thresholds,
)
from offramp.runtime.bundle import write_bundle
from offramp.runtime.files import OnnxFile, TensorSpec, file_sha256
from offramp.runtime.skip_parts import SkipParts, SkipStep

X = np.random.default_rng(0).uniform(size=(32, 3)).astype(np.float32)


def write_onnx(path, inputs, outputs, nodes, **constants):
    """One small file; kinds of its outputs by name, nodes as (operation, inputs, outputs, ...)."""
    free = {name: ["B", "W"] for name in inputs} | {"threshold": [], "state": ["B"]}
    graph = helper.make_graph(
        [
            helper.make_node(kind, given, made, name=f"{path.stem}_{i}", **attributes)
            for i, (kind, given, made, attributes) in enumerate(nodes)
        ],
        path.stem,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, free[n]) for n in inputs],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return OnnxFile(name=path.name, sha256=file_sha256(path))


def write_gate(path, index):
    """Less and Not, so that NaN runs; gate 0 takes p0 from the row, gate 1 what is remembered."""
    number = TensorProto.FLOAT
    remember = ("Gather", ["features", "one"], ["next_state"], {"axis": 1})
    if index == 0:
        nodes = [("Gather", ["features", "zero"], ["p"], {"axis": 1}), remember]
        inputs = ["features", "threshold"]
    else:
        nodes = [("Identity", ["state"], ["p"], {}), remember]
        inputs = ["features", "state", "threshold"]
    decide = [("Less", ["p", "threshold"], ["skip"], {}), ("Not", ["skip"], ["run"], {})]
    outputs = {"run": TensorProto.BOOL, "p": number, "next_state": number}
    return write_onnx(path, inputs, outputs, [*nodes, *decide], zero=0, one=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    number = {"next_features": TensorProto.FLOAT}

    def write(name, *nodes, **constants):
        path = folder / f"{name}.onnx"
        return write_onnx(path, ["features"], number, nodes, **constants)

    last_two = ("Gather", ["features", "last"], ["rest"], {"axis": 1})
    ten, two = np.float32(10), np.float32(2)
    steps = (
        SkipStep(
            gate=write_gate(folder / "gate_0.onnx", 0),
            block=write("block_0", ("Add", ["features", "ten"], ["next_features"], {}), ten=ten),
            around=None,
            gate_macs=1,
            block_macs=20,
        ),
        SkipStep(
            gate=write_gate(folder / "gate_1.onnx", 1),
            block=write(
                "block_1",
                last_two,
                ("Mul", ["rest", "two"], ["next_features"], {}),
                last=[1, 2],
                two=two,
            ),
            around=write(
                "around_1", last_two, ("Identity", ["rest"], ["next_features"], {}), last=[1, 2]
            ),
            gate_macs=2,
            block_macs=300,
        ),
    )
    parts = SkipParts(
        input=TensorSpec(name="features", dtype="float32", sample_shape=(3,)),
        stem=write("stem", ("Identity", ["features"], ["next_features"], {})),
        steps=steps,
        head=write_onnx(
            folder / "head.onnx",
            ["features"],
            {"output": TensorProto.FLOAT, "confidence": TensorProto.FLOAT},
            [
                ("Identity", ["features"], ["output"], {}),
                ("ReduceMax", ["features", "axes"], ["confidence"], {"keepdims": 0}),
            ],
            axes=[1],
        ),
        threshold=0.5,
        fixed_macs=4000,
    )
    made = Bundle(
        folder=folder,
        family="skip",
        steps=(),
        num_exits=1,
        class_names=("yes", "no"),
        plain_file=None,
        plain_sha256=None,
        plain_macs=4320,
        policy={"kind": "gates", "threshold": 0.5},
        recipe=None,
        quantized=None,
        weights_sha256="0" * 64,
        versions={"offramp": "0.1.0"},
        skip=parts,
    )
    made = write_single(made, join_skip)
    write_bundle(made)
    return made


@pytest.fixture
def changed(bundle, tmp_path):
    """A copy that a test may spoil."""
    for path in bundle.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def by_hand(x, threshold):
    """Output and blocks, from the description at the top."""
    blocks = ~(x[:, :2] < np.float32(threshold))
    x = x + 10 * blocks[:, :1]
    return x[:, 1:] * np.where(blocks[:, 1:], 2, 1), blocks


def test_running_every_block_and_choosing_afterwards_says_the_same(bundle):
    output, blocks, probability = Session(bundle).run_every_block(X)
    expected, wanted = by_hand(X, 0.5)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    np.testing.assert_array_equal(blocks, wanted)
    np.testing.assert_array_equal(probability, X[:, :2])


def check(result, x, threshold):
    output, blocks = by_hand(x, threshold)
    np.testing.assert_array_equal(result.blocks, blocks)
    np.testing.assert_allclose(result.output, output, rtol=1e-6)
    np.testing.assert_allclose(result.confidence, output.max(1), rtol=1e-6)
    assert result.macs.tolist() == (4003 + blocks @ [20, 300]).tolist()
    assert result.exit_index.tolist() == [0] * len(x)
    assert result.blocks.dtype == bool
    assert result.exit_index.dtype == result.macs.dtype == np.int64


def step_by_step(bundle):
    """Without the file for single samples."""
    return replace(bundle, single_file=None, single_sha256=None)


@pytest.mark.parametrize("make", [lambda bundle: bundle, step_by_step], ids=["one graph", "steps"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0], ids=["all", "some", "none"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_answers_are_those_worked_out_by_hand(bundle, make, threshold, batch_size):
    session = Session(make(with_routing_threshold(bundle, threshold)), threads=1)
    for x in np.split(X, range(batch_size, len(X), batch_size)):
        check(session.run(x), x, threshold)


def test_the_threshold_itself_runs_and_so_does_nan(bundle):
    x = np.array([[0.5, np.nan, 1], [np.nan, 0.5, 1], [0.49, 0.49, 1]], dtype=np.float32)
    expected = [[True, True], [True, True], [False, False]]
    assert Session(bundle).run(x).blocks.tolist() == expected
    assert [Session(bundle).run(row[None]).blocks[0].tolist() for row in x] == expected


def test_what_comes_in_is_left_as_it_was(bundle):
    """Though the stem hands it on as it is, and blocks write on what they are handed."""
    x = X.copy()
    Session(bundle).run(x)
    Session(step_by_step(bundle)).run(x[:1])
    np.testing.assert_array_equal(x, X)


@pytest.fixture
def calls(monkeypatch):
    """Which files ran, on how many samples."""
    found = []

    class Counting:
        def __init__(self, path, *arguments, **options):
            self._name = getattr(path, "name", "single.onnx")
            self._session = onnxruntime_session(path, *arguments, **options)
            self.get_inputs = self._session.get_inputs

        def run(self, names, feed):
            found.append((self._name, len(next(iter(feed.values())))))
            return self._session.run(names, feed)

    onnxruntime_session = onnxruntime.InferenceSession
    monkeypatch.setattr(loading.onnxruntime, "InferenceSession", Counting)
    return found


def test_blocks_run_on_those_that_want_them_and_on_no_others(bundle, calls):
    result = Session(bundle).run(X)
    first, second = result.blocks.sum(0).tolist()
    assert 0 < first < 32
    assert 0 < second < 32
    assert calls == [
        ("stem.onnx", 32),
        ("gate_0.onnx", 32),
        ("block_0.onnx", first),
        ("gate_1.onnx", 32),
        ("block_1.onnx", second),
        ("around_1.onnx", 32 - second),
        ("head.onnx", 32),
    ]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, ["stem", "gate_0", "block_0", "gate_1", "block_1", "head"]),
        (1.0, ["stem", "gate_0", "gate_1", "around_1", "head"]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_where_all_go_one_way_nothing_is_taken_apart(
    bundle, calls, threshold, expected, batch_size
):
    Session(step_by_step(with_routing_threshold(bundle, threshold))).run(X[:batch_size])
    assert calls == [(f"{name}.onnx", batch_size) for name in expected]


def test_a_single_sample_is_one_call(bundle, calls):
    Session(bundle).run(X[:1])
    assert calls == [("single.onnx", 1)]


@pytest.mark.parametrize(
    ("x", "branches"),
    [
        ([1, 1, 0], {"block_0", "block_1"}),
        ([1, 0, 0], {"block_0", "around_1"}),
        ([0, 0, 0], {"around_1"}),
    ],
)
def test_in_one_graph_what_is_skipped_does_not_run(bundle, tmp_path, x, branches):
    """By onnxruntime's own account of which nodes ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(bundle.folder / "single.onnx", options)
    session.run(None, {"features": np.array([x], dtype=np.float32)})
    with open(session.end_profiling(), encoding="utf-8") as file:
        ran = {event["name"].split("/")[0] for event in json.load(file) if "/" in event["name"]}
    assert {name for name in ran if name.startswith(("block", "around"))} == branches


def test_single_samples_follow_a_threshold_set_anew(bundle):
    for threshold in (0.1, 0.9):
        session = Session(with_routing_threshold(bundle, threshold))
        for x in X[:10, None]:
            check(session.run(x), x, threshold)


def test_a_threshold_set_anew_is_written_and_read(bundle, changed):
    made = with_routing_threshold(read_bundle(changed), 0.9)
    assert made.policy == {"kind": "gates", "threshold": 0.9}
    write_bundle(made)
    assert read_bundle(changed) == made
    check(Session(changed).run(X), X, 0.9)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_must_be_a_probability(bundle, threshold):
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\]"):
        with_routing_threshold(bundle, threshold)


def test_thresholds_of_exits_are_refused(bundle):
    with pytest.raises(InvalidArgumentError, match="use with_routing_threshold"):
        with_thresholds(bundle, [0.5])


def test_what_was_written_is_read(bundle):
    assert read_bundle(bundle.folder) == bundle
    assert read_bundle(bundle.folder).inputs == (bundle.skip.input,)


def test_threads_may_share_a_session(bundle):
    session, failures = Session(bundle, threads=1), []

    def work():
        for x in (X, X[:5], X[:1]) * 20:
            try:
                check(session.run(x), x, 0.5)
            except AssertionError as failure:
                failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_it_runs_where_torch_cannot_be_imported(bundle):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from offramp.runtime import Session\n"
        f"session = Session({str(bundle.folder)!r}, threads=1)\n"
        "print([session.run([[0.9, 0.1, 1.0]] * n).blocks.tolist() for n in (1, 2)])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    ran = [True, False]
    assert outcome.stdout.strip() == str([[ran], [ran, ran]]), outcome.stderr


def test_inputs_of_another_shape_are_refused(bundle):
    with pytest.raises(ShapeError, match=r"\(B, 3\), B at least 1"):
        Session(bundle).run(X[:, :2])


def test_its_steps_have_no_exits_to_be_run_up_to(bundle):
    with pytest.raises(InvalidArgumentError, match="family skip: its steps give no answers"):
        Session(bundle).run_step(0, [X])


def test_it_has_no_plain_network(bundle):
    with pytest.raises(ArtifactError, match="no plain network"):
        PlainSession(bundle)


@pytest.mark.parametrize("name", ["stem", "gate_1", "block_0", "around_1", "head", "single"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"other")])
def test_missing_and_changed_files_are_refused(changed, name, damage):
    damage(changed / f"{name}.onnx")
    with pytest.raises(ArtifactError, match=rf"{name}\.onnx is missing or not the file"):
        Session(changed)


def test_file_that_onnxruntime_cannot_load_is_refused_in_one_line(bundle, changed):
    (changed / "block_1.onnx").write_bytes(b"not onnx")
    spoilt = replace(
        bundle.skip.steps[1],
        block=OnnxFile(name="block_1.onnx", sha256=file_sha256(changed / "block_1.onnx")),
    )
    skip = replace(bundle.skip, steps=(bundle.skip.steps[0], spoilt))
    with pytest.raises(ArtifactError, match=r"cannot load .*block_1\.onnx") as refused:
        Session(replace(bundle, folder=changed, skip=skip))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("skip"),
        lambda content: content.update(skip=None),
        lambda content: content.update(skip="blocks"),
        lambda content: content["skip"].update(steps=[]),
        lambda content: content["skip"].update(threshold="high"),
        lambda content: content["skip"].pop("head"),
        lambda content: content["skip"].update(surprise=1),
        lambda content: content["skip"]["stem"].update(name="../stem.onnx"),
        lambda content: content["skip"]["stem"].update(name=3),
        lambda content: content["skip"]["input"].pop("sample_shape"),
        lambda content: content["skip"]["steps"][0].pop("around"),
        lambda content: content["skip"]["steps"][1].update(around="around_1.onnx"),
        lambda content: content.update(family="exits"),
    ],
)
def test_damaged_description_is_refused(changed, change):
    path = changed / "bundle.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"is damaged .* Export the run again"):
        read_bundle(changed)
