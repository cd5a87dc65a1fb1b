"""The old place of :mod:`offramp.families.exits`; it goes with 0.2."""

from offramp.families.exits import AdaptiveRunner

__all__ = ["AdaptiveRunner"]
