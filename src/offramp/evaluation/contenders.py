"""Contenders that are timed in torch; ``bundle_contenders.py`` has the same for bundles.

A contender runs all batches once and returns nothing of interest. By name: ``plain``, the plain
network; ``all_exits``, every stage and head, then choosing; ``adaptive``, leaving early;
``never_exit``, asking at every exit and letting nobody go; ``stages``, the stages and heads alone
on those who reached them; ``stage_0``, ``stage_1``, ..., each stage with its head on full batches.

Where blocks are skipped or tokens halt, the same names stand for: everything, then masking
(``all_exits``, as in the published code); skipping or dropping (``adaptive``); asking every gate
and skipping nothing, or dropping only at a threshold of 1 (``never_exit``). There are no stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.families import family_of, make_runner
from offramp.families.family import Contenders, TorchRunner


@torch.no_grad()
def torch_contenders(runner: TorchRunner[Any, Any], batches: Sequence[Tensor]) -> Contenders:
    """The contenders that torch runs."""
    network, policy = runner.network, runner.policy
    family = family_of(network)
    batches = [network.trimmed((batch,))[0] for batch in batches]
    plain = network.plain().eval()
    never = make_runner(network, family.never(policy))
    contenders: Contenders = {
        "plain": lambda: [plain(batch) for batch in batches],
        "all_exits": lambda: [family.reference(network, policy, (batch,)) for batch in batches],
        "adaptive": lambda: [runner.run(batch) for batch in batches],
        "never_exit": lambda: [never.run(batch) for batch in batches],
        **family.stages(runner, batches),
    }
    return {name: torch.no_grad()(run) for name, run in contenders.items()}
