"""Proof that what was made of a backbone computes what the backbone computes.

Equal outputs on the caller's example are no proof: zeros hide a ReLU, a scale, a whole branch that
starts at zero. So the two are compared on random inputs too, with weights that are disturbed, in
evaluation and in training. Everything is put back as it was, bit for bit.

Shapes: ``B`` batch, ``T`` tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from offramp.errors import BackboneCutError, reason
from offramp.measure.cost import evaluation_mode
from offramp.model.draws import RANGES, draw, vocabularies_of
from offramp.model.multi_exit import Features

_TOLERANCE_IN_TRAINING = 1e-5
"""Of the largest logit: in training two runs are not always equal to the bit."""

_DEPENDENCE = {torch.float32: 0.05, torch.float64: 0.05}
"""Of the largest logit: by so much the other samples of a batch may move a sample's logits. Kernels
differ by the size of a batch, 1e-6 a layer; a mean over the batch moves them by far more."""

DEPENDS = "a sample's logits depend on the other samples of its batch"

_SMALL = 2**16
"""Tensors of up to so many elements are disturbed in any case, larger ones where all are equal."""

_NOISE = 0.1
"""Deviation of what is added to weights that are all equal; a share of the deviation of others."""


def find_difference(
    original: nn.Module,
    replacement: nn.Module,
    inputs: Features,
    *,
    logits: Tensor | None = None,
    tolerance: float = 0.0,
) -> str | None:
    """Compare a backbone, which gave these logits, with what was made of it of the same modules.

    Both run on the inputs and on random ones of their shape and kind, as they are and with weights
    disturbed (zeros hide what is multiplied by them), in evaluation and in training mode, with the
    same random numbers; statistics must move alike. Modes, weights, statistics and the caller's
    random numbers are left as they were.
    """
    modules = nn.ModuleList([original, replacement])
    statistics = _Statistics(modules)
    with evaluation_mode(modules), torch.no_grad(), _own_random_numbers():
        try:
            try:
                vocabularies = vocabularies_of(original, inputs)
            except Exception as error:  # whatever the backbone's own code raises
                return f"it fails on the example: {reason(error)}"
            pair = _Pair(original, replacement, statistics, inputs, vocabularies)
            rounds: Sequence[_Round] = _ROUNDS
            if logits is not None and pair.gives(logits, tolerance):
                rounds = rounds[1:]
            for each in rounds:
                why = pair.differ(each, tolerance)
                if why is not None:
                    return why
            return None
        finally:
            statistics.restore()


def logits_of(module: nn.Module, inputs: Features) -> Tensor:
    """Run a backbone on inputs that stay as they are, though its modules may work in place."""
    return logits_in(module(*(tensor.clone() for tensor in inputs)), module)


def logits_in(output: object, module: nn.Module) -> Tensor:
    """The logits in what a backbone returned."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", output) if logits is None else logits
    if not isinstance(logits, Tensor):
        mode = " in training mode" if module.training else ""
        keys = list(output) if isinstance(output, Mapping) else [0]
        raise BackboneCutError(
            f"Expected a backbone that returns a tensor of logits. {type(module).__name__} "
            f"returns {described(output)}{mode}. Wrap it in a module that returns the logits "
            f"alone, or pass add_exits the place of the logits, such as output={keys[0]!r}."
        )
    return logits


def described(output: object) -> str:
    """Describe in a few words what a backbone returned."""
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        parts = [str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in output]
        return f"{type(output).__name__} of {len(parts)}, {' and '.join(parts)}"
    return type(output).__name__


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One comparison: on which inputs, with which weights, in which mode."""

    seed: int
    num_draws: int
    with_example: bool = False
    is_disturbed: bool = False
    is_training: bool = False


_ROUNDS = (
    _Round(seed=1, num_draws=0, with_example=True),
    _Round(seed=2, num_draws=2, is_disturbed=True),
    _Round(seed=3, num_draws=2, is_disturbed=True, is_training=True),  # one alone has no variance
)


class _Expected(NamedTuple):
    """The original's result on inputs that it can run on."""

    inputs: Features
    logits: Tensor
    statistics: dict[str, Tensor]


