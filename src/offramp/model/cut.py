"""Cutting a backbone into stages and hanging exits on it.

A *cutter* knows where a backbone can be cut, and cuts it. There are four, tried in this order:
the layer list of a transformers model (``layer_lists``), children that run one after the other
(``chain``), and the graphs that torch.fx (``graph``) and torch.export (``exported``) trace; the one
with the most even places wins. All end in :func:`add_exits`, which proves that the stages do what
the backbone does (``proof``).
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from offramp.errors import (
    BackboneCutError,
    InvalidArgumentError,
    ShapeError,
    reason,
)
from offramp.measure.cost import evaluation_mode, require_samples, run_and_count
from offramp.model.chain import Chain
from offramp.model.dense_heads import find_maps
from offramp.model.entry import bound_by_name, with_logits_alone
from offramp.model.exported import Exported
from offramp.model.graph import Graph
from offramp.model.head_choice import fit_heads
from offramp.model.inputs import Given, InputSpec, example_inputs, explained, takes_texts
from offramp.model.layer_lists import find_layer_list
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.model.outputs import check_logits, find_pixel_multiple
from offramp.model.proof import DEPENDS, find_difference, logits_of
from offramp.model.ragged import Ragged
from offramp.model.spacing import choose_cuts
from offramp.model.tracing import NotTraceableError

_EVEN = 0.12
"""Cuts whose shares are so near to even ones end the search for better ones."""

_NEAR = 0.05
"""Of the backbone's MACs: the longest way to the end of a small block."""


_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized")


class Cutter(Protocol):
    """Finds the places where a backbone can be cut, and cuts it.

    A position is the number of steps that have run; several modules may end at one.
    """

    @property
    def places(self) -> Mapping[str, int]:
        """The position after each module that can be cut after, by its path."""
        ...

    @property
    def between(self) -> Mapping[str, int]:
        """Positions where no module ends and only one tensor crosses, by what made it."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Why there is no cut after other modules, by path."""
        ...

    @property
    def num_read(self) -> int:
        """The number of crossing tensors that an exit reads, counted from the first."""
        ...

    @property
    def ragged(self) -> Ragged | None:
        """The place of the padding mask in what crosses; None if all samples have one size."""
        ...

    def is_narrow(self, position: int) -> bool:
        """Return True if nothing else crosses there."""
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
    output: str | int | None = None,
) -> MultiExitNetwork:
    """Cut a backbone after the named modules and hang an exit on each cut.

    The backbone keeps its own classifier: it becomes the end of the last stage, and the final
    exit returns what the backbone returned. Modules are shared, not copied, in training and
    evaluation alike. An exit reads the output of the module that it follows; after a layer of a
    text model, that and the attention mask. What else crosses the cut, such as a shortcut, goes
    on to the next stage.

    Args:
        backbone: Any module that returns logits (B, C), or (B, C, h, w) where it says a class for
            every pixel, alone or among others: a transformers model, one whose children run in
            order, or one that torch.fx or torch.export can trace. Of a compiled one the module
            that was compiled is cut.
        at: Paths of modules as in ``named_modules()``, in the order they run; an exit attaches
            after each. A string is one path. The backbone's end is the final exit and is not
            named. "auto" shares the backbone's MACs out evenly among ``num_exits``, where a single
            tensor crosses, and warns if the first exit costs more than half;
            :func:`~offramp.place` does it by the clock.
        num_classes: Number of classes C.
        example: One batch of inputs, each with the batch axis first, for the heads' sizes and the
            proof, which draws random inputs of its shape and kind too; a tuple where the backbone
            takes several, in the order of its ``forward``, or a dict by the names there, which may
            leave out what has a default. A text model's mask may be left out: it is then of ones.
        num_exits: With "auto": exits, the final one counted, at least 2.
        heads: One exit head for each path, brought to the features' device and dtype; chosen by
            the axis of channels, which the weights around the cut tell, where not given. One of
            the class ``ReadsEverything`` is given all that crosses, the module's output first.
        output: Key, attribute or place of the logits where the backbone returns a dict, an object
            or a tuple, in evaluation or in training. Not needed for ``logits`` by name, nor where
            only training adds outputs. What else is returned, such as auxiliary heads, is dropped.
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
    backbone, example = bound_by_name(_uncompiled(backbone), example)
    inputs, input_specs = _check_example(backbone, example)
    paths = _paths(at, num_exits)
    with explained(inputs):
        backbone, logits = with_logits_alone(backbone, inputs, output)
    check_logits(logits, backbone, inputs, num_classes)
    if paths is None:
        cutter, stages, heads, features = _cut_evenly(backbone, inputs, num_exits, heads, logits)
    else:
        cutter, stages, features = _cut_after(backbone, inputs, paths, logits)
        heads = fit_heads(heads, stages, inputs, features, at=paths, num_read=cutter.num_read)
    network = MultiExitNetwork(stages, [*heads, nn.Identity()])
    network.share_keys_with(backbone)
    network.input_specs = input_specs
    network.num_classes = num_classes
    network.ragged = cutter.ragged
    network.pixel_multiple = find_pixel_multiple(network, backbone, inputs, features[-1][0])
    return network


def cut_stages(
    backbone: nn.Module, at: Sequence[str], *, num_classes: int, inputs: Features
) -> tuple[list[nn.Module], list[Features]]:
    """Cut a backbone as :func:`add_exits` does, without heads."""
    logits = _check_logits(backbone, inputs, num_classes)
    _, stages, features = _cut_after(backbone, inputs, at, logits)
    return stages, features


def _cut_after(
    backbone: nn.Module, inputs: Features, at: Sequence[str], logits: Tensor
) -> tuple[Cutter, list[nn.Module], list[Features]]:
    """Cut by the first cutter that can; the first one's error if none can."""
    known = {path for path, _ in backbone.named_modules(remove_duplicate=False)}
    failure: BackboneCutError | None = None
    for cutter in _cutters(backbone, inputs):
        try:
            return (cutter, *_cut(backbone, cutter, inputs, at, logits))
        except BackboneCutError as error:
            failure = failure or error
            if not set(at) <= known | cutter.between.keys():
                break
    assert failure is not None
    raise failure


