"""The protocol over gRPC, with the messages that tritonclient's wheel carries."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import numpy.typing as npt
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from offramp.errors import PayloadError
from offramp.serving.refusals import FAILED, outcome_of, words_of
from offramp.serving.served import Parameter
from offramp.serving.service import Service
from offramp.serving.tensors import (
    checked_shape,
    datatype_of,
    dtype_of,
    from_bytes,
    from_values,
    to_bytes,
)

Array = npt.NDArray[Any]
Message = Any
"""A protobuf message: classes that are made at import, which mypy knows nothing of."""
Method = Callable[[Message, grpc.aio.ServicerContext], Awaitable[Message]]

SERVICE = "inference.GRPCInferenceService"
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""Fields of each datatype's elements, if not in raw bytes; FP16 can be in those only."""

_log = logging.getLogger(__name__)


def make_handler(service: Service, max_payload_bytes: int) -> grpc.GenericRpcHandler:
    """Put the methods together; gRPC itself says of any other that it is unimplemented."""
    methods = _Methods(service, max_payload_bytes)
    open_to_all = {"ServerLive": methods.server_live, "ServerReady": methods.server_ready}
    guarded = {
        "ModelReady": methods.model_ready,
        "ServerMetadata": methods.server_metadata,
        "ModelMetadata": methods.model_metadata,
        "ModelConfig": methods.model_config,
        "ModelInfer": methods.model_infer,
    }
    handlers = {
        name: _handler(service, name, method, is_guarded=name in guarded)
        for name, method in (open_to_all | guarded).items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _handler(
    service: Service, name: str, method: Method, *, is_guarded: bool
) -> grpc.RpcMethodHandler:
    """Stands before every method: checks the token, reads the message, and gives errors codes."""
    request_class = getattr(service_pb2, f"{name}Request")

    async def answer(content: bytes, context: grpc.aio.ServicerContext) -> Message:
        try:
            if is_guarded:
                service.authenticate(_authorization(context))
            with service.holding() as hold:
                hold(len(content))
                return await method(_read_message(request_class, content), context)
        except Exception as error:
            outcome = outcome_of(error)
            if outcome is FAILED:
                _log.error("%s failed", name, exc_info=error)
            return await context.abort(grpc.StatusCode[outcome.grpc_code], words_of(error))

    # Messages come as bytes: gRPC would call one that it cannot read an internal error.
    return grpc.unary_unary_rpc_method_handler(
        answer, response_serializer=lambda message: message.SerializeToString()
    )


def _authorization(context: grpc.aio.ServicerContext) -> str | None:
    shown = dict(context.invocation_metadata() or ()).get("authorization")
    return shown.decode("latin-1") if isinstance(shown, bytes) else shown


def _read_message(request_class: Callable[[], Message], content: bytes) -> Message:
    message = request_class()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise PayloadError("The message is damaged: it is not what the protocol says.") from error
    return message


class _Methods:
    """One method a call."""

    def __init__(self, service: Service, max_payload_bytes: int) -> None:
        self._service, self._max_payload_bytes = service, max_payload_bytes

    async def server_live(self, _: Message, __: grpc.aio.ServicerContext) -> Message:
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _: Message, __: grpc.aio.ServicerContext) -> Message:
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready)

    async def model_ready(self, request: Message, _: grpc.aio.ServicerContext) -> Message:
        self._service.model(request.name, request.version)
        return service_pb2.ModelReadyResponse(ready=self._service.is_ready)

    async def server_metadata(self, _: Message, __: grpc.aio.ServicerContext) -> Message:
        return ParseDict(self._service.server_metadata(), service_pb2.ServerMetadataResponse())

    async def model_metadata(self, request: Message, _: grpc.aio.ServicerContext) -> Message:
        model = self._service.model(request.name, request.version)
        content = self._service.model_metadata(model)
        return ParseDict(content, service_pb2.ModelMetadataResponse())

    async def model_config(self, request: Message, _: grpc.aio.ServicerContext) -> Message:
        model = self._service.model(request.name, request.version)
        content = {"config": self._service.model_config(model)}
        return ParseDict(content, service_pb2.ModelConfigResponse())

    async def model_infer(self, request: Message, context: grpc.aio.ServicerContext) -> Message:
        with self._service.counted(request.model_name):
            model = self._service.model(request.model_name, request.model_version)
            answers = await self._service.answer(
                model,
                _read_inputs(request, self._max_payload_bytes),
                _read_parameters(request.parameters),
                list(dict.fromkeys(output.name for output in request.outputs)),
                context.time_remaining(),
            )
        response = service_pb2.ModelInferResponse(
            model_name=model.name, model_version=model.version, id=request.id
        )
        for name, array in answers.items():
            response.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
            response.raw_output_contents.append(to_bytes(array))
        return response


def _read_inputs(request: Message, max_bytes: int) -> dict[str, Array]:
    """The tensors by name: all as raw bytes, or all as elements."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise PayloadError(
            f"Expected raw_input_contents of all {len(request.inputs)} inputs, or of none. "
            f"Got {len(raw)}."
        )
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in inputs:
            raise PayloadError(f"Input {name!r:.80} is there twice.")
        if "shared_memory_region" in tensor.parameters:
            raise PayloadError("Shared memory is not served. Send the data in the request.")
        dtype = dtype_of(name, tensor.datatype)
        shape = checked_shape(name, list(tensor.shape), dtype, max_bytes)
        if raw:
            inputs[name] = from_bytes(name, raw[index], shape, dtype)
        else:
            inputs[name] = from_values(name, _elements(tensor), shape, dtype)
    return inputs


def _elements(tensor: Message) -> list[Any]:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise PayloadError(f"A tensor of type {tensor.datatype} must come in raw_input_contents.")
    return list(getattr(tensor.contents, field))


def _read_parameters(parameters: Mapping[str, Message]) -> dict[str, Parameter]:
    read: dict[str, Parameter] = {}
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is not None:
            read[key] = getattr(value, kind)
    return read
