"""What runs without the heavy extras, and what is said where one is missing."""

import subprocess
import sys

import pytest

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
        "offramp.serving.server",
        "offramp.cli",
    ],
)
def test_import_is_light(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    outcome = run_python(code)
    assert outcome.stdout.strip() == "[]", outcome.stderr


@pytest.mark.parametrize("name", ["load", "calibrate", "evaluate", "time_runner", "FitConfig"])
def test_what_does_not_train_needs_no_lightning(name):
    outcome = run_python(f"import sys, offramp; offramp.{name}; print('lightning' in sys.modules)")
    assert outcome.stdout.strip() == "False", outcome.stderr


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
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("command", ["recipes", "train", "evaluate run", "predict run image.png"])
def test_command_without_torch_says_what_to_install(command):
    outcome = run_python(
        WITHOUT_TORCH + f"sys.argv = ['offramp', *{command.split()}]\n"
        "from offramp.cli import main; main()"
    )
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1
    assert "torch" in outcome.stderr
    assert "pip install 'offramp[train]'" in outcome.stderr


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
