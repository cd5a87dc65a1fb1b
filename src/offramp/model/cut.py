"""Cutting a backbone into stages and hanging exits on it.

A *cutter* knows where a backbone can be cut, and cuts it. There are three, tried in this order:
the layer list of a transformers model (``layer_lists``), children that run one after the other
(``chain``), and the graph that torch.fx traces (``graph``). All end in :func:`add_exits`, which
proves that the stages do what the backbone does (``proof``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError, InvalidArgumentError, reason
from offramp.measure.cost import count_macs, evaluation_mode, require_samples
from offramp.model.chain import Chain
from offramp.model.exported import Exported
from offramp.model.graph import Graph
from offramp.model.head_choice import fit_heads
from offramp.model.inputs import Given, InputSpec, example_inputs, explained, takes_texts
from offramp.model.layer_lists import find_layer_list
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.model.outputs import check_logits, find_pixel_multiple
from offramp.model.proof import find_difference, logits_of
from offramp.model.ragged import Ragged
from offramp.model.spacing import choose_cuts
from offramp.model.tracing import NotTraceableError


class Cutter(Protocol):
    """Where a backbone can be cut, and how.

    A position is the number of steps that have run; several modules may end at one.
    """

    @property
    def places(self) -> Mapping[str, int]:
        """The position after each module that can be cut after, by its path."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Why there is no cut after other modules, by path."""
        ...

    @property
    def num_read(self) -> int:
        """How many of the tensors that cross a cut its exit reads, from the first."""
        ...

    @property
    def ragged(self) -> Ragged | None:
        """Where padding is marked in what crosses; None where all samples are of one size."""
        ...

    def is_narrow(self, position: int) -> bool:
        """Whether nothing else crosses there."""
        ...

    def stages(self, positions: Sequence[int]) -> list[nn.Module]:
        """The slices between growing positions, one more than there are positions."""
        ...


def add_exits(
    backbone: nn.Module,
    *,
    at: Sequence[str] | str,
    num_classes: int,
    example: Given,
    num_exits: int | None = None,
    heads: Sequence[nn.Module] | None = None,
) -> MultiExitNetwork:
    """Cut a backbone after the named modules and hang an exit on each cut.

    The backbone keeps its own classifier: it becomes the end of the last stage, and the final
    exit returns what the backbone returned. Modules are shared, not copied, in training and
    evaluation alike. An exit reads the output of the module that it follows; after a layer of a
    text model, that and the attention mask. What else crosses the cut, such as a shortcut, goes
    on to the next stage.

    Args:
        backbone: Any module of one output, logits (B, C), or (B, C, h, w) where it says a class
            for every pixel: a transformers model, one whose children run in order, or one that
            torch.fx can trace. Of a compiled one the module that was compiled is cut.
        at: Paths of modules as in ``named_modules()``, in the order they run; an exit attaches
            after each. A string is one path. The backbone's end is the final exit and is not
            named. "auto" shares the backbone's MACs out evenly among ``num_exits``;
            :func:`~offramp.place` does it by the clock.
        num_classes: Number of classes C.
        example: One batch of inputs, each with the batch axis first, for the heads' sizes and the
            proof, which draws random inputs of its shape and kind too; a tuple where the backbone
            takes several, in the order of its ``forward``, or a dict by the names there. A text
            model's mask may be left out: it is then of ones.
        num_exits: With "auto": exits, the final one counted, at least 2.
        heads: One exit head for each path, brought to the features' device and dtype; chosen by
            the axis of channels, which the weights around the cut tell, where not given. One of
            the class ``ReadsEverything`` is given all that crosses, the module's output first.
    Returns:
        A network with ``len(at) + 1`` exits whose final exit equals the backbone, in evaluation
        and in training.
    Raises:
        BackboneCutError: If there can be no cut after a path, the paths are out of order, or the
            stages cannot be proven to do what the backbone does; the message says why, and what
            to do.
        InvalidArgumentError: If ``heads`` has another length than ``at``, the backbone does not
            take the example or does not end in ``num_classes`` outputs, or ``num_exits`` is
            missing, superfluous or too large.
        ShapeError: If the example has no sample in it, a head does not map its features to logits
            of the shape of the backbone's, or none is given and none can be chosen.
    Example:
        >>> backbone = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> network = add_exits(backbone, at=["1"], num_classes=3, example=torch.zeros(1, 8))
        >>> network.num_exits
        2
    """
    backbone = _uncompiled(backbone)
    inputs, input_specs = _check_example(backbone, example)
    paths = _paths(at, num_exits)
    _check_logits(backbone, inputs, num_classes)
    cutter = _find_cutter(backbone, inputs, paths or ())
    at = _spread(backbone, cutter, inputs, num_exits) if paths is None else paths
    stages, features = _cut(backbone, cutter, inputs, at)
    heads = fit_heads(heads, stages, inputs, features, at=at, num_read=cutter.num_read)
    network = MultiExitNetwork(stages, [*heads, nn.Identity()])
    network.share_keys_with(backbone)
    network.input_specs = input_specs
    network.num_classes = num_classes
    network.ragged = cutter.ragged
    network.pixel_multiple = find_pixel_multiple(network, inputs, features[-1][0])
    return network


