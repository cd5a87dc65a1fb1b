"""Records of how pictures and texts are prepared: what they refuse, and where they are read."""

import json
from types import SimpleNamespace

import pytest
from word_level import word_level

from offramp.errors import ArtifactError, DataNotFoundError, InvalidArgumentError
from offramp.runtime.preprocessing import (
    Preprocessing,
    TextPreprocessing,
    read_texts,
    write_preprocessing,
)

WORDS = word_level({"[PAD]": 0, "[UNK]": 1})
RESNET = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.95,
    "crop_mode": "center",
}
VIT = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 0}, "'height'"),
        ({"width": 2.5}, "'width'"),
        ({"channels": 4}, "'channels' parameter must be 1 or 3"),
        ({"resize": "pad"}, "middle_square"),
        ({"interpolation": "area"}, "lanczos"),
        ({"mean": (0.5, 0.5)}, "one for each of 3 channels"),
        ({"mean": "grey"}, "'mean'"),
        ({"deviation": 0.0}, "above 0"),
        ({"white": -1.0}, "'white'"),
        ({"ink_margin": 0.5}, "'ink_margin'"),
        ({"resize": "ink_square", "resize_to": 40}, "stretch or shorter_side"),
    ],
)
def test_what_no_picture_can_be_brought_to_is_refused(change, words):
    with pytest.raises(InvalidArgumentError, match=words):
        Preprocessing(**{"height": 32, "width": 32} | change)


def test_shape_is_that_of_the_input():
    assert Preprocessing(height=20, width=30, channels=1).shape == (1, 20, 30)
    assert Preprocessing(height=20, width=30, channels=1, transposed=True).shape == (1, 30, 20)


def test_timm_config_is_read():
    read = Preprocessing.from_timm(RESNET)
    assert (read.resize, read.resize_to, read.height, read.width) == ("shorter_side", 235, 224, 224)
    assert (read.interpolation, read.mean, read.deviation) == (
        "bicubic",
        RESNET["mean"],
        RESNET["std"],
    )
    assert Preprocessing.from_timm(SimpleNamespace(pretrained_cfg=RESNET)) == read
    assert Preprocessing.from_timm(SimpleNamespace(default_cfg=RESNET)) == read


def test_timm_config_says_little():
    read = Preprocessing.from_timm({"input_size": (3, 64, 64)})
    assert (read.resize_to, read.interpolation, read.mean) == (73, "bicubic", RESNET["mean"])


def test_timm_squash_stretches():
    read = Preprocessing.from_timm(RESNET | {"crop_mode": "squash", "crop_pct": 1.0})
    assert (read.resize, read.resize_to) == ("stretch", None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "input_size"),
        ({"input_size": (3, 224, 160)}, "224x160"),
        (RESNET | {"crop_mode": "border"}, "center or squash"),
    ],
)
def test_other_timm_configs_are_refused(config, words):
    with pytest.raises(InvalidArgumentError, match=words):
        Preprocessing.from_timm(config)


def test_image_processor_is_read():
    read = Preprocessing.from_processor(VIT)
    assert read == Preprocessing(height=224, width=224, mean=0.5, deviation=0.5)
    clip = VIT | {"size": {"shortest_edge": 256}, "do_center_crop": True, "resample": 3}
    read = Preprocessing.from_processor(clip | {"crop_size": {"height": 224, "width": 224}})
    assert (read.resize, read.resize_to, read.height) == ("shorter_side", 256, 224)
    assert read.interpolation == "bicubic"
    holder = SimpleNamespace(image_processor=VIT)
    assert Preprocessing.from_processor(holder).height == 224


def test_image_processor_of_convnext_crops_by_a_share():
    small = VIT | {"size": {"shortest_edge": 224}, "crop_pct": 0.875}
    read = Preprocessing.from_processor(small)
    assert (read.resize, read.resize_to, read.height) == ("shorter_side", 256, 224)
    large = Preprocessing.from_processor(small | {"size": {"shortest_edge": 384}})
    assert (large.resize, large.resize_to, large.height) == ("stretch", None, 384)


