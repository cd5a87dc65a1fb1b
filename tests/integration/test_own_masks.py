"""A segmentation network of one's own, with pictures and masks in folders."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import offramp as off
from offramp.data.own_masks import load_own_masks
from offramp.runtime import Session
from offramp.zoo.segmentation import segmentation

NAMES = ("ground", "sky")


def write_scenes(folder):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 24), ("test", 12)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((48, 64), dtype=np.uint8)
            mask[: random.integers(10, 40)] = 1
            noise = random.normal(scale=(10, 80)[index % 2], size=mask.shape)
            picture = (np.array([60, 190])[mask] + noise).clip(0, 255).astype(np.uint8)
            mask[:2] = 255  # no class
            Image.fromarray(picture).convert("RGB").save(folder / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{index}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_scenes(folder / "scenes")
    pictures_as = off.Preprocessing(height=48, width=64, channels=3, mean=0.5, deviation=0.25)
    train = load_own_masks(folder / "scenes", "train", pictures_as).batches
    torch.manual_seed(0)
    network = segmentation(num_classes=2, widths=(4, 6), stages=3, head_width=4)
    config = off.FitConfig(epochs=12, batch_size=4, learning_rate=0.03, device="cpu")
    off.fit(network, train, config=config, progress=False)
    images, _ = train.__getitems__(range(8))
    off.export(
        network, None, folder / "bundle", images, class_names=NAMES, preprocessing=pictures_as
    )
    return folder


@pytest.fixture
def own(made, workplace):
    shutil.copytree(made / "bundle", workplace / "bundle")
    (workplace / "scenes").symlink_to(made / "scenes")
    return workplace / "bundle"


def test_a_bundle_of_maps_takes_masks(own, offramp, figures_of):
    outcome = offramp("calibrate", own, "--data", "scenes", "--max-drop", "0.02")
    assert outcome.code == 0, outcome.stderr
    assert "chosen on 24 calibration samples" in outcome.stdout
    figures = figures_of("evaluate", own, "--data", "scenes")
    assert (figures["num_samples"], figures["split"]) == (12, "test")
    assert figures["mean_iou"] > 0.5
    timing = figures_of("time", own, "--data", "scenes", "--batch-size", "2")
    assert timing["mean_macs"] == pytest.approx(figures["mean_macs"])
    picture = "scenes/test/images/0.png"
    told = offramp("predict", own, picture)
    shown = offramp("show", own, "--image", picture)
    assert (shown.code, shown.stderr) == (0, "")
    assert shown.stdout == f"{told.stdout}drawn in 0-exits.png\n"
    with Image.open("0-exits.png") as sheet:
        assert sheet.width >= 4 * 64


def test_accuracy_is_that_of_numpy(own, figures_of):
    session, right, known = Session(own), 0, 0
    for path in sorted((own.parent / "scenes" / "test" / "images").iterdir()):
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)[None] / 255
        labels = session.label_maps(((pixels - 0.5) / 0.25).astype(np.float32)).output[0]
        mask = np.asarray(Image.open(path.parent.parent / "masks" / path.name))
        right += int(((labels == mask) & (mask != 255)).sum())
        known += int((mask != 255).sum())
    figures = figures_of("evaluate", own, "--data", "scenes", "--subset", "12")
    assert figures["accuracy"] == pytest.approx(right / known, abs=2e-3)


def test_masks_are_scaled_with_their_pictures(made):
    small = off.Preprocessing(height=24, width=32, channels=3)
    batches = load_own_masks(made / "scenes", "test", small).batches
    inputs, masks = batches.__getitems__([0, 1])
    assert (inputs.shape, masks.shape) == ((2, 3, 24, 32), (2, 24, 32))
    assert set(masks.flatten().tolist()) == {0, 1, 255}


def test_what_does_not_fit_is_refused(own, refuses, workplace):
    scenes = workplace / "more" / "test"
    for kind in ("images", "masks"):
        (scenes / kind).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(scenes / "images" / "a.png")
    Image.new("L", (64, 48)).save(scenes / "masks" / "b.png")
    refuses("evaluate", own, "--data", "more", words=("a mask of the same name", "such as a"))
    (scenes / "masks" / "b.png").rename(scenes / "masks" / "a.png")
    Image.new("L", (64, 48), 7).save(scenes / "masks" / "a.png")
    refuses("evaluate", own, "--data", "more", words=("[0, 1]", "Got 7"))
    (scenes / "masks").rename(scenes / "labels")
    refuses("evaluate", own, "--data", "more", words=("images/*.png", "Found images, labels"))