class _Pair:
    """The original, the replacement, and what both are run on."""

    def __init__(
        self,
        original: nn.Module,
        replacement: nn.Module,
        statistics: _Statistics,
        example: Features,
        vocabularies: Sequence[int | None],
    ) -> None:
        self.original, self.replacement, self.statistics = original, replacement, statistics
        self._example, self._vocabularies = example, vocabularies

    def gives(self, logits: Tensor, tolerance: float) -> bool:
        """Return True if the replacement gives these logits for the example, as in round one."""
        if self._set_mode(False) is not None:
            return False
        try:
            given = self._run(self.replacement, self._example, _ROUNDS[0])
        except Exception:  # which the round will tell
            return False
        return _compare(given, logits, tolerance) is None

    def differ(self, asked: _Round, tolerance: float) -> str | None:
        """Describe how the two differ in a round."""
        mode = "training" if asked.is_training else "evaluation"
        with ExitStack() as disturbance:
            why = self._set_mode(asked.is_training)
            if why is not None:
                return why
            try:
                expected = self._expect(asked, disturbance)
            except Exception as error:  # whatever the backbone's own code raises
                return f"in {mode} the backbone fails: {reason(error)}"
            try:
                logits = self._run(self.replacement, expected.inputs, asked)
            except Exception as error:
                return f"in {mode} its pieces fail where it runs: {reason(error)}"
            if asked.is_training:
                tolerance = max(tolerance, _TOLERANCE_IN_TRAINING)
            why = _compare(logits, expected.logits, tolerance)
            if why is None and asked.is_training:
                why = self._compare_statistics(expected)
            if why is None and asked.is_disturbed and not asked.is_training:
                why = self._depends_on_batch(expected, asked, disturbance)
        return None if why is None else f"in {mode} {why}"

    def _set_mode(self, training: bool) -> str | None:
        """Set the mode of both; a ``train`` of the original's own may set parts otherwise."""
        self.original.train(training)
        modes = {module: module.training for module in self.original.modules()}
        self.replacement.train(training)
        for path, module in self.original.named_modules():
            if module.training != modes[module]:
                return (
                    f"its own method train() sets the mode of {path!r}, which its pieces would not"
                )
        return None

    def _expect(self, asked: _Round, disturbance: ExitStack) -> _Expected:
        """Run the original on the first inputs that it takes, the widest first.

        Weights stay disturbed until the end of ``disturbance``.
        """
        usable: _Expected | None = None
        failure: Exception | None = None
        for is_disturbed in (True, False) if asked.is_disturbed else (False,):
            disturbance.close()
            usable = None
            if is_disturbed:
                disturbance.enter_context(_disturbed(self.original, asked.seed))
            for within in RANGES:
                _seed(asked.seed)
                inputs = draw(
                    self._example,
                    asked.num_draws,
                    self._vocabularies,
                    within,
                    first=asked.seed,
                )
                if asked.with_example:
                    rows = zip(self._example, inputs, strict=True)
                    inputs = tuple(torch.cat(both) for both in rows)
                try:
                    logits = self._run(self.original, inputs, asked)
                except Exception as error:  # such as a sample that it finds out of range
                    failure = failure or error
                    continue
                found = _Expected(inputs, logits, self.statistics.values())
                if bool(logits.isfinite().all()):
                    return found
                usable = found
        if usable is not None:
            return usable
        assert failure is not None
        raise failure

    def _run(self, module: nn.Module, inputs: Features, asked: _Round) -> Tensor:
        self.statistics.restore()
        _seed(asked.seed)
        if not asked.is_training:
            return logits_of(module, inputs)
        with sdpa_kernel(SDPBackend.MATH):  # the one kernel that always draws dropout alike
            return logits_of(module, inputs)

    def _compare_statistics(self, expected: _Expected) -> str | None:
        moved = self.statistics.values()
        for name, tensor in expected.statistics.items():
            if not _are_close(moved[name], tensor, _TOLERANCE_IN_TRAINING):
                return f"it leaves other values in the buffer {name!r} than the backbone"
        return None

    def _depends_on_batch(
        self, expected: _Expected, asked: _Round, disturbance: ExitStack
    ) -> str | None:
        """Samples leave, so that what the others of its batch are must not matter to a sample."""
        first = tuple(t[:1] for t in expected.inputs)
        try:
            alone = self._run(self.original, first, asked)
        except Exception as error:
            return f"it fails on a batch of one sample: {reason(error)}"
        together = expected.logits[: len(alone)]
        if len(expected.logits) != len(expected.inputs[0]) or len(alone) != 1:
            return "its logits do not have the batch axis first"
        near = _DEPENDENCE.get(alone.dtype, 0.5)
        if _are_close(alone, together, near):
            return None
        # Disturbed weights may blow up how kernels differ by the size of a batch: keep the size.
        beside_itself = tuple(t.expand(len(expected.logits), *t.shape[1:]) for t in first)
        same_size = self._run(self.original, beside_itself, asked)[:1]
        pieces = self._run(self.replacement, first, asked)
        if _are_close(same_size, together, near) and torch.equal(pieces, alone):
            disturbance.close()
            both = draw(self._example, 2, self._vocabularies, "example")
            alone = self._run(self.original, tuple(t[:1] for t in both), asked)
            if _are_close(alone, self._run(self.original, both, asked)[:1], near):
                return None
        return DEPENDS


