"""A family: a way in which a network spends less, as one record that everybody looks up.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from offramp.errors import InvalidArgumentError
from offramp.measure.agreement import Reference
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.policy.choice import Choice
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import EVEN_SCORES as EVEN_SCORES
from offramp.policy.routing_policy import RoutingPolicy
from offramp.results import AdaptiveResult

N = TypeVar("N", bound=nn.Module)
P = TypeVar("P", bound=Policy | RoutingPolicy)

Contenders = Mapping[str, Callable[[], object]]
"""By name, what runs all batches once."""


class TorchRunner(ABC, Generic[N, P]):
    """Runs a network in torch.

    Attributes:
        network: The network, in evaluation mode.
        policy: Its policy.
    """

    network: N
    policy: P

    @abstractmethod
    def run(self, *inputs: Any) -> AdaptiveResult[Tensor]:
        """Answer a batch of inputs, each with its batch axis first."""


def settled(
    network: N, policy: P | Choice | None, kind: type[N], as_trained: P, maker: str
) -> tuple[N, P]:
    """Check a network that one threshold steers, and its policy: as trained if None."""
    if not isinstance(network, kind):
        raise InvalidArgumentError(
            f"Expected a {kind.__name__}, as {maker} makes. Got a {type(network).__name__}."
        )
    if isinstance(policy, Choice):
        policy = policy.as_policy()
    if not isinstance(policy, type(as_trained) | None):
        raise InvalidArgumentError(
            f"Expected a {type(as_trained).__name__}, or what calibrate chose. "
            f"Got a {type(policy).__name__}."
        )
    return network.eval(), policy or as_trained


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words for a family, in messages and on cards.

    Attributes:
        kind: Networks of this family.
        maker: The function that makes one of a backbone.
        does: What such a network does inside.
        ability: What it can do, on its card; ``{exits}`` is the number of its exits.
        tag: On the hub.
        heading: Of the part of a card about the policy.
        rule: When a part runs, by the threshold of ``{policy}``; empty where several decide.
        use: Code that prints what came out of a runner.
        share: What shares one threshold; empty where several decide.
        way: What it does, as a noun.
        whole_network: The network where it does least of that.
        less: Running it with its policy.
        less_metric: The same, behind the name of a metric.
        whole: Running all of it.
        whole_metric: The same, behind the name of a metric.
    """

    kind: str
    maker: str
    does: str
    ability: str
    tag: str
    heading: str
    rule: str
    use: str
    share: str
    way: str
    whole_network: str
    less: str
    less_metric: str
    whole: str
    whole_metric: str


def _no_stages(runner: TorchRunner[Any, Any], batches: Sequence[Tensor]) -> Contenders:
    return {}


def _no_figures(evaluation: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return [], []


@dataclass(frozen=True, kw_only=True)
class Family(Generic[N, P]):
    """A way in which a network spends less.

    Attributes:
        name: The family's name, as in a bundle.
        words: How it is spoken of.
        network: Class of its networks.
        policy: Class of their policies.
        as_trained: The policy that such a network is trained for; None where one is chosen.
        runner: From a network and its policy to what runs it.
        reference: From a network, its policy and inputs to everything computed, chosen afterwards.
        whole: From a network to the one whose exits all run and decide nothing: a function that
            says the logits of every exit, and the network of exits that is counted for it.
        never: From a policy to one that asks as often and saves nothing.
        thresholds: Where one threshold steers a network, those to try: from the cheapest to the
            one at which most runs. None where every exit can be judged from one pass.
        settings: Field of ``FitConfig`` that holds the family's own settings; None without any.
        stages: From a runner and batches to contenders that run its stages alone.
        figures: From an evaluation to the family's own fractions and counts in it.
        parts_table: From an evaluation to the rows of a table of what ran; None for exits.
        depths: From a network, its policy and an image to the layers that each token runs; None
            where no tokens halt.
    """

    name: str
    words: Words
    network: type[N]
    policy: type[Any]
    as_trained: P | None = None
    runner: Callable[[N, P], TorchRunner[N, P]]
    reference: Callable[[N, P, Features], Reference]
    whole: Callable[[N], tuple[Callable[..., Sequence[Tensor]], MultiExitNetwork]]
    never: Callable[[P], P]
    thresholds: tuple[float, ...] | None = None
    settings: str | None = None
    stages: Callable[[TorchRunner[N, P], Sequence[Tensor]], Contenders] = _no_stages
    figures: Callable[[Mapping[str, Any]], tuple[list[float], list[float]]] = _no_figures
    parts_table: Callable[[Mapping[str, Any]], list[str]] | None = None
    depths: Callable[[N, P, Tensor], Tensor] | None = None
