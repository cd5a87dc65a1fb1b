"""Offramp makes neural networks stop early, so that the clock shows the saving.

Public names are loaded when they are first used: ``import offramp`` alone imports no torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from offramp.errors import (
    ArtifactError,
    AuthenticationError,
    BackboneCutError,
    DataError,
    DataNotFoundError,
    ExportMismatchError,
    FewSamplesWarning,
    InfeasibleTargetError,
    InSampleError,
    InvalidArgumentError,
    LinkTimeoutError,
    MissingExtraError,
    NotCalibratedError,
    OffloadError,
    OfframpError,
    PayloadError,
    ServerBusyError,
    ShapeError,
    TrainingDivergedError,
)
from offramp.results import AdaptiveResult

if TYPE_CHECKING:
    from offramp.calibration.chosen import Calibration
    from offramp.calibration.controller import fit_controller
    from offramp.calibration.evidence import calibrate
    from offramp.calibration.frontier import Frontier, frontier
    from offramp.calibration.guarantee import Guarantee, calibrate_with_guarantee
    from offramp.calibration.logits import DenseLogits, ExitLogits
    from offramp.calibration.sweep import Sweep
    from offramp.calibration.temperature import fit_temperatures
    from offramp.data.texts import encode_padded
    from offramp.evaluation.evaluate import Evaluation, evaluate
    from offramp.evaluation.placement import Placement, place
    from offramp.evaluation.sweeping import collect
    from offramp.evaluation.timing import time_runner
    from offramp.exporting.bundle import export
    from offramp.families.exits import AdaptiveRunner
    from offramp.families.halting import HaltingRunner
    from offramp.families.skip import SkipRunner
    from offramp.measure.cost import ExitCosts, count_macs
    from offramp.measure.dense import label_maps, mean_iou
    from offramp.model.cut import add_exits
    from offramp.model.multi_exit import MultiExitNetwork
    from offramp.offload.edge import EdgeConfig, EdgeRunner
    from offramp.offload.http_link import HttpLink
    from offramp.offload.plan import plan_split
    from offramp.policy.confidence import (
        entropy_confidence,
        margin_confidence,
        max_probability_confidence,
    )
    from offramp.policy.controller import ControllerPolicy
    from offramp.policy.dense_policies import AgreementPolicy, DensePolicy
    from offramp.policy.policies import (
        PatiencePolicy,
        Policy,
        ThresholdPolicy,
        always_leave_at,
        never_leave,
    )
    from offramp.policy.routing_policy import GatePolicy, HaltingPolicy
    from offramp.routing.halting import HaltingNetwork, add_halting
    from offramp.routing.skip import SkipNetwork, add_gates
    from offramp.runs.data import load_data
    from offramp.runs.hub import from_pretrained, push_to_hub, save_pretrained
    from offramp.runs.run import Run, load, save
    from offramp.runtime import Session
    from offramp.training.config import FitConfig, GateConfig, HaltingConfig
    from offramp.training.fit import fit, make_task
    from offramp.training.history import History
    from offramp.training.losses import joint_loss
    from offramp.training.tasks.exits import MultiExitTask
    from offramp.training.tasks.halting import HaltingTask
    from offramp.training.tasks.maps import DenseTask
    from offramp.training.tasks.skip import SkipTask
    from offramp.zoo.text import load_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "DenseLogits": "offramp.calibration.logits",
    "ExitLogits": "offramp.calibration.logits",
    "collect": "offramp.evaluation.sweeping",
    "Frontier": "offramp.calibration.frontier",
    "frontier": "offramp.calibration.frontier",
    "Guarantee": "offramp.calibration.guarantee",
    "calibrate_with_guarantee": "offramp.calibration.guarantee",
    "Sweep": "offramp.calibration.sweep",
    "fit_controller": "offramp.calibration.controller",
    "fit_temperatures": "offramp.calibration.temperature",
    "ControllerPolicy": "offramp.policy.controller",
    "AgreementPolicy": "offramp.policy.dense_policies",
    "DensePolicy": "offramp.policy.dense_policies",
    "Calibration": "offramp.calibration.chosen",
    "calibrate": "offramp.calibration.evidence",
    "export": "offramp.exporting.bundle",
    "Evaluation": "offramp.evaluation.evaluate",
    "evaluate": "offramp.evaluation.evaluate",
    "Placement": "offramp.evaluation.placement",
    "place": "offramp.evaluation.placement",
    "AdaptiveRunner": "offramp.families.exits",
    "SkipRunner": "offramp.families.skip",
    "HaltingRunner": "offramp.families.halting",
    "time_runner": "offramp.evaluation.timing",
    "ExitCosts": "offramp.measure.cost",
    "count_macs": "offramp.measure.cost",
    "label_maps": "offramp.measure.dense",
    "mean_iou": "offramp.measure.dense",
    "add_exits": "offramp.model.cut",
    "EdgeConfig": "offramp.offload.edge",
    "EdgeRunner": "offramp.offload.edge",
    "HttpLink": "offramp.offload.http_link",
    "plan_split": "offramp.offload.plan",
    "MultiExitNetwork": "offramp.model.multi_exit",
    "entropy_confidence": "offramp.policy.confidence",
    "margin_confidence": "offramp.policy.confidence",
    "max_probability_confidence": "offramp.policy.confidence",
    "PatiencePolicy": "offramp.policy.policies",
    "Policy": "offramp.policy.policies",
    "ThresholdPolicy": "offramp.policy.policies",
    "always_leave_at": "offramp.policy.policies",
    "never_leave": "offramp.policy.policies",
    "GatePolicy": "offramp.policy.routing_policy",
    "HaltingPolicy": "offramp.policy.routing_policy",
    "HaltingNetwork": "offramp.routing.halting",
    "add_halting": "offramp.routing.halting",
    "SkipNetwork": "offramp.routing.skip",
    "add_gates": "offramp.routing.skip",
    "Session": "offramp.runtime",
    "fit": "offramp.training.fit",
    "make_task": "offramp.training.fit",
    "MultiExitTask": "offramp.training.tasks.exits",
    "DenseTask": "offramp.training.tasks.maps",
    "SkipTask": "offramp.training.tasks.skip",
    "HaltingTask": "offramp.training.tasks.halting",
    "History": "offramp.training.history",
    "joint_loss": "offramp.training.losses",
    "from_pretrained": "offramp.runs.hub",
    "push_to_hub": "offramp.runs.hub",
    "save_pretrained": "offramp.runs.hub",
    "Run": "offramp.runs.run",
    "load": "offramp.runs.run",
    "save": "offramp.runs.run",
    "load_data": "offramp.runs.data",
    "encode_padded": "offramp.data.texts",
    "load_tokenizer": "offramp.zoo.text",
    "FitConfig": "offramp.training.config",
    "GateConfig": "offramp.training.config",
    "HaltingConfig": "offramp.training.config",
}

_RENAMED = {
    "choose_threshold": ("offramp.calibration.evidence", "calibrate", "calibrate"),
    "choose_threshold_with_guarantee": (
        "offramp.calibration.guarantee",
        "calibrate_with_guarantee",
        "calibrate_with_guarantee",
    ),
    "collect_sweep": (
        "offramp.evaluation.sweeping",
        "collect_sweep",
        "collect(network, data, thresholds=...)",
    ),
}
"""Names of 0.1 that warn: the module and name that they stand for, and what to write instead."""

__all__ = [
    "AdaptiveResult",
    "AdaptiveRunner",
    "AgreementPolicy",
    "ArtifactError",
    "AuthenticationError",
    "BackboneCutError",
    "Calibration",
    "ControllerPolicy",
    "DataError",
    "DataNotFoundError",
    "DenseLogits",
    "DensePolicy",
    "DenseTask",
    "EdgeConfig",
    "EdgeRunner",
    "Evaluation",
    "ExitCosts",
    "ExitLogits",
    "ExportMismatchError",
    "FewSamplesWarning",
    "FitConfig",
    "Frontier",
    "GateConfig",
    "GatePolicy",
    "Guarantee",
    "HaltingConfig",
    "HaltingNetwork",
    "HaltingPolicy",
    "HaltingRunner",
    "HaltingTask",
    "History",
    "HttpLink",
    "InSampleError",
    "InfeasibleTargetError",
    "InvalidArgumentError",
    "LinkTimeoutError",
    "MissingExtraError",
    "MultiExitNetwork",
    "MultiExitTask",
    "NotCalibratedError",
    "OffloadError",
    "OfframpError",
    "PatiencePolicy",
    "PayloadError",
    "Placement",
    "Policy",
    "Run",
    "ServerBusyError",
    "Session",
    "ShapeError",
    "SkipNetwork",
    "SkipRunner",
    "SkipTask",
    "Sweep",
    "ThresholdPolicy",
    "TrainingDivergedError",
    "add_exits",
    "add_gates",
    "add_halting",
    "always_leave_at",
    "calibrate",
    "calibrate_with_guarantee",
    "collect",
    "count_macs",
    "encode_padded",
    "entropy_confidence",
    "evaluate",
    "export",
    "fit",
    "fit_controller",
    "fit_temperatures",
    "from_pretrained",
    "frontier",
    "joint_loss",
    "label_maps",
    "load",
    "load_data",
    "load_tokenizer",
    "make_task",
    "margin_confidence",
    "max_probability_confidence",
    "mean_iou",
    "never_leave",
    "place",
    "plan_split",
    "push_to_hub",
    "save",
    "save_pretrained",
    "time_runner",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        module, successor, call = _RENAMED[name]
        warnings.warn(
            f"offramp.{name} goes in the next release: use offramp.{call}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return _loaded(name, module, successor)
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    value = _loaded(name, _HOMES[name], name)
    globals()[name] = value
    return value


def _loaded(name: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("offramp"):
            raise
        raise MissingExtraError(
            f"offramp.{name} needs {error.name}, which is not installed: "
            "pip install 'offramp[train]'"
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
