"""A process of ``clock.py`` that times torch with the tutorial's loop beside, or earlyon.

Its one argument is JSON: the ``kind`` (torch or earlyon), the run's ``folder``, a ``.npy`` file of
real samples (``inputs``), and ``threads``. earlyon runs in an environment of its own (see
README.md), where Offramp is installed too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from offramp.evaluation.contenders import torch_contenders
from offramp.evaluation.stopwatch import LocalStopwatch, serve
from offramp.families.exits import AdaptiveRunner
from offramp.measure.agreement import DECISION_TOLERANCE
from offramp.model.multi_exit import MultiExitNetwork
from offramp.policy.policies import ThresholdPolicy
from offramp.runs.run import load


def tutorial_answers(
    network: MultiExitNetwork, policy: ThresholdPolicy, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The tutorial's test loop: every exit, softmax and entropy of all of them, then choose.

    With a threshold on the largest probability, as resnet18-32 has it, that takes the entropy's
    place.
    """
    logits_KBC = torch.stack(network(inputs))
    p_KBC = logits_KBC.softmax(-1)
    if policy.rule == "entropy":
        largest = torch.tensor(float(logits_KBC.shape[-1])).log()
        sureness_KB = 1 + (p_KBC * torch.log(p_KBC + 1e-5)).sum(-1) / largest
    else:
        sureness_KB = p_KBC.amax(-1)
    exit_index_B = torch.full((len(inputs),), network.num_exits - 1)
    output_BC = logits_KBC[-1]
    for k in reversed(range(network.num_exits - 1)):
        is_sure_B = sureness_KB[k] >= policy.thresholds[k]
        exit_index_B = torch.where(is_sure_B, k, exit_index_B)
        output_BC = torch.where(is_sure_B[:, None], logits_KBC[k], output_BC)
    return output_BC, exit_index_B


def with_tutorial(runner: AdaptiveRunner, inputs: Tensor) -> LocalStopwatch:
    network, policy = runner.network, runner.policy
    assert isinstance(policy, ThresholdPolicy)

    @torch.inference_mode()
    def answer_all(batches: tuple[Tensor, ...]) -> None:
        for batch in batches:
            tutorial_answers(network, policy, batch)

    def contenders(size: int, count: int) -> Mapping[str, Callable[[], object]]:
        batches = torch.split(inputs[: size * count], size)
        return {**torch_contenders(runner, batches), "tutorial": lambda: answer_all(batches)}

    return LocalStopwatch(contenders, num_samples=len(inputs))


def earlyon_alone(runner: AdaptiveRunner, inputs: Tensor) -> LocalStopwatch:
    """Earlyon's own inference on the same weights: one sample, or a batch that leaves as one."""
    _define_torchvision_operations()
    from earlyon.models.custom import custom_ee

    network, policy = runner.network, runner.policy
    assert isinstance(policy, ThresholdPolicy)
    backbone = nn.Sequential(*network.stages, network.exits[-1]).eval()
    layers = [str(k) for k in range(network.num_exits - 1)]
    num_classes = network(inputs[:1])[-1].shape[-1]
    by_entropy = policy.rule == "entropy"
    wrapper = custom_ee(
        backbone,
        layers,
        num_classes,
        input_shape=(1, *inputs.shape[1:]),
        routing_policy="entropy" if by_entropy else "confidence",
        confidence_thresholds=list(policy.thresholds),
    ).eval()
    for k in range(network.num_exits - 1):
        wrapper.exit_heads[f"e{k}"] = network.exits[k]
    if by_entropy:
        largest = float(torch.tensor(float(num_classes)).log())
        wrapper.config.entropy_thresholds = [(1 - t) * largest for t in policy.thresholds]

    def answer(batch: Tensor) -> Any:
        return wrapper(batch) if len(batch) == 1 else wrapper.forward_inference_batched(batch)

    _check_earlyon(wrapper, runner, inputs[:200])

    def contenders(size: int, count: int) -> Mapping[str, Callable[[], object]]:
        batches = torch.split(inputs[: size * count], size)
        plain = network.plain().eval()
        taken = [answer(batch).exit_taken for batch in batches]
        shares = [taken.count(k) / len(taken) for k in (*range(network.num_exits - 1), -1)]
        print(f"earlyon at batch {size}: share of batches per exit {shares}", file=sys.stderr)
        return {
            "plain": torch.inference_mode()(lambda: [plain(batch) for batch in batches]),
            "earlyon": lambda: [answer(batch) for batch in batches],
        }

    return LocalStopwatch(contenders, num_samples=len(inputs))


def _check_earlyon(wrapper: Any, runner: AdaptiveRunner, inputs: Tensor) -> None:
    """One by one, earlyon must answer what the runner answers."""
    last = runner.network.num_exits - 1
    for sample in inputs.split(1):
        theirs, ours = wrapper(sample), runner.run(sample)
        taken = last if theirs.exit_taken < 0 else theirs.exit_taken
        k = int(ours.exit_index)
        near = k < last and abs(float(ours.confidence) - runner.policy.setting(k).threshold) < (
            DECISION_TOLERANCE
        )
        if taken == k:
            torch.testing.assert_close(theirs.prediction, ours.output, rtol=1e-3, atol=1e-4)
        elif not near:
            raise AssertionError(f"earlyon left by exit {taken}, Offramp by exit {k}")


def _define_torchvision_operations() -> None:
    """The registry's torchvision is built for CUDA: beside CPU torch two operations are missing."""
    library = torch.library.Library("torchvision", "DEF")
    for operation in ("nms", "qnms"):
        library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[Any] = []
"""Libraries live as long as something refers to them."""


def main(
    spec_json: Annotated[str, typer.Argument(metavar="SPEC", help="JSON: see the docstring.")],
) -> None:
    spec = json.loads(spec_json)
    torch.set_num_threads(spec["threads"])
    run = load(spec["folder"])
    runner = AdaptiveRunner(run.network, run.policy)
    inputs = torch.from_numpy(np.load(spec["inputs"]))
    make = {"torch": with_tutorial, "earlyon": earlyon_alone}[spec["kind"]]
    serve(make(runner, inputs))


if __name__ == "__main__":
    typer.run(main)