def test_image_processor_without_scaling():
    read = Preprocessing.from_processor(VIT | {"do_rescale": False, "do_normalize": False})
    assert (read.white, read.means, read.deviations) == (255.0, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"size": {"longest_edge": 800, "shortest_edge": 600}}, "longest_edge"),
        (VIT | {"size": {"shortest_edge": 224}}, "without a crop"),
        (VIT | {"do_resize": False}, "resizes"),
        (VIT | {"do_flip_channel_order": True}, "do_flip_channel_order"),
        (VIT | {"resample": 9}, "resample"),
        ({"do_resize": True}, "size"),
    ],
)
def test_other_image_processors_are_refused(processor, words):
    with pytest.raises(InvalidArgumentError, match=words):
        Preprocessing.from_processor(processor)


def test_transformers_processor_is_read_as_its_dict_is():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil()
    read = Preprocessing.from_processor(processor)
    assert (read.resize, read.resize_to, read.shape) == ("shorter_side", 224, (3, 224, 224))
    assert read.interpolation == "bicubic"
    assert read == Preprocessing.from_processor(processor.to_dict())


def test_tokenizer_is_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text(WORDS)
    texts = TextPreprocessing.from_tokenizer(tmp_path / "tokenizer.json", max_tokens=8, pad_id=0)
    assert (texts.max_tokens, texts.pad_id, texts.tokenizer) == (8, 0, WORDS)
    assert WORDS not in repr(texts)
    fast = SimpleNamespace(to_str=lambda: WORDS)
    of_transformers = SimpleNamespace(backend_tokenizer=fast, model_max_length=512, pad_token_id=3)
    read = TextPreprocessing.from_tokenizer(of_transformers)
    assert (read.max_tokens, read.pad_id) == (512, 3)
    padded = json.dumps(
        json.loads(WORDS) | {"padding": {"pad_id": 7}, "truncation": {"max_length": 64}}
    )
    read = TextPreprocessing.from_tokenizer(SimpleNamespace(to_str=lambda: padded))
    assert (read.max_tokens, read.pad_id) == (64, 7)


def test_tokenizer_that_says_too_little_is_refused(tmp_path):
    fast = SimpleNamespace(to_str=lambda: WORDS)
    with pytest.raises(InvalidArgumentError, match="say max_tokens"):
        TextPreprocessing.from_tokenizer(fast, pad_id=0)
    with pytest.raises(InvalidArgumentError, match="say pad_id"):
        TextPreprocessing.from_tokenizer(fast, max_tokens=8)
    with pytest.raises(InvalidArgumentError, match="Got a int"):
        TextPreprocessing.from_tokenizer(3)
    with pytest.raises(DataNotFoundError, match=r"tokenizer\.json"):
        TextPreprocessing.from_tokenizer(tmp_path / "none.json")
    with pytest.raises(InvalidArgumentError, match="no JSON"):
        TextPreprocessing(tokenizer="{", max_tokens=8)
    with pytest.raises(InvalidArgumentError, match="with a model"):
        TextPreprocessing(tokenizer="{}", max_tokens=8)


def test_tokenizer_travels_as_a_file_with_its_hash(tmp_path):
    texts = TextPreprocessing(tokenizer=WORDS, max_tokens=8, pad_id=0)
    pictures, said = write_preprocessing(tmp_path, texts)
    assert pictures is None
    assert read_texts(tmp_path, said) == texts
    (tmp_path / "tokenizer.json").write_text(WORDS + " ")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing or not the file"):
        read_texts(tmp_path, said)


def test_what_is_no_preprocessing_is_refused(tmp_path):
    assert write_preprocessing(tmp_path, None) == (None, None)
    with pytest.raises(InvalidArgumentError, match="Got a dict"):
        write_preprocessing(tmp_path, {"height": 3})
