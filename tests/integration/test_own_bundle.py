"""Own network, own pictures in folders: ten lines of Python, and the command line from there on.

Pictures are scikit-learn's digits as PNG files, in a folder for each class. 700 of them choose
thresholds for a loss of at most 1 point, promised with probability 0.9.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from huggingface_hub import ModelCard
from own_pictures import BY_DIGIT, NAMES, SPLITS, write_pictures
from PIL import Image
from served import serve_process
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import offramp as off
from offramp.errors import ArtifactError
from offramp.runtime import Session, read_bundle


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()
        self.first, self.second = nn.Linear(1024, 256), nn.Linear(256, 256)
        self.last = nn.Linear(256, 10)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = F.relu(self.first(x.view(x.size(0), -1)))
        return self.last(F.relu(self.second(x)))


def train_and_export(pictures, bundle):
    """Read pictures as anybody does, train a CNN of one's own, and export it."""
    files = sorted((pictures / "train").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])[:, None] / 255
    x = torch.tensor((pixels - 0.3) / 0.35, dtype=torch.float32)
    y = torch.tensor([NAMES.index(file.parent.name) for file in files])
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), nn.Linear(256, 10)]
    at = ["relu", "first"]
    net = off.add_exits(Net(), at=at, heads=heads, num_classes=10, example=x[:1])
    off.fit(net, TensorDataset(x, y), config=off.FitConfig(epochs=12, device="cpu"), progress=False)
    pictures_as = off.Preprocessing(height=8, width=8, channels=1, mean=0.3, deviation=0.35)
    off.export(net, None, bundle, x[:100], class_names=NAMES, preprocessing=pictures_as)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    write_pictures(folder / "pictures")
    train_and_export(folder / "pictures", folder / "bundle")
    return folder


@pytest.fixture
def own(made, workplace):
    """The bundle as it was exported, and where the pictures are."""
    shutil.copytree(made / "bundle", workplace / "bundle")
    (workplace / "pictures").symlink_to(made / "pictures")
    return workplace / "bundle"


def check_front(bundle):
    """The front goes from where nobody leaves, and what passed ends with what was chosen."""
    front, promise = bundle.calibration.front, bundle.calibration.guarantee
    assert (front.risk, front.passed) == ("accuracy_gap", promise["num_passed"])
    assert len(front.points) == promise["num_candidates"]
    first, last = front.points[0], front.points[front.passed - 1]
    assert (first.thresholds, first.risk) == ((None, None), 0)
    assert list(last.thresholds) == bundle.policy["thresholds"]
    assert last.accuracy == bundle.calibration.reached["accuracy"]
    assert last.mean_macs == bundle.calibration.reached["mean_macs"] < first.mean_macs


def test_the_whole_story(own, offramp, figures_of, refuses):
    data = ("--data", "pictures")
    few = ("--max-drop", "0.01", "--guarantee", "0.9", "--subset", "100")
    refuses("calibrate", own, *data, *few, words=("samples",))
    before = figures_of("evaluate", own, *data)
    assert (before["recipe"], before["split"], before["num_samples"]) == (None, "test", 397)

    outcome = offramp("calibrate", own, *data, "--max-drop", "0.01", "--guarantee", "0.9")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "chosen on 700 calibration samples" in outcome.stdout
    assert "With probability at least 90 %" in outcome.stdout
    assert "(pictures, validation, classes as in the split)" in outcome.stdout
    chosen = read_bundle(own)
    assert chosen.calibration.asked == {"max_drop": 0.01, "guarantee": 0.9}
    assert (chosen.calibration.data.split, chosen.calibration.data.num_samples) == (
        "validation",
        700,
    )
    assert chosen.calibration.guarantee["risk"] == "accuracy_gap"
    check_front(chosen)

    after = figures_of("evaluate", own, *data)
    assert after["mean_macs"] < before["plain_macs"]
    assert before["final_exit_accuracy"] - after["accuracy"] < 0.02
    timing = figures_of("time", own, *data, "--batch-size", "1,64")
    assert timing["mean_macs"] == pytest.approx(after["mean_macs"])
    picture = next((own.parent / "pictures" / "test" / "four").glob("*.png"))
    answer = offramp("predict", own, picture)
    assert (answer.code, answer.stderr) == (0, "")
    assert "probability" in answer.stdout
    plan = offramp("plan", own, *data, "--mbit", "10", "--rtt-ms", "20")
    assert (plan.code, plan.stderr) == (0, "")
    assert "best: --split-after" in plan.stdout


