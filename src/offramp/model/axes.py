"""The axes of a stage's features: that of the samples, and that of the channels.

An entry of a bias, a row of a weight matrix or a factor of a normalisation belongs to one channel
of what its module puts out. Functions, shortcuts and permutations between that module and the cut
move the axis of channels; they do not mix it. So gradients find it: along the axis of channels,
different indexes of the features come from different entries of one weight; along an axis of
positions, all come from the same entries. Nothing goes by names or sizes.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from offramp.errors import BackboneCutError, ShapeError
from offramp.measure.cost import evaluation_mode
from offramp.model.multi_exit import Features, as_features

_MOST_INDEXES = 6
"""Indexes of an axis that are asked: more than any pixel shuffle in use has phases."""

_MOST_MAKERS = 24
"""Modules that are asked: those of several blocks of a transformer."""

_FEW_MAKERS = 2
"""Modules that are asked first: enough if what reads the features says the same."""

_MOST_READERS = 4

Source = tuple[Tensor, frozenset[int]]
"""A tensor, and those of its axes along which an entry may stand for a channel."""


def channel_axis(
    before: Sequence[nn.Module],
    after: Sequence[nn.Module],
    inputs: Features,
    *,
    last_inputs: Features | None = None,
) -> int | None:
    """Find the axis of channels in the first of the features that cross a cut.

    The last few modules with weights before the cut and the normalisations, convolutions and linear
    layers that read the features are asked. If these do not agree, many modules before the cut are
    asked. Where those disagree, as after a layer that mixes tokens, or are silent, the readers
    decide. Evaluation mode counts; weights and statistics stay as they are. ``last_inputs`` are two
    samples of what the last module before the cut is given.
    """
    stages = nn.ModuleList([*before, *after])
    with torch.inference_mode(False), evaluation_mode(stages), torch.random.fork_rng():
        torch.manual_seed(0)
        samples = _two_samples(inputs)
        try:
            if last_inputs is None:
                with torch.no_grad():
                    last_inputs = _run(before[:-1], samples)
            nearest, features = _axes_by_makers(before[-1:], last_inputs, is_near=True)
            by_readers = _axes_by_readers(after, features)
            if len(nearest) == 1 and nearest == by_readers:
                axes = nearest
            else:
                axes, _ = _axes_by_makers(before, samples)
                if len(axes) != 1:
                    axes = axes & by_readers if axes else by_readers
        except (RuntimeError, ShapeError):  # without gradients, or of other outputs than tensors
            return None
    return axes.pop() if len(axes) == 1 else None


def require_batch_first(
    stages: Sequence[nn.Module], inputs: Features, at: Sequence[str]
) -> list[Features]:
    """Refuse cuts whose features do not hold one sample after the other, each for itself.

    Returns what each stage is given for two samples.
    """
    with (
        torch.inference_mode(False),
        evaluation_mode(nn.ModuleList(stages)),
        torch.random.fork_rng(),
        torch.no_grad(),
    ):
        torch.manual_seed(0)
        both = _two_samples(inputs)
        # The second sample: a recurrent layer carries from the first to it, not the other way.
        second = tuple(tensor[1:] for tensor in both)
        given = [both]
        for stage, path in zip(stages, at, strict=False):
            second, both = _run([stage], second), _run([stage], both)
            for one, two in zip(second, both, strict=True):
                _require_batch_first(one, two, path)
            given.append(both)
        return given


def _require_batch_first(one: Tensor, two: Tensor, path: str) -> None:
    """The features of a sample, alone and as the second of a batch."""
    if one.shape[:1] != (1,) or two.shape != (2, *one.shape[1:]):
        raise BackboneCutError(
            f"Expected features with the batch axis first after {path!r}. Got the shapes "
            f"{tuple(one.shape)} for one sample and {tuple(two.shape)} for two. Cut where samples "
            "come first, or set the batch_first of the layers around the cut."
        )
    if one.is_floating_point() or one.is_complex():
        precision = max(0.01, torch.finfo(one.dtype).eps ** 0.5)
        size = float(one.abs().nan_to_num(posinf=0).amax()) if one.numel() else 0.0
        is_own = torch.allclose(two[1:], one, rtol=0, atol=precision * size, equal_nan=True)
    else:
        is_own = torch.equal(two[1:], one)
    if not is_own:
        raise BackboneCutError(
            f"Expected features that are each sample's own after {path!r}. They depend on the "
            "other samples of the batch, from which some shall leave: is the batch_first of a "
            "layer set otherwise than its input is laid out, or does a normalisation use the "
            "batch in evaluation?"
        )


def _two_samples(inputs: Features) -> Features:
    """The first and the last sample, moved away from an example of zeros.

    Never one alone: for that, batch normalisation has wrong gradients on CPUs (torch 2.13), where
    the features are transposed later.
    """
    both = (torch.cat([tensor[:1], tensor[-1:]]) for tensor in inputs)
    return tuple(
        tensor + torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for tensor in both
    )


def _run(stages: Sequence[nn.Module], features: Features) -> Features:
    features = tuple(tensor.clone() for tensor in features)  # a stage may work in place
    for stage in stages:
        features = as_features(stage(*features))
    return features


def _axes_by_makers(
    stages: Sequence[nn.Module], inputs: Features, *, is_near: bool = False
) -> tuple[set[int], Features]:
    """The axes that weights of the stages tell from all others, one a weight, and the features."""
    weights_of = {m: _weights_of(m) for m in nn.ModuleList(stages).modules()}
    with (
        _outputs_as_sources(weights_of) as outputs_of,
        _in_order(weights_of) as called,
        _needing_gradients(stages, [weight for own in weights_of.values() for weight, _ in own]),
        torch.enable_grad(),
    ):
        features = _run(stages, inputs)
        told = tuple(tensor.detach() for tensor in features)
        if not features[0].requires_grad:
            return set(), told
        makers = _last_with_weights(stages, called, is_near=is_near)
        sources = [
            *(source for module in makers for source in weights_of[module]),
            *(source for module in makers for source in outputs_of.get(module, ())),
        ]
        if not sources:
            return set(), told
        axes_of: list[set[int]] = [set() for _ in sources]
        for axis in _long_axes(features[0], but=0):
            for axes, dims in zip(axes_of, _told_apart(features[0], axis, sources), strict=True):
                if dims:
                    axes.add(axis)
    return {axis for axes in axes_of if len(axes) == 1 for axis in axes}, told


def _last_with_weights(
    stages: Sequence[nn.Module], called: Mapping[nn.Module, float], *, is_near: bool
) -> list[nn.Module]:
    """The last modules to run that have weights, or channels that their class tells."""
    ranks: dict[nn.Module, float] = {}
    for stage in stages:
        ranks[stage] = called[stage]
        for child in stage.children():
            _rank(child, math.inf, called, ranks)
    makers = [m for m in ranks if _weights_of(m) or _tells_its_channels(m)]
    makers.sort(key=ranks.__getitem__)
    if is_near:  # weights of a module around others may be read far from its end
        return [m for m in makers if not m._modules and ranks[m] < math.inf][-_FEW_MAKERS:]
    return [m for m in makers if m in makers[-_MOST_MAKERS:] or ranks[m] == math.inf]


@contextmanager
def _in_order(modules: Iterable[nn.Module]) -> Iterator[Mapping[nn.Module, float]]:
    """Count the modules as they end."""
    count, called = itertools.count(), dict[nn.Module, float]()
    handles = [
        module.register_forward_hook(lambda module, *_: called.update({module: next(count)}))
        for module in modules
    ]
    with _removing(handles):
        yield called


def _rank(
    module: nn.Module,
    around: float,
    called: Mapping[nn.Module, float],
    ranks: dict[nn.Module, float],
) -> None:
    """Note when a module runs: one that is not called, with the one around it; else at any time."""
    ranks[module] = called.get(module, around)
    for child in module.children():
        _rank(child, ranks[module], called, ranks)


class _Enough(BaseException):
    """Raised where enough readers ran; no module catches it."""


def _axes_by_readers(stages: Sequence[nn.Module], features: Features) -> set[int]:
    """The axes of features that the first layer that tells takes for channels."""
    read: list[tuple[Tensor, int]] = []
    if not features[0].is_floating_point():
        return set()
    with _noting_readers(stages, read), torch.enable_grad():
        first = features[0].clone().requires_grad_()
        with suppress(_Enough):
            _run(stages, (first, *features[1:]))
        source = (first, frozenset(_long_axes(first, but=0)))
        for tensor, axis in read:
            if tensor.requires_grad:
                (axes,) = _told_apart(tensor, axis, [source])
                if axes:
                    return axes
    return set()


def _long_axes(tensor: Tensor, *, but: int) -> list[int]:
    """The axes with more than one index, but this one."""
    return [axis for axis, size in enumerate(tensor.shape) if size > 1 and axis != but]


def _told_apart(target: Tensor, axis: int, sources: Sequence[Source]) -> list[set[int]]:
    """For each source, its axes along which no entry reaches two indexes of the target's axis.

    Such an entry must do so as a whole: for all of its source's other axes, not one index of them.
    """
    candidates = [set(dims) for _, dims in sources]
    seen: list[dict[int, Tensor]] = [{} for _ in sources]
    num_reached = [0] * len(sources)
    for index in _indexes(target, axis):
        part = target.select(axis, index)
        gradients = torch.autograd.grad(
            (part * torch.rand_like(part)).sum(),
            [tensor for tensor, _ in sources],
            retain_graph=True,
            allow_unused=True,
        )
        for i, gradient in enumerate(gradients):
            if gradient is None or not gradient.any():
                continue
            num_reached[i] += 1
            is_hit = gradient != 0
            for dim in list(candidates[i]):
                hits = _hits(is_hit, dim)
                before = seen[i].get(dim, torch.zeros_like(hits))
                others = (_hits(is_hit, other) for other in _long_axes(is_hit, but=dim))
                if (before & hits).any() or any(int(other.sum()) == 1 for other in others):
                    candidates[i].discard(dim)
                seen[i][dim] = before | hits
        if not any(candidates):
            break
    return [dims if num > 1 else set() for dims, num in zip(candidates, num_reached, strict=True)]


def _hits(is_hit: Tensor, dim: int) -> Tensor:
    """Find the indexes of an axis that are hit anywhere."""
    return is_hit.movedim(dim, 0).flatten(1).any(1) if is_hit.ndim > 1 else is_hit


def _indexes(target: Tensor, axis: int) -> list[int]:
    """Some indexes of an axis, from the most active to the least: dead ones tell nothing."""
    activity = target.detach().abs().movedim(axis, 0).flatten(1).sum(1)
    ranked: list[int] = activity.argsort(descending=True).tolist()
    num = min(len(ranked), _MOST_INDEXES)
    return [ranked[i * len(ranked) // num] for i in range(num)]


def _weights_of(module: nn.Module) -> list[Source]:
    """A module's own weights; where its class says which entries are channels, one is enough."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    if isinstance(module, (nn.MultiheadAttention, nn.Embedding)):
        return []  # the first puts out by a layer of its own
    if isinstance(module, (_ConvNd, nn.Linear)):
        if "bias" in own:
            return [(own["bias"], frozenset({0}))]
        if "weight" in own:
            return [(own["weight"], frozenset({int(isinstance(module, _ConvTransposeNd))}))]
    return [(p, frozenset(d for d in range(p.ndim) if p.shape[d] > 1)) for p in own.values()]


