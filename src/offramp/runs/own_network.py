"""Networks that a file of the user's own builds; a command line names it, never a run."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from offramp.data.preprocessing import text_inputs
from offramp.errors import InvalidArgumentError, OfframpError, reason
from offramp.families import FAMILIES
from offramp.model.cut import add_exits
from offramp.runs.run import OwnTraining, Run, load, read_own, read_preprocessing, read_recipe
from offramp.runtime.preprocessing import AnyPreprocessing, Preprocessing, TextPreprocessing
from offramp.training.config import FitConfig
from offramp.zoo import Network

_MODULE = "offramp_own_network"
_TOKENS = 32
"""Of the made-up texts that a backbone is cut with."""


@dataclass(frozen=True, kw_only=True)
class OwnFile:
    """A function that builds a network, and the preprocessing beside it.

    Attributes:
        path: Of the file.
        function: As it was named.
        build: The function.
        preprocessing: What the file calls ``preprocessing``; None where it names none.
    """

    path: Path
    function: str
    build: Callable[..., nn.Module]
    preprocessing: AnyPreprocessing | None

    def require_preprocessing(self) -> AnyPreprocessing:
        """The way from samples to inputs, where the file has to say it."""
        if self.preprocessing is None:
            raise InvalidArgumentError(
                f"Expected {self.path} to say how samples become inputs. Add a line, such as "
                "preprocessing = offramp.Preprocessing(height=32, width=32, channels=3, mean=0.5, "
                "deviation=0.25), or offramp.TextPreprocessing.from_tokenizer(...)."
            )
        return self.preprocessing

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


def read_own_file(named: str) -> OwnFile:
    """Run the file that ``FILE.py:function`` names, and find the function in it."""
    file, _, function = named.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function.isidentifier():
        raise InvalidArgumentError(
            f"Expected --network as FILE.py:function, such as net.py:build. Got {named!r}."
        )
    if not path.is_file():
        raise InvalidArgumentError(f"Expected --network to name a file. There is no {path}.")
    module = _run(path)
    build = getattr(module, function, None)
    if not callable(build):
        raise InvalidArgumentError(f"Expected a function {function} in {path}. It has none.")
    found = getattr(module, "preprocessing", None)
    if not isinstance(found, Preprocessing | TextPreprocessing | None):
        raise InvalidArgumentError(
            f"Expected preprocessing in {path} to be a Preprocessing or a TextPreprocessing. "
            f"Got a {type(found).__name__}."
        )
    return OwnFile(path=path, function=function, build=build, preprocessing=found)


def _run(path: Path) -> ModuleType:
    """Run a file as Python runs a script: it may import what lies beside it."""
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidArgumentError(
            f"{path} cannot be run: {type(error).__name__}: {reason(error)}."
        ) from error
    finally:
        sys.path.pop(0)
    return module


def build_own(
    file: OwnFile, training: OwnTraining, preprocessing: AnyPreprocessing | None
) -> Network:
    """Build a network; a plain backbone is given its exits."""
    takes = inspect.signature(file.build).parameters
    options = {"num_classes": training.num_classes} if "num_classes" in takes else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.fit.seed)
        try:
            network = file.build(**options)
        except OfframpError:
            raise
        except Exception as error:
            raise InvalidArgumentError(
                f"{file} cannot build its network: {type(error).__name__}: {reason(error)}. It is "
                "called with num_classes, if it takes that, or nothing."
            ) from error
        if not isinstance(network, nn.Module):
            raise InvalidArgumentError(
                f"Expected {file} to return a network. Got a {type(network).__name__}."
            )
        if isinstance(network, tuple(family.network for family in FAMILIES.values())):
            if training.num_exits not in (None, network.num_exits):
                raise InvalidArgumentError(
                    f"The network of {file} has {network.num_exits} exits already: leave --exits "
                    "out."
                )
            return cast(Network, network)
        if training.num_exits is None:
            raise InvalidArgumentError(
                f"The network of {file} has no exits. Say how many to add: --exits 3; or return "
                "add_exits(backbone, ...)."
            )
        return add_exits(
            network,
            at="auto",
            num_exits=training.num_exits,
            num_classes=training.num_classes,
            example=_example(network, preprocessing or file.require_preprocessing()),
        )


def _example(backbone: nn.Module, preprocessing: AnyPreprocessing) -> Any:
    """Two made-up samples: always the same, so that a network is cut where it was in training."""
    if isinstance(preprocessing, Preprocessing):
        return torch.zeros(2, *preprocessing.shape)
    ids, mask = _made_up_texts(preprocessing)
    names = list(inspect.signature(backbone.forward).parameters)
    if "attention_mask" in names:
        return {"input_ids": ids, "attention_mask": mask}
    return (ids, mask) if len(names) > 1 else ids


def _made_up_texts(preprocessing: TextPreprocessing) -> tuple[Tensor, Tensor]:
    text = " ".join("abcdefgh" * (_TOKENS // 8))
    ids, mask = map(torch.from_numpy, text_inputs([text, text], preprocessing, num_inputs=2))
    return ids, mask


def num_inputs_of(network: Network) -> int:
    """Count the tensors that a network takes: of texts ids, and mask, and token types."""
    return max(1, len(network.input_specs))


def load_run(folder: Path | str, network: str | None = None) -> Run:
    """Load a run; one of a network of the user's own by the file that ``--network`` names."""
    folder = Path(folder)
    if network is None:
        return load(folder)
    recipe, class_names, _ = read_recipe(folder)
    if recipe is not None:
        raise InvalidArgumentError(
            f"--network is for runs of a network of your own. {folder} is of the recipe "
            f"{recipe.name}, which builds its network: leave it out."
        )
    saved = OwnTraining(num_classes=len(class_names), num_exits=None, fit=FitConfig())
    training = read_own(folder) or saved
    return load(folder, build_own(read_own_file(network), training, read_preprocessing(folder)))
