"""Choosing exit heads for a backbone that was cut, and checking those that are given.

Shapes: ``B`` batch, ``C`` classes, ``h w`` cells of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, ShapeError, reason
from offramp.measure.cost import evaluation_mode
from offramp.model.axes import channel_axis, require_batch_first
from offramp.model.dense_heads import ReadsEverything, dense_head_for, find_maps
from offramp.model.heads import TokenHead, head_for, token_head
from offramp.model.multi_exit import Features, as_features


def fit_heads(
    heads: Sequence[nn.Module] | None,
    stages: Sequence[nn.Module],
    inputs: Features,
    stage_features: Sequence[Features],
    *,
    at: Sequence[str],
    num_read: int,
) -> list[nn.Module]:
    """Choose a head for each cut, or check those that a caller gave."""
    if heads is not None:
        heads = _listed(heads, at)
    given = require_batch_first(stages, inputs, at)
    if heads is None:
        is_causal = _is_causal(stages[:-1], inputs)
        heads = [
            choose_head(
                stages,
                inputs,
                stage_features,
                after=k,
                path=path,
                given=given[k],
                is_causal=is_causal,
            )
            for k, path in enumerate(at)
        ]
    _check(heads, stage_features, at=at, num_read=num_read)
    chosen = [
        head
        if len(features) == num_read or isinstance(head, ReadsEverything | ReadsFirst)
        else ReadsFirst(head, num_read)
        for head, features in zip(heads, stage_features, strict=False)
    ]
    dtype = stage_features[-1][0].dtype
    return [
        head if features[0].dtype == dtype else AnswersIn(head, dtype)
        for head, features in zip(chosen, stage_features, strict=False)
    ]


def choose_head(
    stages: Sequence[nn.Module],
    inputs: Features,
    stage_features: Sequence[Features],
    *,
    after: int,
    path: str,
    given: Features | None = None,
    is_causal: bool = False,
) -> nn.Module:
    """Choose an exit head for the features of a stage, which is given these two samples."""
    features, logits = stage_features[after][0], stage_features[-1][0]
    where = f"the features after {path!r}, of shape {tuple(features.shape)}"
    if features.ndim < 2 or not features.is_floating_point():
        raise ShapeError(
            f"No exit head can be chosen for {where} and type {features.dtype}: cut elsewhere, or "
            "pass your own with 'heads'."
        )
    axis: int | None = 1
    if features.ndim > 2:
        before, behind = stages[: after + 1], stages[after + 1 :]
        axis = channel_axis(before, behind, inputs, last_inputs=given)
    if logits.ndim == 4:
        size = (logits.shape[2], logits.shape[3])
        maps = find_maps(stage_features[after], inputs[0].shape[2:], size, axis)
        if maps is None:
            raise ShapeError(
                f"No exit head can be chosen for {where}: the backbone says a class for every "
                "pixel, and they are no map (B, C, h, w) or (B, h, w, C), nor tokens (B, T, C) of "
                "a grid of patches. Cut where a map is, or pass your own with 'heads'."
            )
        return dense_head_for(stage_features[after], maps, logits.shape[1], size=size).to(features)
    if axis is None:
        raise ShapeError(
            f"No exit head can be chosen for {where}: the weights around the cut do not tell which "
            "axis holds the channels. Pass your own with 'heads', one for each cut."
        )
    if is_causal and features.ndim == 3 and axis == 2:
        return token_head(features.shape[2], logits.shape[1], pool="last").to(features)
    head = head_for(features, logits.shape[1], axis=axis).to(features)
    others = stage_features[after][1:]
    reads_mask = isinstance(head, TokenHead) and others and others[0].shape == features.shape[:2]
    return head if reads_mask or not others else ReadsFirst(head, 1)


def _is_causal(stages: Sequence[nn.Module], inputs: Features) -> bool:
    """Return True if each token of a text sees those before it, and none after it."""
    ids_BT = inputs[0]
    if not stages or ids_BT.ndim != 2 or ids_BT.is_floating_point() or ids_BT.shape[1] < 2:
        return False

    def features_of(changed: int | None) -> Tensor:
        given_BT = ids_BT.clone()
        if changed is not None:
            given_BT[:, changed] = (given_BT[:, changed] == 0).to(given_BT)
        features: Features = (given_BT, *(tensor.clone() for tensor in inputs[1:]))
        for stage in stages:
            features = as_features(stage(*features))
        return features[0]

    with evaluation_mode(nn.ModuleList(stages)), torch.no_grad(), torch.random.fork_rng():
        before, first, last = (features_of(changed) for changed in (None, 0, -1))
    if before.ndim != 3 or before.shape[:2] != ids_BT.shape:
        return False
    near = 1e-5 * float(before.abs().max())
    moved_first, moved_last = ((other - before).abs() > near for other in (first, last))
    return not bool(moved_last[:, :-1].any()) and bool(moved_first[:, -1].any())


class ReadsFirst(nn.Module):
    """An exit head that reads the first of the tensors that cross its cut."""

    def __init__(self, head: nn.Module, num_read: int) -> None:
        super().__init__()
        self.head = head
        self._num_read = num_read

    def forward(self, *features: Tensor) -> Tensor:
        """Map what the head maps; the others pass by."""
        logits: Tensor = self.head(*features[: self._num_read])
        return logits


class AnswersIn(nn.Module):
    """An exit head on features of another dtype than that of the backbone's logits."""

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = head
        self._dtype = dtype

    def forward(self, *features: Tensor) -> Tensor:
        """Map what the head maps."""
        logits: Tensor = self.head(*features).to(self._dtype)
        return logits


