"""Everything that both protocols ask for: models by name, tokens, answers, and outcomes."""

from __future__ import annotations

import asyncio
import hmac
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

from offramp.errors import AuthenticationError, InvalidArgumentError, PayloadError, ServerBusyError
from offramp.runtime.files import TensorSpec
from offramp.serving.batching import Answers, Batcher
from offramp.serving.metrics import Metrics
from offramp.serving.refusals import ANSWERED, CANCELLED, ModelNotFoundError, outcome_of
from offramp.serving.served import Parameter, ServedModel
from offramp.serving.tensors import datatype_of

Array = npt.NDArray[Any]

EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters")
"""Extensions of the protocol that are served."""
_LONGEST_MS = 1_000_000_000


class Service:
    """Models that are being served, whatever protocol asks for them.

    Make it in a running event loop.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        token: str | None,
        max_batch_rows: int,
        max_queue_rows: int,
        max_delay_ms: float,
        max_held_bytes: int,
    ) -> None:
        self.models = {model.name: model for model in models}
        if not models or len(self.models) < len(models):
            raise InvalidArgumentError(
                "Expected at least one model, each with a name of its own. "
                f"Got {', '.join(model.name for model in models) or 'none'}."
            )
        self.metrics = Metrics()
        self.is_ready = True
        self._token = token
        self._max_batch_rows = max_batch_rows
        self._max_held_bytes, self._held_bytes = max_held_bytes, 0
        self._batchers = {
            model.name: Batcher(
                model,
                self.metrics,
                max_batch_rows=max_batch_rows,
                max_queue_rows=max_queue_rows,
                max_delay_ms=max_delay_ms,
            )
            for model in models
        }

    async def close(self, grace_s: float) -> None:
        """Say that it is not ready, refuse what comes, and answer what waits."""
        self.is_ready = False
        await asyncio.gather(*(batcher.close(grace_s) for batcher in self._batchers.values()))

    def authenticate(self, authorization: str | None) -> None:
        """Compare what a client shows with the token, in a time that tells nothing of it."""
        if self._token is None:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            shown.strip().encode("utf-8", "surrogateescape"), self._token.encode()
        ):
            raise AuthenticationError(
                "Expected the server's token in the header 'authorization: Bearer TOKEN'. "
                f"Got {'none' if authorization is None else 'another'}."
            )

    def model(self, name: str, version: str = "") -> ServedModel:
        """Look a model up."""
        model = self.models.get(name)
        if model is None:
            raise ModelNotFoundError(
                f"Expected one of the models {', '.join(self.models)}. Got {name[:80]!r}."
            )
        if version not in ("", model.version):
            raise ModelNotFoundError(
                f"The model {name} is here in version {model.version}. Got {version[:80]!r}."
            )
        return model

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Count how a request ends, and how long it takes."""
        start, outcome = time.perf_counter(), ANSWERED
        try:
            yield
        except Exception as error:
            outcome = outcome_of(error)
            raise
        except BaseException:
            outcome = CANCELLED
            raise
        finally:
            known = name if name in self.models else ""
            self.metrics.count_request(known, outcome.name, time.perf_counter() - start)

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Count what a request holds in memory against what all may hold."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held_bytes += size
            if self._held_bytes > self._max_held_bytes:
                raise ServerBusyError("Too many large requests at once. Try again later.")

        try:
            yield hold
        finally:
            self._held_bytes -= held

    async def answer(
        self,
        model: ServedModel,
        inputs: Mapping[str, Array],
        parameters: Mapping[str, Parameter],
        wanted: Sequence[str],
        remaining_s: float | None = None,
    ) -> Answers:
        """Answer a request."""
        names = [spec.name for spec in model.outputs]
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise PayloadError(
                f"The model {model.name} puts out {', '.join(names)}. Got {unknown[0]!r:.60}."
            )
        deadlines = [_deadline_ms(parameters), None if remaining_s is None else 1e3 * remaining_s]
        deadline_ms = min((limit for limit in deadlines if limit is not None), default=None)
        arrays = model.prepare(inputs, parameters)
        answers = await self._batchers[model.name].answer(arrays, deadline_ms)
        return {name: answers[name] for name in wanted or names}

    def server_metadata(self) -> dict[str, Any]:
        """Describe the server as the protocol does."""
        # Not offramp.__version__: that module knows all the others, torch's among them.
        version = importlib.metadata.version("offramp")
        return {"name": "offramp", "version": version, "extensions": list(EXTENSIONS)}

    def model_metadata(self, model: ServedModel) -> dict[str, Any]:
        """Describe a model as the protocol does."""
        return {
            "name": model.name,
            "versions": [model.version],
            "platform": "offramp",
            "inputs": [_tensor_metadata(spec) for spec in model.inputs],
            "outputs": [_tensor_metadata(spec) for spec in model.outputs],
        }

    def model_config(self, model: ServedModel) -> dict[str, Any]:
        """Describe a model as Triton's extension does."""
        return {
            "name": model.name,
            "platform": "offramp",
            "backend": "offramp",
            "max_batch_size": self._max_batch_rows,
            "input": [_tensor_config(spec) for spec in model.inputs],
            "output": [_tensor_config(spec) for spec in model.outputs],
            "parameters": {key: {"string_value": value} for key, value in model.metadata.items()},
        }


def _deadline_ms(parameters: Mapping[str, Parameter]) -> float | None:
    deadline_ms = parameters.get("deadline_ms")
    if deadline_ms is None:
        return None
    is_number = isinstance(deadline_ms, int | float) and not isinstance(deadline_ms, bool)
    if not is_number or not 0 < deadline_ms < _LONGEST_MS:  # type: ignore[operator]
        raise PayloadError(
            "The parameter 'deadline_ms' must be a number of milliseconds above 0 and below "
            f"{_LONGEST_MS:,}. Got {deadline_ms!r:.80}."
        )
    return float(deadline_ms)


def _dims(spec: TensorSpec) -> list[int]:
    return [-1 if size is None else size for size in spec.sample_shape]


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": [-1, *_dims(spec)]}


def _tensor_config(spec: TensorSpec) -> dict[str, Any]:
    # Triton shapes a tensor of one number a sample as [1], which has no batch axis of its own.
    return {
        "name": spec.name,
        "data_type": f"TYPE_{datatype_of(spec.dtype)}",
        "dims": _dims(spec) or [1],
    }
