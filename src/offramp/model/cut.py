"""Cutting a backbone into stages and hanging exits on it.

A *cutter* knows where a backbone can be cut, and cuts it. There are three, tried in this order:
the layer list of a transformers model (``layer_lists``), children that run one after the other
(``chain``), and the graph that torch.fx traces (``graph``). All end in :func:`add_exits`, which
checks the stages against the backbone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError, InvalidArgumentError, reason
from offramp.measure.cost import count_macs, evaluation_mode, require_samples
from offramp.model.chain import Chain
from offramp.model.dense_heads import ReadsEverything
from offramp.model.graph import Graph, NotTraceableError
from offramp.model.heads import head_for
from offramp.model.inputs import Given, InputSpec, example_inputs, explained
from offramp.model.layer_lists import find_layer_list, refuse_unknown
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.model.ragged import Ragged
from offramp.model.spacing import choose_cuts


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
    at: Sequence[str] | Literal["auto"],
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
        backbone: Any module of one output, which is the logits: a transformers model, one whose
            children run in order, or one that torch.fx can trace.
        at: Paths of modules as in ``named_modules()``, in the order they run; an exit attaches
            after each. The backbone's end is the final exit and is not named. "auto" shares the
            backbone's MACs out evenly among ``num_exits``; :func:`~offramp.place` does it by the
            clock.
        num_classes: Number of classes C.
        example: One batch of inputs, each with the batch axis first, for the heads' sizes and the
            check; a tuple where the backbone takes several, in the order of its ``forward``, or a
            dict by the names there. A text model's mask may be left out: it is then of ones.
        num_exits: With "auto": exits, the final one counted, at least 2.
        heads: One exit head for each path; chosen from the features' shape where not given. One
            of the class ``ReadsEverything`` is given all that crosses, the module's output first.
    Returns:
        A network with ``len(at) + 1`` exits whose final exit equals the backbone.
    Raises:
        BackboneCutError: If there can be no cut after a path, or the paths are out of order; the
            message says why, and where there can be one.
        InvalidArgumentError: If ``heads`` has another length than ``at``, the backbone does not
            end in ``num_classes`` outputs, or ``num_exits`` is missing, superfluous or too large.
        ShapeError: If the example has no sample in it.
    Example:
        >>> backbone = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> network = add_exits(backbone, at=["1"], num_classes=3, example=torch.zeros(1, 8))
        >>> network.num_exits
        2
    """
    inputs, input_specs = _check_example(backbone, example)
    _check_num_exits(at, num_exits)
    _check_logits(backbone, inputs, num_classes)
    cutter = _find_cutter(backbone, inputs, () if at == "auto" else at)
    if at == "auto":
        at = _spread(backbone, cutter, inputs, num_exits)
    _check_heads(heads, num_cuts=len(at))
    stages, stage_features = _cut(backbone, cutter, inputs, at)
    if heads is None:
        heads = [head_for(f[0], num_classes).to(f[0]) for f in stage_features[:-1]]
    heads = _reading_first(heads, stage_features, cutter.num_read)
    network = MultiExitNetwork(stages, [*heads, nn.Identity()])
    network.share_keys_with(backbone)
    network.input_specs = input_specs
    network.num_classes = num_classes
    network.ragged = cutter.ragged
    return network


def _cut(
    backbone: nn.Module, cutter: Cutter, inputs: Features, at: Sequence[str]
) -> tuple[list[nn.Module], list[Features]]:
    """The stages, which do together what the backbone does, and the features of each."""
    stages = cutter.stages(_positions(backbone, cutter, at))
    with evaluation_mode(backbone), torch.no_grad():
        stages, stage_features = _run_apart(stages, inputs)
    difference = _difference(backbone, stages, inputs)
    if difference is not None:
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be cut after {', '.join(at)}: {difference}. "
            "Something crosses there beside what its modules hand on: cut elsewhere."
        )
    return stages, stage_features


def _check_num_exits(at: Sequence[str], num_exits: int | None) -> None:
    if at != "auto" and num_exits is not None:
        raise InvalidArgumentError(
            "The 'num_exits' parameter goes with at=\"auto\"; paths say it themselves."
        )


def _check_heads(heads: Sequence[nn.Module] | None, *, num_cuts: int) -> None:
    if heads is not None and len(heads) != num_cuts:
        raise InvalidArgumentError(
            f"Expected one head for each of the {num_cuts} cuts. Got {len(heads)}."
        )


def _reading_first(
    heads: Sequence[nn.Module], stage_features: Sequence[Features], num_read: int
) -> list[nn.Module]:
    """Heads that let pass by what crosses beside the tensors that an exit reads."""
    return [
        head
        if len(features) == num_read or isinstance(head, ReadsEverything)
        else ReadsFirst(head, num_read)
        for head, features in zip(heads, stage_features, strict=False)
    ]


def cut_paths(backbone: nn.Module, example: Given) -> list[str]:
    """Name the places where a backbone can be cut and only what an exit reads crosses, in order.

    Args:
        backbone: As for :func:`add_exits`.
        example: As for :func:`add_exits`.
    Returns:
        Paths for :func:`add_exits` in the order the modules run. Where several modules end at
        one place, the outermost names it.
    Raises:
        BackboneCutError: If the backbone cannot be cut at all.
        ShapeError: If the example has no sample in it.
    Example:
        >>> backbone = nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 3))
        >>> cut_paths(backbone, torch.zeros(1, 8))
        ['0.0', '0']
    """
    inputs, _ = _check_example(backbone, example)
    return _narrow_paths(_find_cutter(backbone, inputs, ()))