OWN_IN_README = re.compile(r"### A network and data of your own\n(.*?)\n##", re.DOTALL)
NO_TORCH = "raise ImportError('torch was imported')"


def test_the_commands_of_the_readme_need_no_torch(own, workplace, monkeypatch):
    own.rename("birds")
    picture = next((workplace / "pictures" / "test" / "four").glob("*.png"))
    Image.open(picture).save("crow.jpg")
    (workplace / "absent").mkdir()
    (workplace / "absent" / "torch.py").write_text(NO_TORCH)
    monkeypatch.setenv("PYTHONPATH", f"absent{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^ {4}offramp (\w+)(.*?)(?: {2,}#.*)?$", OWN_IN_README.search(readme)[1], re.M
    )
    names = "calibrate frontier evaluate time predict plan serve"
    assert " ".join(name for name, _ in commands) == names
    for name, options in commands[:-1]:
        command = [sys.executable, "-m", "offramp", name, *shlex.split(options)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (said.returncode, said.stderr) == (0, ""), said.stderr
    with (
        serve_process(Path("birds")) as (_, address, _),
        contextlib.closing(triton_http.InferenceServerClient(address)) as client,
    ):
        assert client.is_model_ready("tiny")


def test_accuracy_is_that_of_torch_s_own_loop(own, figures_of):
    digits = sorted((own.parent / "pictures" / "test").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in digits])[:, None]
    x = (pixels / 255 - 0.3) / 0.35
    labels = np.array([NAMES.index(file.parent.name) for file in digits])
    result = Session(own).run(x.astype(np.float32))
    figures = figures_of("evaluate", own, "--data", "pictures")
    assert figures["accuracy"] == (result.output.argmax(1) == labels).mean()


def test_samples_that_chose_the_thresholds_are_refused(own, offramp, refuses):
    data = ("--data", "pictures")
    assert offramp("calibrate", own, *data, "--budget-share", "0.6", "--subset", "200").code == 0
    refuses("evaluate", own, *data, "--split", "validation", words=("validation", "--in-sample"))
    refuses("evaluate", own, *data, "--split", "train", words=("train", "--in-sample"))
    said = offramp("evaluate", own, *data, "--split", "validation", "--in-sample")
    assert "IN SAMPLE" in said.stdout
    refuses("calibrate", own, *data, "--split", "train", "--max-drop", "0.01", words=("train",))


def test_samples_that_chose_the_thresholds_are_known_by_what_is_in_them(
    own, offramp, figures_of, refuses
):
    pictures = own.parent / "pictures"
    assert offramp("calibrate", own, "--data", "pictures", "--budget-share", "0.6").code == 0
    for name in BY_DIGIT:
        (own.parent / "mixed" / name).mkdir(parents=True)
        seen, unseen = (
            sorted((pictures / split / name).iterdir()) for split in SPLITS if split != "train"
        )
        for number, file in enumerate((*seen[:3], *unseen[:20])):
            shutil.copy(file, own.parent / "mixed" / name / f"{number}.png")
    words = ("30 of the 230 samples of mixed chose the thresholds", "--in-sample")
    refuses("evaluate", own, "--data", "mixed", words=words)
    figures = figures_of("evaluate", own, "--data", "mixed", "--in-sample")
    assert (figures["num_samples"], figures["in_sample"]) == (230, True)
    assert "in_sample" not in figures_of("evaluate", own, "--data", "pictures")


def test_single_samples_leave_by_the_thresholds_that_were_chosen(own, offramp):
    outcome = offramp("calibrate", own, "--data", "pictures", "--budget-share", "0.6")
    assert outcome.code == 0, outcome.stderr
    x = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)
    session = Session(own)
    together = session.run(x).exit_index
    alone = np.concatenate([session.run(one[None]).exit_index for one in x])
    assert (together == alone).mean() > 0.9
    assert len(set(together.tolist())) > 1


