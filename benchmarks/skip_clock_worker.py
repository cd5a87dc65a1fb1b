"""A process of ``skip_clock.py`` that times one engine.

Its one argument is JSON: the engine (``backend``), ``threads``, and how the network is made
(``width``, ``gates``, ``seed``), or for onnxruntime the bundle's ``folder``, that of the network
without a plan (``unplanned``), a ``.npy`` file of the samples (``inputs``), and the ``thresholds``
by name of what is timed.

Contenders: ``plain``; ``skip_70`` and ``skip_50``, for onnxruntime at batch 1 as one graph, and as
``steps_70`` and ``steps_50`` file by file; ``ask``, every gate asked and nothing skipped, and for
onnxruntime ``ask_unplanned``, the same of the network without a plan;
``gates``, the gates alone, one call each; in torch ``mask_50``, the published code's way, which
computes every block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from offramp.evaluation.stopwatch import LocalStopwatch, serve
from offramp.runtime import Bundle, PlainSession, Session, read_bundle, with_routing_threshold
from offramp.runtime.loading import Loader

Array = npt.NDArray[Any]
Contenders = dict[str, Callable[[], object]]


def step_by_step(bundle: Bundle) -> Bundle:
    """The same bundle without its file for single samples."""
    return replace(bundle, single_file=None, single_sha256=None)


def of_onnxruntime(spec: Mapping[str, Any]) -> LocalStopwatch:
    inputs, bundle, threads = np.load(spec["inputs"]), read_bundle(spec["folder"]), spec["threads"]
    plain = PlainSession(bundle, threads=threads)
    at = {
        name: with_routing_threshold(bundle, threshold)
        for name, threshold in spec["thresholds"].items()
    }
    skipping = {name: Session(changed, threads=threads) for name, changed in at.items()}
    unplanned = with_routing_threshold(read_bundle(spec["unplanned"]), spec["thresholds"]["ask"])
    skipping["ask_unplanned"] = Session(unplanned, threads=threads)
    by_step = {
        name.replace("skip", "steps"): Session(step_by_step(changed), threads=threads)
        for name, changed in at.items()
        if name.startswith("skip")
    }

    def contenders(size: int, count: int) -> Contenders:
        batches = np.split(inputs[: size * count], count)
        gates = ask_gates(bundle, threads, batches)
        # Larger batches go step by step in any case.
        runners = {"plain": plain, **skipping, **(by_step if size == 1 else {})}
        runs: Contenders = {name: partial(run_all, one, batches) for name, one in runners.items()}
        return {**runs, "gates": gates}

    return LocalStopwatch(contenders, num_samples=len(inputs))


def run_all(runner: Session | PlainSession, batches: list[Array]) -> None:
    for batch in batches:
        runner.run(batch)


def ask_gates(bundle: Bundle, threads: int, batches: list[Array]) -> Callable[[], object]:
    """What calls every gate on what it is given where every block runs."""
    loader = Loader(bundle, threads=threads)
    assert bundle.skip is not None

    def run(session: Any, *given: Array) -> tuple[dict[str, Array], list[Array]]:
        feed = dict(zip([value.name for value in session.get_inputs()], given, strict=True))
        return feed, session.run(None, feed)

    threshold = np.array(0.5, dtype=np.float32)
    stem = loader.load(bundle.skip.stem.name)
    steps = [
        (loader.load(step.gate.name), loader.load(step.block.name)) for step in bundle.skip.steps
    ]
    calls = []
    for batch in batches:
        _, (x,) = run(stem, batch)
        state: list[Array] = []
        for gate, block in steps:
            feed, (_, _, *state) = run(gate, x, *state, threshold)
            calls.append((gate, feed))
            _, (x,) = run(block, x)
    return lambda: [gate.run(None, feed) for gate, feed in calls]


def of_torch(spec: Mapping[str, Any]) -> LocalStopwatch:
    import torch
    from torch import Tensor

    from offramp.families.skip import SkipRunner
    from offramp.policy.routing_policy import GatePolicy
    from offramp.routing.gates import GateState
    from offramp.routing.skip import at_threshold
    from skip_plan import planned_network

    torch.set_num_threads(spec["threads"])
    network, images, _ = planned_network(**spec["network"])
    plain = network.plain().eval()
    masking = at_threshold(spec["thresholds"]["skip_50"])
    runners = {
        name: SkipRunner(network, GatePolicy(threshold))
        for name, threshold in spec["thresholds"].items()
    }

    @torch.inference_mode()
    def given_to_gates(batch: Tensor) -> list[tuple[int, Tensor, GateState]]:
        x, state = network.stem(batch), ()
        given = []
        for index in range(network.num_gates):
            given.append((index, x, state))
            _, state = network.ask(index, x, state)
            x = network.run_block(index, x)
        return given

    def contenders(size: int, count: int) -> Contenders:
        batches = torch.split(images[: size * count], size)
        calls = [call for batch in batches for call in given_to_gates(batch)]
        runs: Contenders = {
            "plain": lambda: [plain(batch) for batch in batches],
            **{
                name: lambda runner=runner: [runner.run(batch) for batch in batches]
                for name, runner in runners.items()
            },
            "gates": lambda: [network.ask(*call) for call in calls],
            "mask_50": lambda: [network(batch, masking) for batch in batches],
        }
        return {name: torch.inference_mode()(run) for name, run in runs.items()}

    return LocalStopwatch(contenders, num_samples=len(images))


def main(
    spec_json: Annotated[str, typer.Argument(metavar="SPEC", help="JSON: see the docstring.")],
) -> None:
    spec = json.loads(spec_json)
    make = {"torch": of_torch, "onnxruntime": of_onnxruntime}[spec["backend"]]
    serve(make(spec))


if __name__ == "__main__":
    typer.run(main)
