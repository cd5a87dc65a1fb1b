"""The old place of :mod:`offramp.data.parquet`; it goes with 0.2."""

from offramp.data.parquet import read_parquet

__all__ = ["read_parquet"]
