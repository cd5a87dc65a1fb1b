"""The old place of :mod:`offramp.data.splits`; it goes with 0.2."""

from offramp.data.splits import read_parquet

__all__ = ["read_parquet"]
