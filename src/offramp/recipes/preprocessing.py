"""Normalisations and augmentations of images that several recipes share."""

from __future__ import annotations

from offramp.data.images import Normalisation, RandomWarp

CIFAR10_PIXELS = Normalisation(mean=0.473, deviation=0.251)
"""Mean and deviation of the pixels of its training images."""

SHIFT_AND_MIRROR = RandomWarp(degrees=0.0, scale=0.0, shear=0.0, shift=4.0, mirror=True)
"""The usual augmentation of CIFAR-10."""

LETTER_WARP = RandomWarp(degrees=8.0, scale=0.08, shear=0.1, shift=2.0, elastic=0.6)
"""Of handwritten letters: no mirror."""