def test_thresholds_by_hand(own, offramp, refuses):
    outcome = offramp("calibrate", own, "--thresholds", "0.4,off")
    assert outcome.code == 0, outcome.stderr
    bundle = read_bundle(own)
    assert bundle.policy["thresholds"] == [0.4, None]
    assert (bundle.calibration.asked, bundle.calibration.data) == ({"thresholds": "0.4,off"}, None)
    refuses("calibrate", own, "--thresholds", "0.4", words=("Expected 2 thresholds",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-drop", "0.01"), ("network of your own", "--data PATH")),
        (("--data", "pictures", "--max-drop", "0.01", "--split", "dev"), ("no split dev",)),
        (("--data", "pictures", "--max-drop", "0.01", "--rule", "margin"), ("entropy", "margin")),
        (("--data", "pictures", "--max-drop", "0.01", "--patience", "2"), ("--patience", "run")),
        (("--data", "pictures", "--budget-ms", "1"), ("--budget-ms", "run")),
        (("--data", "pictures", "--max-drop", "0.01", "--subset", "900"), ("--subset", "700")),
        (("--data", "none", "--max-drop", "0.01"), ("none", "no such file")),
        (("--thresholds", "nan,0.5"), ("--thresholds", "NaN")),
    ],
)
def test_what_a_bundle_cannot_take_is_refused(own, refuses, options, words):
    refuses("calibrate", own, *options, words=words)


def test_folders_that_the_network_does_not_know_are_refused(own, refuses, workplace):
    (workplace / "more" / "eleven").mkdir(parents=True)
    Image.new("L", (8, 8)).save(workplace / "more" / "eleven" / "a.png")
    refuses("evaluate", own, "--data", "more", words=("Found eleven", "eight, five"))


def test_a_damaged_picture_is_named(own, refuses, workplace):
    shutil.copytree(own.parent / "pictures" / "test", workplace / "more")
    (workplace / "more" / "four" / "0.png").write_bytes(b"no picture")
    refuses("evaluate", own, "--data", "more", words=("more/four/0.png", "damaged"))
    refuses("predict", own, "more/four", words=("more/four is a folder", "more/four/*"))


def test_curve_of_a_bundle(own, figures_of, refuses):
    figures = figures_of("frontier", own, "--data", "pictures", "--points", "3")
    (curve,) = figures["runs"]
    assert (figures["split"], figures["data"], curve["recipe"]) == ("test", "own data", None)
    assert (curve["num_samples"], curve["num_calibration_samples"]) == (397, 700)
    refuses("frontier", own, "--data", "pictures/test", words=("choose thresholds and judge",))


def test_json_of_a_subset(own, figures_of):
    figures = figures_of("evaluate", own, "--data", "pictures", "--subset", "50")
    assert figures["num_samples"] == 50
    assert json.dumps(figures)


def test_a_bundle_is_pushed_with_a_card_and_pulled(own, offramp, refuses, figures_of, pushed):
    refuses("push", own, "user/digits", words=("--data PATH", "--no-evaluate"))
    outcome = offramp("push", own, "user/digits", "--data", "pictures", "--subset", "100")
    assert (outcome.code, outcome.stderr) == (0, "")
    card = ModelCard.load(pushed / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "100 samples of the split test of `pictures`" in card.text
    assert "`features_0`, float32 of shape (B, 1, 8, 8)" in card.text
    assert f"Classes: {', '.join(NAMES)}." in card.text
    outcome = offramp("pull", "user/digits", "--out", "theirs")
    assert (outcome.code, outcome.stderr) == (0, "")
    figures = figures_of("evaluate", "theirs", "--data", "pictures")
    assert figures == figures_of("evaluate", own, "--data", "pictures")
    with pytest.raises(ArtifactError, match="offramp pull"):
        off.from_pretrained("theirs")
    step = next(pushed.glob("*.onnx"))
    step.write_bytes(step.read_bytes()[:-1])
    refuses("pull", "user/digits", "--out", "damaged", words=(step.name, "not the file"))


def test_clients_learn_classes_and_preprocessing(own):
    with serve_process(own) as (_, http_address, grpc_address):
        with contextlib.closing(triton_http.InferenceServerClient(http_address)) as client:
            said = client.get_model_config("tiny")["parameters"]
        with contextlib.closing(triton_grpc.InferenceServerClient(grpc_address)) as client:
            x = triton_grpc.InferInput("features_0", (2, 1, 8, 8), "FP32")
            x.set_data_from_numpy(np.zeros((2, 1, 8, 8), np.float32))
            labels = client.infer("tiny", [x]).as_numpy("label")
    assert tuple(json.loads(said["class_names"]["string_value"])) == NAMES
    pictures_as = json.loads(said["preprocessing"]["string_value"])
    assert (pictures_as["height"], pictures_as["mean"]) == (8, [0.3])
    assert labels.shape == (2,)


def test_nothing_is_drawn_of_one_class_a_sample(own, refuses):
    picture = next((own.parent / "pictures" / "test" / "four").glob("*.png"))
    refuses("show", own, "--image", picture, words=("offramp predict",))
