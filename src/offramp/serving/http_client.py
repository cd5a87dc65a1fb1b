"""The client's side of the protocol over HTTP: requests and answers whose tensors are bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from offramp.serving.http_messages import read_message
from offramp.serving.served import Parameter
from offramp.serving.tensors import datatype_of, to_bytes

Array = npt.NDArray[Any]


def write_request(
    inputs: Mapping[str, Array], parameters: Mapping[str, Parameter]
) -> tuple[bytes, int]:
    """Write the body of a request that wants its answer in bytes."""
    contents = [to_bytes(array) for array in inputs.values()]
    tensors = [
        {
            "name": name,
            "datatype": datatype_of(array.dtype),
            "shape": list(array.shape),
            "parameters": {"binary_data_size": len(content)},
        }
        for (name, array), content in zip(inputs.items(), contents, strict=True)
    ]
    asked = {"parameters": {**parameters, "binary_data_output": True}, "inputs": tensors}
    header = json.dumps(asked, separators=(",", ":")).encode()
    return b"".join([header, *contents]), len(header)


def read_answer(body: bytes, header_length: str | None, *, max_bytes: int) -> dict[str, Array]:
    """Read the body of an answer, from a server that may be broken."""
    return read_message(body, header_length, max_bytes, tensors="outputs")[1]
