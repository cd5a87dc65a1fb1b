"""Wrong input from the command line: one clear line, exit code 2, nothing half-written."""

import shlex

import pytest

from offramp import __version__
from offramp.errors import ArtifactError

# Run in a folder that holds a calibrated run (run) and a text file (file) and nothing else.
REFUSED = {
    "unknown recipe": ("train digits-mpl --out new", ("'digits-mpl'", "mean 'digits-mlp'")),
    "device as a setting": ("train --out new --set device=cpu", ("no setting 'device'",)),
    "unknown setting": ("train --out new --set epoks=3", ("'epoks'", "mean 'epochs'")),
    "setting of the wrong kind": ("train --out new --set epochs=few", ("'epochs'", "int", "'few'")),
    "setting without a value": ("train --out new --set epochs", ("key=value", "'epochs'")),
    "impossible width": ("train --out new --set widths=64,-1", ("mlp", "-1")),
    "inputs of another size": ("train --out new --epochs 1 --set in_features=9", ("64", "9")),
    "too few classes": ("train --out new --epochs 1 --set num_classes=5", ("[0, 4]", "9")),
    "too few loss weights": (
        "train --out new --epochs 1 --set loss_weights=1,2",
        ("loss_weights", "3", "2"),
    ),
    "too many exits": ("train --out new --set num_exits=4", ("num_exits", "[1, 3]", "4")),
    "negative loss weight": (
        "train --out new --epochs 1 --set loss_weights=1,-1,1",
        ("loss_weights", "at least 0", "-1"),
    ),
    "huge seed": ("train --out new --seed 99999999999999999999", ("'seed'", "2**32 - 1")),
    "blocks of two numbers": (
        "train emnist-convnet --out new --set stages=((('conv',16),),)",
        ("'convnet'", "options"),
    ),
    "nothing set aside": (
        "train --out new --epochs 1 --set calibration_share=0.0001",
        ("calibration_share", "0.0001"),
    ),
    "endless name": (f"train --epochs 1 --out {'n' * 300}", ("too long",)),
    "no epochs": ("train --out new --epochs 0", ("'epochs'", "at least 1", "0")),
    "half an epoch": ("train --out new --epochs 0.5", ("--epochs",)),
    "negative calibration share": (
        "train --out new --epochs 1 --set calibration_share=-1",
        ("calibration_share", "-1"),
    ),
    "unwritable folder": ("train --epochs 1 --out file/new", ("file/new", "--out")),
    "folder is a file": ("train --epochs 1 --out file", ("file", "--out")),
    "run exists": ("train --epochs 1 --out run", ("run", "exists", "--resume", "--out")),
    "resumed with other settings": (
        "train --epochs 4 --out run --resume",
        ("run", "other settings", "--out"),
    ),
    "missing data": (
        "train emnist-mlp --out new",
        ("emnist47", "--data DIR", "OFFRAMP_DATA", "download"),
    ),
    "missing data folder": ("evaluate run --data nowhere", ("nowhere/test.parquet", "--data DIR")),
    "unknown device": ("train --out new --epochs 1 --device tpu", ("cpu", "cuda", "'tpu'")),
    "unknown command": ("trian", ("'trian'", "Did you mean 'train'?", "See: offramp --help")),
    "unknown command before a run": ("evalute run", ("mean 'evaluate'?", "See: offramp --help")),
    "command like no other": ("xyzzy", ("'xyzzy'. See: offramp --help",)),
    "run before the command": ("run evaluate", ("'run'. See: offramp --help",)),
    "option before the command": ("--quiet recipes", ("--quiet. See: offramp --help",)),
    "option alone": ("-q", ("-q. See: offramp --help",)),
    "mistyped option": ("evaluate run --jsno x", ("--json). See: offramp evaluate --help",)),
    "option without a value": ("train --epochs", ("argument. See: offramp train --help",)),
    "debugging a mistyped command": ("--debug evalute", ("See: offramp --help",)),
    "unknown option": ("train --out new --nonsense", ("--nonsense", "train --help")),
    "no run": ("evaluate nowhere", ("nowhere", "recipe.json", "offramp train")),
    "too few thresholds": ("calibrate run --thresholds 0.1", ("2", "1", "0.1")),
    "too many thresholds": ("calibrate run --thresholds 0.1,0.2,0.3", ("2", "3", "0.1,0.2,0.3")),
    "NaN threshold": ("calibrate run --thresholds nan,0.5", ("[0, 1]", "inf", "nan")),
    "threshold above one": ("calibrate run --thresholds 0.5,1.5", ("[0, 1]", "1.5")),
    "threshold in words": ("calibrate run --thresholds 0.5,high", ("numbers", "'0.5,high'")),
    "NaN nats": ("calibrate run --thresholds nan,1 --rule entropy_nats", ("nats", "nan")),
    "unknown rule": ("calibrate run --max-drop 0.1 --rule sure", ("entropy", "margin", "'sure'")),
    "no target": ("calibrate run", ("--thresholds", "--max-drop", "--budget-macs")),
    "two targets": ("calibrate run --max-drop 0.1 --budget-macs 9", ("exactly one",)),
    "NaN drop": ("calibrate run --max-drop nan", ("max_drop", "[0, 1)", "nan")),
    "impossible budget": ("calibrate run --budget-macs 9", ("budget_macs", "9,472", "9")),
    "endless budget": ("calibrate run --budget-macs inf", ("budget_macs", "inf")),
    "unknown split": ("evaluate run --split tset", ("train, test", "'tset'")),
    "unwritable JSON": ("evaluate run --json file/figures", ("file/figures", "folder")),
    "adaptive run as the plain one": ("evaluate run --plain run", ("--plain", "one exit", "3")),
    "no such plain run": ("evaluate run --plain nowhere", ("nowhere", "recipe.json")),
    "no threads": ("time run --threads 0", ("--threads", "at least 1", "0")),
    "batch size in words": ("time run --batch-size x", ("--batch-size", "'x'")),
    "empty batch": ("time run --batch-size 0", ("batch size", "[1, 450]", "0")),
    "batch beyond the data": ("time run --batch-size 9999", ("[1, 450]", "9999")),
    "unreadable image": ("predict run file", ("image", "file")),
    "missing image": ("predict run nowhere.png", ("nowhere.png",)),
    "no image": ("predict run", ("FILE", "predict --help")),
}


