"""Networks that ship with Offramp, by the name that recipes and run folders use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offramp.errors import ArtifactError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.zoo.convnet import convnet
from offramp.zoo.mlp import mlp

NETWORKS: dict[str, Callable[..., MultiExitNetwork]] = {"mlp": mlp, "convnet": convnet}
"""Functions that build a network from plain values."""


def build(name: str, options: dict[str, Any]) -> MultiExitNetwork:
    """Build a network of the zoo.

    Args:
        name: A key of :data:`NETWORKS`.
        options: Keyword arguments of that function; lists stand for tuples.
    Returns:
        The network, freshly initialised.
    Raises:
        ArtifactError: If there is no such network or it does not take these options.
    """
    if name not in NETWORKS:
        raise ArtifactError(f"Expected a network of {', '.join(NETWORKS)}. Got {name!r}.")
    arguments = {key: _as_tuples(value) for key, value in options.items()}
    try:
        return NETWORKS[name](**arguments)
    except TypeError as error:
        raise ArtifactError(
            f"The network {name!r} does not take these options: {error}."
        ) from error


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
