"""Timing a network's parts in onnxruntime: each becomes an ONNX file that is thrown away after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from offramp.evaluation.profiling import Parts, make_profile, profile_sizes, time_parts
from offramp.exporting.onnx import write_onnx
from offramp.measure.profile import Profile
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.policy.policies import Policy, Setting, State
from offramp.runtime.loading import session_options

Array = npt.NDArray[Any]


@torch.no_grad()
def profile_exported(
    network: MultiExitNetwork, policy: Policy, samples: Tensor, *, batch_size: int
) -> Profile:
    """Time stages, exits and compaction in onnxruntime, with as many threads as torch has.

    In a bundle, the stages up to an exit that is on are one call, which ends with handing the
    features on. So what that takes counts to the exit, not to the stage. A batch of one is a
    single call in all, and hands nothing on.
    """
    sizes, num_exits = profile_sizes(batch_size, num_samples=len(samples)), network.num_exits
    with tempfile.TemporaryDirectory() as folder:
        calls = _export_parts(network, policy, samples, Path(folder))
        timed = {size: time_parts(_parts(calls, samples[:size].numpy())) for size in sizes}
    laps = {
        size: as_in_a_bundle(ms, num_exits, one_graph=batch_size == 1) for size, ms in timed.items()
    }
    return make_profile("onnxruntime", laps, num_exits=num_exits, device=samples.device)


def as_in_a_bundle(ms: Mapping[str, float], num_exits: int, *, one_graph: bool) -> dict[str, float]:
    """Share out what calls take that were timed apart and are one call in a bundle."""
    shared = dict(ms)
    for k in range(num_exits):
        shared[f"stage_{k}"] = max(0.0, ms[f"stage_{k}"] - ms[f"handover_{k}"])
        if k < num_exits - 1:
            ends_a_call = 0.0 if one_graph else ms[f"handover_{k}"]
            shared[f"exit_{k}"] = max(0.0, ms[f"exit_{k}"] - ms["least_call"] + ends_a_call)
    return shared


class _Call:
    """An ONNX file that maps arrays to arrays."""

    def __init__(
        self, module: nn.Module, inputs: Features, path: Path, *, num_outputs: int, **scalars: float
    ) -> None:
        names = [f"input_{i}" for i in range(len(inputs))]
        write_onnx(
            module,
            inputs,
            path,
            scalars=tuple(scalars),
            input_names=names,
            output_names=[f"output_{i}" for i in range(num_outputs)],
        )
        options = session_options(torch.get_num_threads())
        self._session = onnxruntime.InferenceSession(path, options)
        self._names = [value.name for value in self._session.get_inputs()]
        self._scalars = [np.array(value, dtype=np.float32) for value in scalars.values()]

    def __call__(self, *arrays: Array) -> list[Array]:
        feed = dict(zip(self._names, (*arrays, *self._scalars), strict=True))
        outputs: list[Array] = self._session.run(None, feed)
        return outputs


class _Stage(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *features: Tensor) -> Features:
        return as_features(self.stage(*features))


class _Exit(nn.Module):
    """A head with the decision, as the end of a bundle's step."""

    def __init__(self, network: MultiExitNetwork, policy: Policy, k: int, num_features: int):
        super().__init__()
        self.head = network.exits[k]
        self._policy, self._k, self._num_features = policy, k, num_features

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        names = self._policy.number_names
        carried, numbers = tensors[: -len(names)], tensors[-len(names) :]
        features, state = carried[: self._num_features], carried[self._num_features :]
        output = self.head(*features)
        setting = Setting(**dict(zip(names, numbers, strict=True)))
        leave_B, confidence_B, kept = self._policy.decide(self._k, output, tuple(state), setting)
        return output, confidence_B, leave_B, *kept


Calls = list[tuple[_Call, _Call, _Call]]
"""Stage, handing on its features, and exit, in order."""


class _HandOver(nn.Module):
    def forward(self, *features: Tensor) -> Features:
        return tuple(tensor + 0 for tensor in features)


def _export_parts(
    network: MultiExitNetwork, policy: Policy, samples: Tensor, folder: Path
) -> Calls:
    features: Features = (samples[:1],)
    state: State = ()
    calls = []
    for k in range(network.num_exits):
        before, features = features, network.run_stage(k, features)
        stage = _Stage(network.stages[k]).eval()
        path = folder / f"stage_{k}.onnx"
        stage_call = _Call(stage, before, path, num_outputs=len(features))
        _, _, next_state = policy.step(k, network.run_exit(k, features), state)
        exit_call = _Call(
            _Exit(network, policy, k, len(features)).eval(),
            (*features, *state),
            folder / f"exit_{k}.onnx",
            num_outputs=3 + len(next_state),
            **dict.fromkeys(policy.number_names, 0.5),
        )
        hand_over = _Call(
            _HandOver(), features, folder / f"handover_{k}.onnx", num_outputs=len(features)
        )
        state = next_state
        calls.append((stage_call, hand_over, exit_call))
    return calls


def _parts(calls: Calls, batch: Array) -> Parts:
    parts: list[tuple[str, Callable[[], object]]] = []
    features, state = [batch], list[Array]()
    for k, (stage, hand_over, leave) in enumerate(calls):
        parts.append((f"stage_{k}", partial(stage, *features)))
        features = stage(*features)
        parts.append((f"handover_{k}", partial(hand_over, *features)))
        if k == 0:
            parts.append(("least_call", partial(hand_over, *(array[:1] for array in features))))
        asked = [*features, *state]
        parts.append((f"exit_{k}", partial(leave, *asked)))
        _, _, _, *state = leave(*asked)
        if k < len(calls) - 1 and len(batch) > 1:
            parts.append((f"compaction_{k}", partial(_compact, [*features, *state])))
    return parts


def _compact(carried: list[Array]) -> list[Array]:
    """Do a session's work after a step at which half of the samples stay."""
    stay_B = np.flatnonzero(np.arange(len(carried[0])) % 2 == 0)
    return [array.take(stay_B, axis=0) for array in carried]
