"""Cutting a backbone into stages and hanging exits on it.

Today a backbone whose children run one after the other can be cut: ``nn.Sequential``, also
nested, and modules that merely call their children in order. Other graphs get their own cutter
here; all of them end in :func:`add_exits`, which checks the result against the backbone.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError, InvalidArgumentError, ShapeError, reason
from offramp.measure.cost import evaluation_mode
from offramp.model.heads import head_for
from offramp.model.multi_exit import MultiExitNetwork, as_features


def add_exits(
    backbone: nn.Module,
    *,
    at: Sequence[str],
    num_classes: int,
    example: Tensor,
    heads: Sequence[nn.Module] | None = None,
) -> MultiExitNetwork:
    """Cut a backbone after the named modules and hang an exit on each cut.

    The backbone keeps its own classifier: it becomes the end of the last stage, and the final
    exit returns what the backbone returned. Modules are shared, not copied.

    Args:
        backbone: A module whose children run in order.
        at: Paths of modules as in ``named_modules()``, in the order they run; an exit attaches
            after each. The backbone's end is the final exit and is not named.
        num_classes: Number of classes C.
        example: One batch of inputs, shape (B, ...), for the heads' sizes and the check.
        heads: One exit head for each path; chosen from the features' shape where not given.
    Returns:
        A network with ``len(at) + 1`` exits whose final exit equals the backbone.
    Raises:
        BackboneCutError: If a path does not exist, the paths are out of order, or the children
            do not run in order.
        InvalidArgumentError: If ``heads`` has another length than ``at``, or the backbone does
            not end in ``num_classes`` outputs.
    Example:
        >>> backbone = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> network = add_exits(backbone, at=["1"], num_classes=3, example=torch.zeros(1, 8))
        >>> network.num_exits
        2
    """
    if heads is not None and len(heads) != len(at):
        raise InvalidArgumentError(
            f"Expected one head for each of the {len(at)} cuts. Got {len(heads)}."
        )
    stages = _stages_between(_children_in_order(backbone, at), at)
    with evaluation_mode(backbone), torch.no_grad():
        # Clones: the first module may work in place.
        stage_features = _run_in_order(stages, example.clone())
        expected = backbone(example.clone())
    final = stage_features[-1]
    if not (isinstance(expected, Tensor) and torch.equal(expected, final)):
        raise BackboneCutError(
            f"The children of {type(backbone).__name__} do not run one after the other: chained, "
            "they give another output than the backbone. Wrap it in an nn.Sequential that does."
        )
    if final.ndim < 2 or final.shape[1] != num_classes:
        raise InvalidArgumentError(
            f"Expected a backbone that ends in {num_classes} outputs. "
            f"Got an output of shape {tuple(final.shape)}."
        )
    if heads is None:
        heads = [head_for(features, num_classes).to(features) for features in stage_features[:-1]]
    return MultiExitNetwork(stages, [*heads, nn.Identity()])


def cut_paths(backbone: nn.Module) -> list[str]:
    """Name the pieces that a backbone can be cut into, nested ``nn.Sequential`` opened.

    Args:
        backbone: A module whose children run in order; whether they do is checked by
            :func:`add_exits`.
    Returns:
        Paths in the order the pieces run. Each but the last is a path for :func:`add_exits`; the
        last piece ends the backbone.
    Example:
        >>> cut_paths(nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 3)))
        ['0.0', '0.1', '1']
    """
    paths = []
    for name, child in _children(backbone):
        # A subclass with a forward of its own may do anything with its children.
        runs_in_order = type(child).forward is nn.Sequential.forward
        inner = cut_paths(child) if runs_in_order else []
        paths += [f"{name}.{path}" for path in inner] or [name]
    return paths


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Its children by name; one that stands in it twice is there twice, as in no named_children."""
    named = module.named_modules(remove_duplicate=False)
    return [(name, child) for name, child in named if name and "." not in name]


def _children_in_order(backbone: nn.Module, at: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Flatten the backbone into named steps, opening only what a path points into."""
    steps = []
    for name, child in _children(backbone):
        inner = [path.removeprefix(f"{name}.") for path in at if path.startswith(f"{name}.")]
        if inner:
            steps += [(f"{name}.{step}", m) for step, m in _children_in_order(child, inner)]
        else:
            steps.append((name, child))
    return steps


def _stages_between(
    steps: Sequence[tuple[str, nn.Module]], at: Sequence[str]
) -> list[nn.Sequential]:
    names = [name for name, _ in steps]
    ends = []
    for path in at:
        inside = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{path}.")]
        ends += [inside[-1] + 1] if inside else []
        if not inside:
            near = difflib.get_close_matches(path, names, n=3, cutoff=0.0)
            raise BackboneCutError(
                f"The backbone has no module {path!r} that runs in order. Nearest: "
                f"{', '.join(near) or 'none'}."
            )
    if ends != sorted(set(ends)) or (ends and ends[-1] == len(steps)):
        raise BackboneCutError(
            "The cuts must be in the order the modules run, each once, and before the last "
            f"module ({names[-1]!r}). Got {', '.join(at)}."
        )
    bounds = [0, *ends, len(steps)]
    return [
        nn.Sequential(*(module for _, module in steps[start:end]))
        for start, end in pairwise(bounds)
    ]


def _run_in_order(stages: Sequence[nn.Module], example: Tensor) -> list[Tensor]:
    features = example
    outputs = []
    for stage in stages:
        try:
            (features,) = as_features(stage(features))
        except (RuntimeError, TypeError, ValueError, ShapeError) as error:
            raise BackboneCutError(
                f"The backbone's children do not run one after the other: chaining them fails "
                f"({reason(error)}). Wrap it in an nn.Sequential that does."
            ) from error
        outputs.append(features)
    return outputs
