"""A process that times one engine: ``python -m offramp.evaluation.worker SPEC``.

SPEC is JSON: the engine (``backend``), the run or bundle (``folder``), the FILE.py:function of a
``network`` of the user's own or null, a ``.npy`` file of real samples for each of its ``inputs``,
one of the MACs of each over its own plain ones (``shares``; where it is left out, the first samples
are timed), and ``threads``.
:class:`~offramp.evaluation.stopwatch.ProcessStopwatch` asks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.evaluation.stopwatch import LocalStopwatch, Stopwatch, representative_rows, serve

Array = npt.NDArray[Any]


def make_stopwatch(spec: dict[str, Any]) -> Stopwatch:
    """Load what is to be timed."""
    inputs = [np.load(file) for file in spec["inputs"]]
    shares = np.load(spec["shares"]).tolist() if "shares" in spec else None
    if spec["backend"] == "torch":
        import torch

        from offramp.evaluation.timing import torch_stopwatch
        from offramp.families import make_runner
        from offramp.runs.own_network import load_run

        torch.set_num_threads(spec["threads"])
        run = load_run(spec["folder"], spec["network"])
        runner = make_runner(run.network, run.policy)
        return torch_stopwatch(runner, torch.from_numpy(inputs[0]), shares)
    from offramp.evaluation.bundle_contenders import bundle_contenders
    from offramp.runtime import Session

    session = Session(spec["folder"], threads=spec["threads"])
    return LocalStopwatch(
        lambda size, count: bundle_contenders(
            session,
            _in_batches(inputs, representative_rows(shares, size * count), count),
            threads=spec["threads"],
        ),
        num_samples=len(inputs[0]),
    )


def _in_batches(inputs: list[Array], rows: list[int], count: int) -> list[list[Array]]:
    return [[tensor[part] for tensor in inputs] for part in np.split(np.array(rows), count)]


if __name__ == "__main__":
    serve(make_stopwatch(json.loads(sys.argv[1])))