def _compare(logits: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if logits.shape != expected.shape:
        return (
            f"it gives logits of shape {tuple(logits.shape)} and the backbone "
            f"{tuple(expected.shape)}"
        )
    if not bool(expected.isfinite().any()):
        return "the backbone gives no finite number: pass an example of real data"
    if _are_close(logits, expected, tolerance):
        return None
    gap = (logits.double() - expected.double()).abs().nan_to_num(torch.inf).max()
    return f"it gives another output than the backbone, off by {gap:.2g}"


def _are_close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    if ours.shape != theirs.shape or not theirs.numel():
        return ours.shape == theirs.shape
    ours, theirs = ours.to(torch.float64), theirs.to(torch.float64)
    finite = theirs[theirs.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance * largest, equal_nan=True)


class _Statistics:
    """The buffers of modules, and what stood in them."""

    def __init__(self, modules: nn.Module) -> None:
        named = modules.named_modules()
        self._saved = [
            (f"{path}.{name}".split(".", 1)[1], module, name, buffer, buffer.clone())
            for path, module in named
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Put back what stood there, and the tensors themselves where they were replaced."""
        for _, module, name, buffer, value in self._saved:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer

    def values(self) -> dict[str, Tensor]:
        """Copies of what they hold now, by path."""
        return {path: module._buffers[name].clone() for path, module, name, _, _ in self._saved}


@contextmanager
def _disturbed(module: nn.Module, seed: int) -> Iterator[None]:
    """Disturb weights in place inside the block, so that those at zero hide nothing."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        _seed(seed)
        for parameter in module.parameters():
            weight = parameter.data  # whose changes autograd does not count
            noise = _noise(weight)
            if noise is not None:
                saved.append((weight, weight.clone()))
                weight.add_(noise)
        yield
    finally:
        for weight, value in reversed(saved):
            weight.copy_(value)


def _noise(weight: Tensor) -> Tensor | None:
    """Return the noise to add to a weight; None to leave it as it is."""
    is_plain = type(weight) is Tensor and weight.is_floating_point() and weight.itemsize > 1
    if not is_plain or not weight.numel() or weight.is_meta or weight.is_inference():
        return None
    if any(
        stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        return None  # several elements are one place in memory
    lowest, highest = weight.aminmax()
    if bool(lowest == highest):
        return torch.randn_like(weight) * _NOISE
    if weight.numel() > _SMALL:
        return None
    return torch.randn_like(weight) * weight.std() * _NOISE


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the caller's random numbers, of torch, numpy and Python, as they were."""
    devices = range(torch.cuda.device_count()) if _has_cuda_begun() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if _has_cuda_begun():  # a seed for later would reach beyond this proof
        torch.cuda.manual_seed_all(seed)


def _has_cuda_begun() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
