"""Serving models over the Open Inference Protocol V2: HTTP and gRPC, no torch.

What is imported here needs numpy alone, so that an edge device can share it; the server itself is
in :mod:`offramp.serving.server` and needs ``pip install 'offramp[serve]'``.
"""

from offramp.serving.served import RunnerModel, ServedModel, named_inputs

__all__ = ["RunnerModel", "ServedModel", "named_inputs"]