def cut_stages(
    backbone: nn.Module, at: Sequence[str], *, num_classes: int, inputs: Features
) -> tuple[list[nn.Module], list[Features]]:
    """Cut a backbone as :func:`add_exits` does, without heads."""
    _check_logits(backbone, inputs, num_classes)
    return _cut(backbone, _find_cutter(backbone, inputs, at), inputs, at)


def _cut(
    backbone: nn.Module, cutter: Cutter, inputs: Features, at: Sequence[str]
) -> tuple[list[nn.Module], list[Features]]:
    """The stages, which do together what the backbone does, and the features of each."""
    apart = _RunApart(cutter.stages(_positions(backbone, cutter, at)))
    difference = find_difference(backbone, apart, inputs)
    if difference is not None:
        cut = f"after {', '.join(at)}" if at else "at all"
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be cut {cut}: {difference}. Cut elsewhere, or move "
            "that part into a module of its own without children, which stays whole."
        )
    num_samples = len(inputs[0])  # the proof added samples of its own behind them
    features = [tuple(tensor[:num_samples] for tensor in each) for each in apart.features]
    return apart.safe_stages(), features


def _uncompiled(backbone: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, whose parts are not compiled one by one."""
    if not isinstance(backbone, nn.Module):
        came = f"the class {backbone.__name__}" if isinstance(backbone, type) else repr(backbone)
        raise InvalidArgumentError(f"Expected an nn.Module as the backbone. Got {came}.")
    original = getattr(backbone, "_orig_mod", backbone)
    return original if isinstance(original, nn.Module) else backbone


def _paths(at: Sequence[str] | str, num_exits: int | None) -> list[str] | None:
    """The paths that were named; None for "auto"."""
    if at == "auto":
        return None
    if num_exits is not None:
        raise InvalidArgumentError(
            "The 'num_exits' parameter goes with at=\"auto\"; paths say it themselves."
        )
    paths = [at] if isinstance(at, str) or not isinstance(at, Iterable) else list(at)
    if not all(isinstance(path, str) for path in paths):
        raise InvalidArgumentError(
            f"The 'at' parameter must hold paths of modules, as in named_modules(). Got {at!r}."
        )
    return paths


def cut_paths(backbone: nn.Module, example: Given) -> list[str]:
    """Name the places where a backbone can be cut and only what an exit reads crosses, in order.

    Example:
        >>> backbone = nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 3))
        >>> cut_paths(backbone, torch.zeros(1, 8))
        ['0.0', '0']
    """
    backbone = _uncompiled(backbone)
    inputs, _ = _check_example(backbone, example)
    return _narrow_paths(_find_cutter(backbone, inputs, ()))


def _narrow_paths(cutter: Cutter) -> list[str]:
    named: dict[int, str] = {}
    for path, position in cutter.places.items():
        if cutter.is_narrow(position):
            named[position] = min(path, named.get(position, path), key=len)
    return [named[position] for position in sorted(named)]


class WorksOnCopies(nn.Module):
    """A stage that would change its inputs in place, after an exit has read them."""

    def __init__(self, stage: nn.Module, changed: frozenset[int]) -> None:
        super().__init__()
        self.stage = stage
        self._changed = changed

    def forward(self, *features: Tensor) -> Tensor | Features:
        """Map what the stage maps."""
        copied = (f.clone() if i in self._changed else f for i, f in enumerate(features))
        output: Tensor | Features = self.stage(*copied)
        return output


def _check_example(backbone: nn.Module, example: Given) -> tuple[Features, tuple[InputSpec, ...]]:
    layers = find_layer_list(backbone)
    ragged = Ragged(mask_index=1) if takes_texts(backbone) else None
    inputs, specs = example_inputs(backbone, example, layers.ragged if layers else ragged)
    require_samples("an example", inputs)
    return inputs, specs


def _spread(
    backbone: nn.Module, cutter: Cutter, inputs: Features, num_exits: int | None
) -> list[str]:
    """Paths that share the backbone's MACs out evenly."""
    paths = _narrow_paths(cutter)
    if num_exits is None or not 2 <= num_exits <= len(paths) + 1:
        raise InvalidArgumentError(
            f"With at=\"auto\", the 'num_exits' parameter must be an int in [2, {len(paths) + 1}]: "
            f"{type(backbone).__name__} has {len(paths)} places for an exit, and its end. "
            f"Got {num_exits}."
        )
    macs = []
    features = tuple(tensor[:1].clone() for tensor in inputs)
    with evaluation_mode(backbone), torch.no_grad():
        for stage in cutter.stages([cutter.places[path] for path in paths]):
            macs.append(count_macs(stage, *(tensor.clone() for tensor in features)))
            features = as_features(stage(*features))
    *until, total = accumulate(macs)
    return [paths[cut] for cut in choose_cuts(until, total=total, num_exits=num_exits)]


