"""Weights on disk: safetensors, written atomically, checked when read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from offramp.artifacts import atomic_path
from offramp.errors import ArtifactError


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers."""
    # Copies: safetensors refuses tensors that share memory, as exits with a common head do.
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_weights(network: nn.Module, path: Path) -> None:
    """Read what :func:`save_weights` wrote into a network of the same architecture."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"Cannot read the weights {path}: {error}. Train the run again or copy it anew."
        ) from error
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        different = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise ArtifactError(
            f"The weights {path} are of another network: {len(different)} tensors differ, "
            f"first {different[0]!r}."
        )
    network.load_state_dict(tensors)