def _cut(
    backbone: nn.Module, cutter: Cutter, inputs: Features, at: Sequence[str], logits: Tensor
) -> tuple[list[nn.Module], list[Features]]:
    """The stages, which do together what the backbone does, and the features of each."""
    apart = _RunApart(cutter.stages(_positions(backbone, cutter, at)))
    difference = find_difference(backbone, apart, inputs, logits=logits)
    if difference is not None:
        cut = f"after {', '.join(at)}" if at else "at all"
        advice = (
            "Cut elsewhere, or move that part into a module of its own without children, which "
            "stays whole."
        )
        if difference.endswith(DEPENDS):
            advice = (
                "Samples leave the batch one by one: make each answer its own, such as by fixed "
                "means in place of the batch's."
            )
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be cut {cut}: {difference}. {advice}"
        )
    num_samples = len(inputs[0])  # the proof added samples of its own behind them
    features = [tuple(tensor[:num_samples] for tensor in each) for each in apart.features]
    return apart.safe_stages(), features


def _uncompiled(backbone: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, whose parts are not compiled one by one."""
    if not isinstance(backbone, nn.Module):
        came = f"the class {backbone.__name__}" if isinstance(backbone, type) else repr(backbone)
        raise InvalidArgumentError(f"Expected an nn.Module as the backbone. Got {came}.")
    if isinstance(backbone, torch.jit.ScriptModule):
        raise BackboneCutError(
            "Expected a module of Python code. TorchScript cannot be cut, since it holds no code "
            "that could be followed: pass the module that it was made of."
        )
    for path, module in backbone.named_modules():
        if type(module).__module__.startswith(_QUANTIZED):
            raise BackboneCutError(
                f"{type(backbone).__name__} cannot be cut: its layer {path!r} is quantised, with "
                "one scale for the activations of a whole batch, so that a sample's logits depend "
                "on the others of its batch, which may have left. Add exits to the network as it "
                "was before, in floats."
            )
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
    return _narrow_paths(_find_cutter(backbone, inputs))


def _narrow_paths(cutter: Cutter) -> list[str]:
    return [p for p, position in _shortest(cutter.places).items() if cutter.is_narrow(position)]


def _shortest(places: Mapping[str, int]) -> dict[str, int]:
    """Each position once, in order, by the shortest of its paths."""
    named: dict[int, str] = {}
    for path, position in places.items():
        named[position] = min(path, named.get(position, path), key=len)
    return {named[position]: position for position in sorted(named)}


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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Cuts that one cutter would make, and the share of the backbone's MACs before each."""

    cutter: Cutter
    at: list[str]
    shares: list[float]

    @property
    def unevenness(self) -> float:
        """Return the largest distance of a cut from an even share."""
        return max(self.distances)

    @property
    def distances(self) -> list[float]:
        """Return each cut's distance from an even share."""
        num = len(self.at) + 1
        return [abs(share - k / num) for k, share in enumerate(self.shares, start=1)]


def _cut_evenly(
    backbone: nn.Module,
    inputs: Features,
    num_exits: int | None,
    heads: Sequence[nn.Module] | None,
    logits: Tensor,
) -> tuple[Cutter, list[nn.Module], list[nn.Module], list[Features]]:
    """Cut where the cutter with the best places can, and that is proven."""
    plans = _plans(backbone, inputs, num_exits, logits)
    known: list[_Plan] = []
    failure: BackboneCutError | ShapeError | None = None
    while True:
        for plan in plans:
            known.append(plan)
            if plan.unevenness <= _EVEN:
                break
        if not known:
            assert failure is not None
            raise failure
        best = min(known, key=lambda plan: (round(plan.unevenness, 2), sum(plan.distances)))
        known.remove(best)
        try:
            stages, features = _cut(backbone, best.cutter, inputs, best.at, logits)
            chosen = fit_heads(
                heads, stages, inputs, features, at=best.at, num_read=best.cutter.num_read
            )
        except (BackboneCutError, ShapeError) as error:
            failure = failure or error
            continue
        if best.shares[0] > 0.5:
            place = "whose output is a map" if logits.ndim == 4 else "where a single tensor crosses"
            warnings.warn(
                f"The first exit of {type(backbone).__name__}, after {best.at[0]!r}, costs "
                f"{best.shares[0]:.0%} of it: no earlier place was found {place}. Name one with "
                "'at' where others may cross, and pass a head for it with 'heads'.",
                stacklevel=3,
            )
        return best.cutter, stages, chosen, features


def _plans(
    backbone: nn.Module, inputs: Features, num_exits: int | None, logits: Tensor
) -> Iterator[_Plan]:
    """Cuts at ends of modules, then at any position, by each cutter in turn."""
    most = 0
    for cutter in _cutters(backbone, inputs):
        by_module = {path: cutter.places[path] for path in _narrow_paths(cutter)}
        choices = [by_module, {**by_module, **cutter.between}] if cutter.between else [by_module]
        if logits.ndim == 4:
            choices = [{**cutter.between, **_shortest(cutter.places)}]
        for positions in choices:
            is_askable = num_exits is not None and 2 <= num_exits <= len(positions) + 1
            priced = _Priced(backbone, cutter, inputs, positions) if is_askable else None
            groups: Sequence[Sequence[int]] = [range(len(positions))]
            if priced is not None and logits.ndim == 4:
                groups = _groups_with_maps(priced, inputs[0], logits)
            for group in groups:
                most = max(most, len(group))
                if priced is not None and num_exits is not None and num_exits <= len(group) + 1:
                    yield priced.plan(group, num_exits)
    if num_exits is None or not 2 <= num_exits <= most + 1:
        raise InvalidArgumentError(
            f"With at=\"auto\", the 'num_exits' parameter must be an int in [2, {most + 1}]: "
            f"{type(backbone).__name__} has {most} places for an exit, and its end. "
            f"Got {num_exits}."
        )


class _Priced:
    """Positions in order, what crosses each, and the MACs before it."""

    def __init__(
        self, backbone: nn.Module, cutter: Cutter, inputs: Features, positions: Mapping[str, int]
    ) -> None:
        self.cutter = cutter
        self.paths = sorted(positions, key=positions.__getitem__)
        self.features: list[Features] = []
        macs = []
        features = tuple(tensor[:1].clone() for tensor in inputs)
        with evaluation_mode(backbone), torch.no_grad():
            for stage in cutter.stages([positions[path] for path in self.paths]):
                output, counted = run_and_count(stage, *features)
                macs.append(counted)
                features = as_features(output)
                self.features.append(features)
        *self.until, self.total = accumulate(macs)

    def plan(self, group: Sequence[int], num_exits: int) -> _Plan:
        """The positions of a group that share the backbone's MACs out most evenly."""
        until = [self.until[k] for k in group]
        cuts = choose_cuts(until, total=self.total, num_exits=num_exits)
        return _Plan(
            cutter=self.cutter,
            at=[self.paths[group[cut]] for cut in cuts],
            shares=[until[cut] / max(self.total, 1) for cut in cuts],
        )

    def is_within(self, k: int) -> bool:
        """Return True inside a small block: less crosses shortly before, and shortly after."""
        fewer = [
            self.until[k] - until
            for until, features in zip(self.until, self.features, strict=False)
            if len(features) < len(self.features[k])
        ]
        near = self.total * _NEAR
        return any(0 <= gap <= near for gap in fewer) and any(-near <= gap <= 0 for gap in fewer)


def _groups_with_maps(priced: _Priced, images: Tensor, logits: Tensor) -> list[list[int]]:
    """Positions whose output a dense head can read: first where nothing else crosses."""
    sizes = images.shape[2:], logits.shape[2:]
    found = [find_maps(features, *sizes) for features in priced.features[:-1]]
    maps = {k: each for k, each in enumerate(found) if each and not priced.is_within(k)}
    free = [k for k in maps if maps[k].grid is None]
    alone = [k for k in free if len(priced.features[k]) == 1]
    return [alone, free, list(maps)]


def _cutters(backbone: nn.Module, inputs: Features) -> Iterator[Cutter]:
    """Every cutter that can follow a backbone, the cheapest first; an error if none can."""
    layers = find_layer_list(backbone)
    if layers is not None:
        yield layers
    makers: list[Callable[[], Cutter]] = [lambda: Exported(backbone, inputs)]
    if layers is None:
        makers.insert(0, lambda: Graph(backbone, inputs))
    if len(inputs) == 1 and layers is None:
        makers.insert(0, lambda: Chain(backbone))
    failures = []
    for make in makers:
        try:
            cutter = make()
        except NotTraceableError as error:
            failures.append(error)
        else:
            yield cutter
    if layers is None and len(failures) == len(makers):
        _require_training(backbone, inputs)
        with_line = [error for error in reversed(failures) if "`" in str(error)]
        why = reason([*with_line, failures[-1]][0])
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be cut: its forward cannot be followed "
            f"({why}). Move that part into a module of its own without children, "
            "which stays whole, or wrap the backbone in an nn.Sequential of pieces that run in "
            "order."
        ) from failures[-1]