def _narrow_paths(cutter: Cutter) -> list[str]:
    named: dict[int, str] = {}
    for path, position in cutter.places.items():
        if cutter.is_narrow(position):
            named[position] = min(path, named.get(position, path), key=len)
    return [named[position] for position in sorted(named)]


class ReadsFirst(nn.Module):
    """An exit head that reads the first of the tensors that cross its cut.

    Args:
        head: The head.
        num_read: How many it reads.
    """

    def __init__(self, head: nn.Module, num_read: int) -> None:
        super().__init__()
        self.head = head
        self._num_read = num_read

    def forward(self, *features: Tensor) -> Tensor:
        """Map what the head maps; the others pass by."""
        logits: Tensor = self.head(*features[: self._num_read])
        return logits


class WorksOnCopies(nn.Module):
    """A stage that would change its inputs in place, after an exit has read them.

    Args:
        stage: The stage.
        changed: Which of its inputs it changes.
    """

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
    inputs, specs = example_inputs(backbone, example, None if layers is None else layers.ragged)
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
    layers = find_layer_list(backbone)
    if layers is not None:
        return layers
    chain = Chain(backbone)
    why_no_chain = _difference(backbone, chain.stages(()), inputs)
    wanted = {path for path, _ in backbone.named_modules()} & set(at)
    if why_no_chain is None and wanted <= chain.places.keys() | chain.refused.keys():
        return chain
    try:
        return Graph(backbone, inputs)
    except NotTraceableError as error:
        if why_no_chain is None:
            return chain
        refuse_unknown(backbone)
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be cut: its children do not run one after the other "
            f"({why_no_chain}), and torch.fx cannot trace it ({reason(error)}). Wrap it in an "
            "nn.Sequential of pieces that run in order."
        ) from error


def _difference(backbone: nn.Module, stages: Sequence[nn.Module], inputs: Features) -> str | None:
    """How the stages, one after the other, differ from the backbone; None if they do not.

    In training mode both draw the same random numbers; statistics are put back afterwards.
    """
    both = nn.ModuleList([backbone, *stages])
    statistics = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
    two = tuple(torch.cat([tensor, tensor]) for tensor in inputs)  # one alone has no variance
    with evaluation_mode(both), torch.no_grad(), torch.random.fork_rng():
        try:
            if not torch.equal(_run(stages, inputs), _output_of(backbone, inputs)):
                return "in pieces it gives another output than whole"
            both.train()
            torch.manual_seed(0)
            expected = _output_of(backbone, two)
            for buffer, value in statistics:
                buffer.copy_(value)
            torch.manual_seed(0)
            if not torch.allclose(_run(stages, two), expected, rtol=0, atol=1e-6):
                return "in pieces it gives another output in training than whole"
        except Exception as error:  # whatever a module raises on what it does not expect
            return f"its pieces do not run one after the other: {reason(error)}"
        finally:
            for buffer, value in statistics:
                buffer.copy_(value)
    return None


def _run(stages: Sequence[nn.Module], inputs: Features) -> Tensor:
    features = tuple(tensor.clone() for tensor in inputs)
    for stage in stages:
        features = as_features(stage(*features))
    return features[0]


def _output_of(backbone: nn.Module, inputs: Features) -> Tensor:
    """Its logits for inputs that stay as they are, though its modules may work in place."""
    output = backbone(*(tensor.clone() for tensor in inputs))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise BackboneCutError(
            f"Expected a backbone that returns a tensor of logits. {type(backbone).__name__} "
            f"returns {type(output).__name__}. Wrap it in a module that returns the logits alone."
        )
    return logits


def _check_logits(backbone: nn.Module, inputs: Features, num_classes: int) -> None:
    with evaluation_mode(backbone), torch.no_grad(), explained(inputs):
        logits = _output_of(backbone, inputs)
    if logits.ndim < 2 or logits.shape[1] != num_classes:
        raise InvalidArgumentError(
            f"Expected a backbone that ends in {num_classes} outputs. "
            f"Got an output of shape {tuple(logits.shape)}."
        )


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


def _run_apart(
    stages: Sequence[nn.Module], inputs: Features
) -> tuple[list[nn.Module], list[Features]]:
    """Run the stages on copies, so that nothing crosses a cut but what is handed on.

    Returns:
        The stages, those that change what they are given in place made to work on copies, and
        the features of each.
    """
    features = inputs
    safe_stages: list[nn.Module] = []
    outputs = []
    for stage in stages:
        given = tuple(tensor.clone() for tensor in features)
        versions = [tensor._version for tensor in given]
        features = as_features(stage(*given))
        changed = frozenset(i for i, tensor in enumerate(given) if tensor._version != versions[i])
        is_first = not safe_stages  # it is given the inputs, as the backbone is
        safe_stages.append(WorksOnCopies(stage, changed) if changed and not is_first else stage)
        outputs.append(tuple(tensor.clone() for tensor in features))
    return safe_stages, outputs
