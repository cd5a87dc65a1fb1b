"""A process of ``halting_clock.py`` that times one engine.

Its one argument is JSON: the engine (``backend``), ``threads``, and the ``seed`` of the planned
network, or for onnxruntime the bundle's ``folder`` and a ``.npy`` file of the images (``inputs``).

Contenders: ``plain``, each batch as it is, and ``plain_alone``, image by image; ``halting``, as a
runner or a session runs a batch; for onnxruntime ``steps``, every batch step by step, and
``alone``, image by image as one graph; in torch ``masked``, the published code's way, which
computes every token; ``longest``, a threshold of 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from offramp.evaluation.stopwatch import LocalStopwatch, serve
from offramp.runtime import PlainSession, Session, read_bundle, with_routing_threshold
from skip_clock_worker import Contenders, run_all, step_by_step


def of_onnxruntime(spec: Mapping[str, Any]) -> LocalStopwatch:
    inputs, bundle, threads = np.load(spec["inputs"]), read_bundle(spec["folder"]), spec["threads"]
    plain, session = PlainSession(bundle, threads=threads), Session(bundle, threads=threads)
    steps = Session(step_by_step(bundle), threads=threads)
    longest = Session(with_routing_threshold(bundle, 1.0), threads=threads)

    def contenders(size: int, count: int) -> Contenders:
        batches, images = (np.split(inputs[: size * count], n) for n in (count, size * count))
        runs: Contenders = {
            "plain": partial(run_all, plain, batches),
            "halting": partial(run_all, session, batches),
            "steps": partial(run_all, steps, batches),
            "longest": partial(run_all, longest, batches),
        }
        if size > 1:
            runs["plain_alone"] = partial(run_all, plain, images)
            runs["alone"] = partial(run_all, session, images)
        return runs

    return LocalStopwatch(contenders, num_samples=len(inputs))


def of_torch(spec: Mapping[str, Any]) -> LocalStopwatch:
    import torch

    from halting_plan import THRESHOLD, planned_network
    from offramp.families.halting import HaltingRunner
    from offramp.policy.routing_policy import HaltingPolicy

    torch.set_num_threads(spec["threads"])
    network, images, _ = planned_network(seed=spec["seed"])
    plain = network.plain().eval()
    runner, longest = (HaltingRunner(network, HaltingPolicy(at)) for at in (THRESHOLD, 1.0))

    def contenders(size: int, count: int) -> Contenders:
        batches = images[: size * count].split(size)
        runs: Contenders = {
            "plain": lambda: [plain(batch) for batch in batches],
            "halting": lambda: [runner.run(batch) for batch in batches],
            "masked": lambda: [network(batch, threshold=THRESHOLD) for batch in batches],
            "longest": lambda: [longest.run(batch) for batch in batches],
        }
        if size > 1:
            runs["plain_alone"] = lambda: [
                plain(image) for batch in batches for image in batch.split(1)
            ]
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