def _require_training(backbone: nn.Module, inputs: Features) -> None:
    """Refuse a backbone that fails on its own where it is trained on the example."""
    try:
        trained = copy.deepcopy(backbone).train()
    except Exception:  # whatever its parts raise
        return
    with torch.no_grad(), torch.random.fork_rng():
        try:
            trained(*(torch.cat([tensor, tensor]) for tensor in inputs))
        except Exception as error:  # whatever the backbone's own code raises
            raise BackboneCutError(
                f"{type(backbone).__name__} cannot be cut: in training it fails on the example: "
                f"{reason(error).rstrip('.')}. Pass an example as it is trained on."
            ) from error


def _find_cutter(backbone: nn.Module, inputs: Features, at: Sequence[str] = ()) -> Cutter:
    """The cutter with the most places, of which two are enough, those that were named included."""
    found: list[Cutter] = []
    for cutter in _cutters(backbone, inputs):
        found.append(cutter)
        if len(_narrow_paths(cutter)) > 1 and set(at) <= cutter.places.keys():
            break
    return max(found, key=lambda cutter: len(_narrow_paths(cutter)))


def _check_logits(backbone: nn.Module, inputs: Features, num_classes: int) -> Tensor:
    with evaluation_mode(backbone), torch.no_grad(), explained(inputs):
        logits = logits_of(backbone, inputs)
    check_logits(logits, backbone, inputs, num_classes)
    return logits


def _positions(backbone: nn.Module, cutter: Cutter, at: Sequence[str]) -> list[int]:
    known = {**cutter.between, **cutter.places}
    for path in at:
        if path not in known:
            raise BackboneCutError(_no_cut_after(backbone, cutter, path))
    positions = [known[path] for path in at]
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
