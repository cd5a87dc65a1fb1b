"""The old place of :mod:`offramp.data.fitted_pictures`; it goes with 0.2."""

from offramp.data.fitted_pictures import read_picture

__all__ = ["read_picture"]
