"""Pictures of how far tokens go."""

import numpy as np
import pytest
from PIL import Image

from offramp.drawing.token_depths import draw_depths, patch_grid
from offramp.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((49, 28, 28), (7, 7)),
        ((196, 224, 224), (14, 14)),
        ((8, 32, 64), (2, 4)),
        ((1, 5, 5), (1, 1)),
    ],
)
def test_square_patches_are_found(size, grid):
    assert patch_grid(*size) == grid


@pytest.mark.parametrize("size", [(0, 28, 28), (50, 28, 28), (48, 28, 28), (900, 28, 28)])
def test_other_tokens_cannot_be_drawn(size):
    with pytest.raises(InvalidArgumentError, match="square patches of an image of 28x28"):
        patch_grid(*size)


def test_each_patch_has_the_colour_of_its_depth_over_the_image():
    black = Image.new("L", (28, 28))
    depth = np.array([[1, 4], [2, 3]])
    sheet = np.asarray(draw_depths(black, depth, num_layers=4)).astype(int)
    left, side = sheet.shape[1] // 2, 336  # the image is enlarged twelve times
    assert sheet.shape == (336 + 3 * 12 + 30, 2 * 336 + 3 * 12, 3)
    assert (sheet[12 : 12 + side, 12 : 12 + side] == 0).all()
    places = (12 + side // 4, 12 + 3 * side // 4)
    columns = [left + 6 + x - 12 for x in places]
    shown = sheet[np.ix_(places, columns)]
    brightness = shown.sum(-1)
    assert brightness[0, 0] < brightness[1, 0] < brightness[1, 1] < brightness[0, 1]
    # The legend below has the same colours, without the image in them.
    legend = sheet[12 + side + 12 + 4, left + 6 : left + 6 + side]
    assert len(np.unique(legend, axis=0)) == 4
    np.testing.assert_allclose(shown[0, 1], 0.72 * legend[-2], atol=2)


def test_the_image_shows_through():
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    sheet = np.asarray(draw_depths(picture, np.full((2, 2), 3), num_layers=3))
    half = sheet.shape[1] // 2
    assert len(np.unique(sheet[12:348, half + 10 : half + 300, 0])) > 30
