"""A choice of a policy, which may stand wherever its policy is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Choice(ABC):
    """The outcome of a calibration: a policy, and what it reached."""

    @abstractmethod
    def as_policy(self) -> Any:
        """The policy."""
