from dataclasses import replace
from pathlib import Path

import numpy as np

from offramp.runtime.bundle import Bundle, Padding, Step
from offramp.runtime.files import TensorSpec
from offramp.runtime.step_macs import StepMacs

TOKENS = TensorSpec(name="ids", dtype="int64", sample_shape=(None,))


def step(number, **macs):
    return Step(
        file=f"step_{number}.onnx",
        sha256="",
        exit_index=number,
        temperature=1.0,
        threshold=0.5,
        features=(TOKENS,),
        state=(),
        payload_bytes=0,
        parameter_bytes=0,
        **macs,
    )


# Stages of 10 and 20 MACs a token and a pair of tokens; heads of 3 and 5, the first a token's.
STEPS = (
    step(
        0,
        stage_macs=110,
        head_macs=30,
        exit_macs=140,
        exit_macs_by_length=(0, 13, 0),
        stage_macs_by_length=(0, 10, 0),
    ),
    step(
        1,
        stage_macs=2000,
        head_macs=5,
        exit_macs=2145,
        exit_macs_by_length=(5, 13, 20),
        stage_macs_by_length=(0, 0, 20),
    ),
)
BUNDLE = Bundle(
    folder=Path(),
    family="exits",
    steps=STEPS,
    num_exits=2,
    class_names=(),
    plain_file=None,
    plain_sha256=None,
    plain_macs=2115,
    policy={},
    recipe=None,
    quantized=None,
    weights_sha256="",
    versions={},
    padding=Padding(mask_index=1, pad_id=0),
)
LENGTHS = np.array([2, 10])


def test_plain_network_runs_no_head_but_the_last():
    # 10 T + 20 T^2 + 5
    assert StepMacs(BUNDLE).of_plain(LENGTHS).tolist() == [105, 2105]


def test_exits_cost_what_ran_before_them():
    found = StepMacs(BUNDLE).of_exits(np.array([0, 1]), LENGTHS)
    assert found.tolist() == [26, 5 + 130 + 2000]


def test_mean_is_over_samples_of_their_own_lengths():
    found = StepMacs(BUNDLE).mean(LENGTHS)
    assert found.stages == (60, 20 * (4 + 100) // 2)
    assert found.heads == (18, 5)


def test_older_bundles_take_heads_to_cost_all_samples_the_same():
    older = tuple(replace(each, stage_macs_by_length=None) for each in STEPS)
    found = StepMacs(replace(BUNDLE, steps=older))
    assert found.of_plain(LENGTHS).tolist() == [105 + 6 - 30, 2105 + 30 - 30]


def test_samples_of_one_size_cost_the_same():
    steps = tuple(
        replace(each, exit_macs_by_length=None, stage_macs_by_length=None) for each in STEPS
    )
    found = StepMacs(replace(BUNDLE, steps=steps, padding=None))
    assert found.of_plain(()).tolist() == [2115]
    assert found.of_exits(np.array([1, 0]), ()).tolist() == [2145, 140]
    assert found.mean(()) == ((110, 2000), (30, 5))