@pytest.fixture
def text_file(calibrated_run):
    (calibrated_run.parent / "file").write_text("no picture, no folder")


@pytest.mark.parametrize(("command", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_refused(text_file, refuses, command, words):
    refuses(*shlex.split(command), words=words)


@pytest.mark.parametrize("command", ["evaluate run", "time run", "predict run picture.png"])
def test_a_policy_is_needed(run, refuses, command):
    refuses(*shlex.split(command), words=("policy", "offramp calibrate"))


def test_processes_refuse_alike(
    text_file, workplace, start_offramp, finish_offramp, assert_one_line
):
    names = ("missing data", "unreadable image")
    processes = [start_offramp(*shlex.split(REFUSED[name][0])) for name in names]
    for name, process in zip(names, processes, strict=True):
        outcome = finish_offramp(process)
        assert (outcome.code, outcome.stdout) == (2, "")
        assert_one_line(outcome.stderr, REFUSED[name][1])
    assert {path.name for path in workplace.iterdir()} == {"run", "file"}


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version_is_printed(offramp, option):
    outcome = offramp(option)
    assert (outcome.code, outcome.stdout) == (0, f"offramp {__version__}\n")


@pytest.mark.parametrize("command", [(), ("recipes",), ("evaluate",)])
def test_short_option_prints_the_same_help(offramp, command):
    assert offramp(*command, "-h") == offramp(*command, "--help")
    assert offramp(*command, "-h").code == 0


def test_debug_shows_the_traceback(workplace, offramp):
    with pytest.raises(ArtifactError, match="nowhere"):
        offramp("--debug", "evaluate", "nowhere")


def test_debug_may_follow_the_command(workplace, offramp):
    with pytest.raises(ArtifactError, match="nowhere"):
        offramp("evaluate", "nowhere", "--debug")


def test_no_command_prints_help_that_can_be_read(offramp):
    outcome = offramp()
    lines = (outcome.stdout + outcome.stderr).splitlines()
    assert any(line.split()[:1] == ["calibrate"] for line in lines)
