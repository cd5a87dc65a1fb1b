"""The old place of :mod:`offramp.data.sources`; it goes with 0.2."""

from offramp.data.sources import SOURCES

__all__ = ["SOURCES"]
