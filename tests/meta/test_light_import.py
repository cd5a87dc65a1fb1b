"""What runs without the heavy extras, and what is said where one is missing."""

import json
import subprocess
import sys

import pytest

NEED_NO_LIGHTNING = ("load", "calibrate", "evaluate", "time_runner", "FitConfig")
HEAVY = ("torch", "lightning", "PIL", "pyarrow", "safetensors", "sklearn", "huggingface_hub")


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module",
    [
        "offramp",
        "offramp.errors",
        "offramp.results",
        "offramp.artifacts",
        "offramp.runtime",
        "offramp.runtime.preprocessing",
        "offramp.serving.server",
        "offramp.cli",
    ],
)
def test_import_is_light(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    outcome = run_python(code)
    assert outcome.stdout.strip() == "[]", outcome.stderr


@pytest.fixture(scope="module")
def lightning_after():
    """Whether lightning is imported after each name; one process asks, as torch takes seconds."""
    outcome = run_python(
        f"import json, sys, offramp; asked = {{}}\n"
        f"for name in {NEED_NO_LIGHTNING}:\n"
        "    getattr(offramp, name); asked[name] = 'lightning' in sys.modules\n"
        "print(json.dumps(asked))"
    )
    return json.loads(outcome.stdout)


@pytest.mark.parametrize("name", NEED_NO_LIGHTNING)
def test_what_does_not_train_needs_no_lightning(name, lightning_after):
    assert lightning_after[name] is False


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        ("torch", "AdaptiveRunner"),
        ("torch", "fit"),
        ("lightning", "fit"),
        ("safetensors", "load"),
        ("huggingface_hub", "push_to_hub"),
    ],
)
def test_public_name_without_its_extra_names_the_command(missing, name):
    outcome = run_python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import offramp\n"
        f"try: offramp.{name}\n"
        "except offramp.MissingExtraError as error: print(error)"
    )
    message = outcome.stdout.strip()
    assert f"offramp.{name} needs {missing}" in message, outcome.stderr
    assert "pip install 'offramp[train]'" in message


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sklearn", "lightning", "safetensors", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("command", ["recipes", "train", "evaluate run", "predict run image.png"])
def test_command_without_torch_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    outcome = run_python(
        WITHOUT_TORCH + f"sys.argv = ['offramp', *{command.split()}]\n"
        "from offramp.cli import main; main()"
    )
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1
    assert "torch" in outcome.stderr
    assert "pip install 'offramp[train]'" in outcome.stderr


@pytest.mark.parametrize("command", ["evaluate", "time", "predict"])
def test_a_folder_that_is_not_there_is_named_without_torch(command):
    outcome = without_torch(command, "nothing", *(["a.png"] if command == "predict" else []))
    assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1)
    assert "or a bundle. nothing has none" in outcome.stderr


@pytest.mark.parametrize("option", ["--help", "--version", "train --help", "serve --help"])
def test_help_and_version_need_no_extra(option):
    outcome = run_python(
        "import sys; sys.modules |= dict.fromkeys(['torch', 'aiohttp', 'grpc', 'PIL'])\n"
        f"sys.argv = ['offramp', *{option.split()}]\n"
        "from offramp.cli import main; main()"
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "--help" in outcome.stdout or "offramp" in outcome.stdout


def test_wrong_options_are_refused_without_torch():
    outcome = run_python(
        WITHOUT_TORCH + "sys.argv = ['offramp', 'calibrate', 'run', '--risk', 'error']\n"
        "from offramp.cli import main; main()"
    )
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("offramp: Give exactly one of --thresholds, --max-drop")


def test_pictures_and_texts_are_prepared_without_torch(tmp_path):
    from PIL import Image

    Image.new("L", (3, 3), 255).save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from offramp import Preprocessing\n"
        "from offramp.data.preprocessing import inputs_of\n"
        f"print(inputs_of([{str(tmp_path / 'a.png')!r}], Preprocessing(height=1, width=1)))\n"
    )
    outcome = run_python(code)
    assert outcome.stdout.count("1.") == 3, outcome.stderr


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A bundle of a network of one's own, and pictures of two classes in two splits."""
    import numpy as np
    import torch
    from PIL import Image

    from offramp import Preprocessing, add_exits, export

    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    stages = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 3)), torch.nn.Linear(3, 2)]
    network = add_exits(
        torch.nn.Sequential(*stages), at=["0"], num_classes=2, example=torch.zeros(1, 3, 1, 1)
    )
    how = Preprocessing(height=1, width=1)
    names = ("dark", "light")
    examples = torch.rand(20, 3, 1, 1)
    export(network, None, folder / "bundle", examples, class_names=names, preprocessing=how)
    colours = np.random.default_rng(0).integers(0, 256, (80, 3, 3, 3)).astype(np.uint8)
    for number, colour in enumerate(colours):
        split = ("validation", "test")[number % 2]
        of_class = folder / "pictures" / split / names[int(colour.mean() > 127)]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour).save(of_class / f"{number}.png")
    return folder


def without_torch(*command, nor=()):
    return run_python(
        WITHOUT_TORCH
        + f"sys.modules |= dict.fromkeys({nor!r})\nsys.argv = {['offramp', *map(str, command)]}\n"
        "from offramp.cli import main; main()"
    )


def test_bundle_answers_pictures_without_torch(own):
    picture = next(own.glob("pictures/test/*/*.png"))
    outcome = without_torch("predict", own / "bundle", picture, nor=("scipy", "pyarrow"))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "probability" in outcome.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("calibrate", "--max-drop", "0.5"), "chosen on 40 calibration samples"),
        (
            ("calibrate", "--max-drop", "0.5", "--guarantee", "0.5"),
            "With probability at least 50 %",
        ),
        (("evaluate",), "40 samples"),
        (("frontier", "--points", "3"), "thresholds chosen on 40 calibration samples"),
        (("time", "--batch-size", "4"), "onnxruntime"),
        (("plan", "--mbit", "10", "--rtt-ms", "20"), "best: --split-after"),
    ],
)
def test_bundle_is_calibrated_judged_and_timed_without_torch(command, words, own):
    name, *options = command
    outcome = without_torch(name, own / "bundle", "--data", own / "pictures", *options)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert words in outcome.stdout


def test_missing_scipy_is_named_with_its_extra(own):
    outcome = run_python(
        f"import sys; sys.modules['scipy'] = None; "
        f"sys.argv = ['offramp', 'evaluate', {str(own)!r}]\n"
        "from offramp.cli import main; main()"
    )
    assert outcome.returncode == 2
    assert "pip install 'offramp[calibrate]'" in outcome.stderr


def test_missing_pillow_is_named_with_its_extra(tmp_path):
    outcome = run_python(
        "import sys; sys.modules['PIL'] = None\n"
        "from offramp import Preprocessing\n"
        "from offramp.data.preprocessing import read_pixels\n"
        "try: read_pixels('a.png', Preprocessing(height=1, width=1))\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install 'offramp[predict]'" in outcome.stdout, outcome.stderr
