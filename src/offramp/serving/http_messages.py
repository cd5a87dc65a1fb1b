"""Requests and answers as HTTP carries them: JSON, and tensors as bytes behind it.

An optional member that is null counts as absent, as clients send it that are made by generators.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy.typing as npt

from offramp.decoding import unique_keys
from offramp.errors import PayloadError
from offramp.serving.served import Parameter, ServedModel
from offramp.serving.tensors import (
    checked_shape,
    datatype_of,
    dtype_of,
    from_bytes,
    from_values,
    to_bytes,
    to_values,
)

Array = npt.NDArray[Any]

_MOST_BRACKETS = 250_000
"""Lists and objects that JSON may hold: each takes 60 bytes in memory, and can be sent in two."""


@dataclass(frozen=True, kw_only=True)
class HttpRequest:
    """A request for an answer.

    Attributes:
        id: The client's name for it; None if it gave none.
        inputs: Tensors by name.
        parameters: Of the request.
        wanted: Names of the outputs that are asked for; all if empty.
        binary: Whether each of them shall come as bytes.
        is_binary: Whether the others shall.
    """

    id: str | None
    inputs: Mapping[str, Array]
    parameters: Mapping[str, Parameter]
    wanted: tuple[str, ...]
    binary: Mapping[str, bool]
    is_binary: bool


def read_request(body: bytes, header_length: str | None, max_bytes: int) -> HttpRequest:
    """Read the body of a request."""
    content, inputs = read_message(body, header_length, max_bytes, tensors="inputs")
    request_id = content.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise PayloadError(f"The 'id' of a request must be a string. Got {request_id!r:.80}.")
    parameters = _read_parameters(content)
    is_binary = _flag(parameters, "binary_data_output")
    wanted = {
        _name(output): _flag(_read_parameters(output), "binary_data", is_binary)
        for output in _objects(content, "outputs")
    }
    return HttpRequest(
        id=request_id,
        inputs=inputs,
        parameters=parameters,
        wanted=tuple(wanted),
        binary=wanted,
        is_binary=is_binary,
    )


def read_message(
    body: bytes, header_length: str | None, max_bytes: int, *, tensors: str
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read JSON and the tensors that it describes, from either side."""
    size = len(body) if header_length is None else _header_length(header_length, len(body))
    content = _read_json(body[:size])
    arrays, left = _read_tensors(content, tensors, memoryview(body)[size:], max_bytes)
    if left:
        raise PayloadError(f"{left} bytes follow the last tensor that says how many it has.")
    return content, arrays


def write_answer(
    request: HttpRequest, model: ServedModel, answers: Mapping[str, Array]
) -> tuple[bytes, int | None]:
    """Write the body of an answer."""
    outputs, tensors = [], []
    for name, array in answers.items():
        output: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array.dtype),
            "shape": list(array.shape),
        }
        if request.binary.get(name, request.is_binary):
            tensors.append(to_bytes(array))
            output["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            output["data"] = to_values(name, array)
        outputs.append(output)
    content: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.id is not None:
        content["id"] = request.id
    header = json.dumps({**content, "outputs": outputs}).encode()
    return b"".join([header, *tensors]), len(header) if tensors else None


def _header_length(text: str, body_length: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= body_length):
        raise PayloadError(
            "Inference-Header-Content-Length must be the bytes of JSON in the body, at most "
            f"{body_length} here. Got {text!r:.80}."
        )
    return int(text)


def _read_json(body: bytes) -> dict[str, Any]:
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise PayloadError(
            f"The JSON may hold at most {_MOST_BRACKETS} lists and objects. It has more: send flat "
            "lists, or binary data."
        )
    try:
        content = json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise PayloadError("The JSON is nested too deeply.") from error
    except PayloadError:
        raise
    except ValueError as error:  # bad JSON, bad UTF-8, or a number of thousands of digits
        raise PayloadError(f"The request is no JSON: {str(error)[:120]}.") from error
    if not isinstance(content, dict):
        raise PayloadError(f"The request must be a JSON object. Got {type(content).__name__}.")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise PayloadError(f"JSON numbers must be finite. Got {name}.")


def _read_tensors(
    content: Mapping[str, Any], key: str, tail: memoryview, max_bytes: int
) -> tuple[dict[str, Array], int]:
    """The tensors by name, and how many bytes of the tail belong to none."""
    arrays: dict[str, Array] = {}
    for tensor in _objects(content, key):
        name = _name(tensor)
        if name in arrays:
            raise PayloadError(f"Tensor {name!r:.80} is there twice.")
        dtype = dtype_of(name, tensor.get("datatype"))
        shape = checked_shape(name, tensor.get("shape"), dtype, max_bytes)
        parameters = _read_parameters(tensor)
        size = parameters.get("binary_data_size")
        if "shared_memory_region" in parameters:
            raise PayloadError("Shared memory is not served. Send the data in the request.")
        if size is None:
            arrays[name] = from_values(name, tensor.get("data"), shape, dtype)
            continue
        if type(size) is not int or not 0 <= size <= len(tail):
            raise PayloadError(
                f"The 'binary_data_size' of tensor {name!r:.80} must be a number of bytes, at most "
                f"the {len(tail)} that are left of the body. Got {size!r:.80}."
            )
        arrays[name] = from_bytes(name, tail[:size], shape, dtype)
        tail = tail[size:]
    return arrays, len(tail)


def _objects(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = content.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise PayloadError(f"The {key!r} must be a list of JSON objects.")
    return found


def _name(tensor: Mapping[str, Any]) -> str:
    name = tensor.get("name")
    if not isinstance(name, str):
        raise PayloadError(f"The 'name' of a tensor must be a string. Got {name!r:.80}.")
    return name


def _read_parameters(content: Mapping[str, Any]) -> dict[str, Parameter]:
    found = content.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(
        isinstance(value, bool | int | float | str | None) for value in found.values()
    ):
        raise PayloadError(
            "The 'parameters' must be a JSON object of booleans, numbers and strings."
        )
    return {key: value for key, value in found.items() if value is not None}


def _flag(parameters: Mapping[str, Parameter], key: str, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise PayloadError(f"The parameter {key!r} must be true or false. Got {value!r:.80}.")
    return value
