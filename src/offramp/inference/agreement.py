"""The old place of :mod:`offramp.families.agreement`; it goes with 0.2."""

from offramp.families.agreement import answer_in_batches

__all__ = ["answer_in_batches"]