def _listed(heads: Sequence[nn.Module], at: Sequence[str]) -> list[nn.Module]:
    """One module of its own for each cut, or an error."""
    is_one = isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList)
    if is_one or not isinstance(heads, Iterable):
        raise InvalidArgumentError(
            f"Expected a list of heads, one for each of the {len(at)} cuts. "
            f"Got one {type(heads).__name__}: put it in a list."
        )
    listed = list(heads)
    if len(listed) != len(at):
        raise InvalidArgumentError(
            f"Expected one head for each of the {len(at)} cuts. Got {len(listed)}."
        )
    for index, (head, path) in enumerate(zip(listed, at, strict=True)):
        if not isinstance(head, nn.Module):
            came = f"the class {head.__name__}" if isinstance(head, type) else type(head).__name__
            raise InvalidArgumentError(
                f"Expected an nn.Module as heads[{index}], after {path!r}. Got {came}."
            )
        if any(head is other for other in listed[:index]):
            raise InvalidArgumentError(
                f"Expected a head of its own for each cut. heads[{index}], after {path!r}, is a "
                "module that is there before: pass a copy, made with copy.deepcopy."
            )
    return listed


def _check(
    heads: Sequence[nn.Module],
    stage_features: Sequence[Features],
    *,
    at: Sequence[str],
    num_read: int,
) -> None:
    """Bring heads to the device and dtype of their features, run them, and check their logits."""
    logits = stage_features[-1][0]
    for index, (head, features, path) in enumerate(zip(heads, stage_features, at, strict=False)):
        first = features[0]
        head.to(first if first.is_floating_point() else first.device)
        read = features if isinstance(head, ReadsEverything) else features[:num_read]
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in read)
        expected = (
            f"Expected a head from features of shape {shapes} to logits of shape "
            f"{tuple(logits.shape)} after {path!r}. heads[{index}] ({type(head).__name__})"
        )
        try:
            output = _run_in_both_modes(head, read)
        except Exception as error:  # whatever a head of one's own raises
            raise ShapeError(f"{expected} fails: {reason(error)}.") from error
        if not isinstance(output, Tensor):
            raise ShapeError(f"{expected} returns {type(output).__name__}.")
        if output.shape != logits.shape or not output.is_floating_point():
            raise ShapeError(f"{expected} returns {output.dtype} of shape {tuple(output.shape)}.")


def _run_in_both_modes(head: nn.Module, features: Features) -> object:
    """The head's output in evaluation; in training it only must not fail."""
    with _left_as_it_was(head), torch.no_grad(), torch.random.fork_rng():
        head.eval()
        output: object = head(*(tensor.clone() for tensor in features))
        head.train()
        head(*(torch.cat([tensor, tensor]) for tensor in features))  # one alone has no variance
    return output


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Put statistics and modes back after the block."""
    statistics = [(buffer, buffer.clone()) for buffer in module.buffers()]
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for buffer, value in statistics:
            buffer.copy_(value)
        for child, training in modes:
            child.training = training