def _find_cutter(backbone: nn.Module, inputs: Features, at: Sequence[str]) -> Cutter:
    if isinstance(backbone, torch.jit.ScriptModule):
        raise BackboneCutError(
            "Expected a module of Python code. TorchScript cannot be cut, since it holds no code "
            "that could be followed: pass the module that it was made of."
        )
    layers = find_layer_list(backbone)
    if layers is not None:
        return layers
    chain: Chain | None = None
    if len(inputs) == 1:
        with suppress(NotTraceableError):
            chain = Chain(backbone)
    wanted = {path for path, _ in backbone.named_modules()} & set(at)
    if chain is not None and wanted <= chain.places.keys() | chain.refused.keys():
        return chain
    for other in (Graph, Exported):
        try:
            return other(backbone, inputs)
        except NotTraceableError as error:
            failure = error
    if chain is not None:
        return chain
    raise BackboneCutError(
        f"{type(backbone).__name__} cannot be cut: its forward cannot be followed "
        f"({reason(failure)}). Move that part into a module of its own without children, which "
        "stays whole, or wrap the backbone in an nn.Sequential of pieces that run in order."
    ) from failure


def _check_logits(backbone: nn.Module, inputs: Features, num_classes: int) -> None:
    with evaluation_mode(backbone), torch.no_grad(), explained(inputs):
        logits = logits_of(backbone, inputs)
    check_logits(logits, backbone, inputs, num_classes)


def _positions(backbone: nn.Module, cutter: Cutter, at: Sequence[str]) -> list[int]:
    for path in at:
        if path not in cutter.places:
            raise BackboneCutError(_no_cut_after(backbone, cutter, path))
    positions = [cutter.places[path] for path in at]
    if positions != sorted(set(positions)):
        raise BackboneCutError(
            f"The cuts must be in the order the modules run, each once. Got {', '.join(at)}."
        )
    return positions


def _no_cut_after(backbone: nn.Module, cutter: Cutter, path: str) -> str:
    """Why, and where the nearest cuts are: by name, or by the order of the modules."""
    modules = [name for name, _ in backbone.named_modules(remove_duplicate=False)]
    if path not in modules or path == "":
        near = difflib.get_close_matches(path, list(cutter.places), n=3, cutoff=0.0)
        why = "there is no such module in it"
    else:
        here = modules.index(path)
        before = [name for name in modules[:here] if name in cutter.places][-2:]
        after = [name for name in modules[here:] if name in cutter.places][:2]
        near = [*before, *after]
        why = cutter.refused.get(path, "it is not called, or runs as part of a larger step")
    return (
        f"{type(backbone).__name__} cannot be cut after {path!r}: {why}. "
        f"Nearest: {', '.join(near) or 'none'}."
    )


class _RunApart(nn.Module):
    """Runs stages on copies, so that nothing crosses a cut but what is handed on.

    Attributes:
        features: What each returned when they first ran in evaluation.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.features: list[Features] = []
        self._changed: list[set[int]] = [set() for _ in stages]

    def forward(self, *inputs: Tensor) -> Tensor:
        features, outputs = inputs, []
        for stage, changed in zip(self.stages, self._changed, strict=True):
            given = tuple(tensor.clone() for tensor in features)
            versions = [tensor._version for tensor in given]
            features = as_features(stage(*given))
            changed |= {i for i, tensor in enumerate(given) if tensor._version != versions[i]}
            outputs.append(tuple(tensor.clone() for tensor in features))
        if not self.features and not self.training:
            self.features = outputs
        return features[0]

    def safe_stages(self) -> list[nn.Module]:
        """The stages, those that change what they are given made to work on copies."""
        first, *others = zip(self.stages, self._changed, strict=True)
        copying = [WorksOnCopies(s, frozenset(changed)) if changed else s for s, changed in others]
        return [first[0], *copying]  # the first is given the inputs, as the backbone is
