"""Pictures as people have them: scikit-learn's digits as PNG files, in a folder for each class."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

BY_DIGIT = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAMES = tuple(sorted(BY_DIGIT))
SPLITS = {"train": slice(0, 700), "validation": slice(700, 1400), "test": slice(1400, None)}


def write_pictures(folder):
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    for split, rows in SPLITS.items():
        for row in order[rows].tolist():
            of_class = folder / split / BY_DIGIT[digits.target[row]]
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(of_class / f"{row:04}.png")