@contextmanager
def _needing_gradients(stages: Sequence[nn.Module], weights: Sequence[Tensor]) -> Iterator[None]:
    """Let these weights alone have gradients inside the block, frozen ones too."""
    parameters = [p for p in nn.ModuleList(stages).parameters() if p.is_floating_point()]
    before = [parameter.requires_grad for parameter in parameters]
    wanted = {id(weight) for weight in weights}
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, needs in zip(parameters, before, strict=True):
            parameter.requires_grad_(needs)


@contextmanager
def _outputs_as_sources(
    modules: Iterable[nn.Module],
) -> Iterator[Mapping[nn.Module, list[Source]]]:
    """Add a bias of zeros to what each module puts out whose own weights cannot tell its channels.

    A recurrent layer mixes channels from step to step, a normalisation may have no weights, and
    in those of an embedding the entries stand for words too.
    """
    sources = defaultdict[nn.Module, list[Source]](list)

    def add_bias(module: nn.Module, args: object, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            return output
        axis = 1 if type(module) is nn.GroupNorm else first.ndim - 1
        bias = first.new_zeros(first.shape[axis]).requires_grad_()
        sources[module].append((bias, frozenset({0})))
        biased = first + bias.reshape([-1, *(1,) * (first.ndim - 1 - axis)])
        return (biased, *output[1:]) if isinstance(output, tuple) else biased

    handles = [m.register_forward_hook(add_bias) for m in modules if _tells_its_channels(m)]
    with _removing(handles):
        yield sources


def _tells_its_channels(module: nn.Module) -> bool:
    """Return True if its class fixes the channel axis of its output."""
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return len(module.normalized_shape) == 1  # type: ignore[arg-type]
    return type(module) in (nn.LSTM, nn.GRU, nn.RNN, nn.Embedding, nn.GroupNorm)


@contextmanager
def _noting_readers(stages: Sequence[nn.Module], read: list[tuple[Tensor, int]]) -> Iterator[None]:
    """Note what normalisations and convolutions are given, and its axis of channels."""

    def note(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        axis = _axis_read(module, args[0] if args else None, output)
        if axis is not None:
            read.append((args[0], axis))  # type: ignore[arg-type]
            if len(read) == _MOST_READERS:
                raise _Enough

    modules = list(nn.ModuleList(stages).modules())
    handles = [
        module.register_forward_hook(note)
        for module in modules
        if _reads_channels(module) or not module._modules
    ]
    vectors = [vector for module in modules if (vector := _vector_of(module)) is not None]
    with _removing(handles), _needing_gradients(stages, vectors):
        yield


def _axis_read(module: nn.Module, given: object, output: object) -> int | None:
    """The axis of channels in what a module reads: by its class, or by its vectors of weights."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return None
    if _reads_channels(module):
        return given.ndim - 1 if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1
    if isinstance(module, nn.Linear):
        return 1 if given.ndim == 2 else None  # of more axes, the last may be positions
    vector = _vector_of(module)
    if vector is None or not isinstance(output, Tensor) or output.shape != given.shape:
        return None
    if not output.requires_grad:
        return None
    source = (vector, frozenset({0}))
    axes = [
        axis
        for axis in _long_axes(output, but=0)
        if output.shape[axis] == len(vector) and any(_told_apart(output, axis, [source]))
    ]
    return axes[0] if len(axes) == 1 else None


def _vector_of(module: nn.Module) -> Tensor | None:
    """A weight for each channel of a module that has no others, such as a normalisation."""
    own = list(module.parameters(recurse=False))
    is_scale = own and all(p.ndim == 1 and len(p) == len(own[0]) > 1 for p in own)
    return own[0] if is_scale and own[0].is_floating_point() else None


@contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reads_channels(module: nn.Module) -> bool:
    """Return True if its class fixes the channel axis of its input."""
    author = getattr(type(module).forward, "__module__", None) or ""
    if not author.startswith("torch.nn."):
        return False  # a forward of its own may turn the axes first
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    return isinstance(module, (_ConvNd, _BatchNorm, nn.GroupNorm))
