"""Settings of training as plain values; free of Lightning, so that reading a run needs none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal

from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Settings for gates of a network that skips blocks, after supervised pre-training.

    Attributes:
        reward_epochs: So many last epochs train by hybrid reinforcement learning; those before
            train by the labels alone, with straight-through gates.
        reward_learning_rate: At the start of those last epochs; decays to zero by a cosine. If
            None, the cosine of the epochs before goes on: one over all epochs, as for any network.
        settled_epochs: So many of those, the last ones, train by the labels alone under what the
            gates have come to decide: drawn no more, their weights not changed.
        alpha: Reward for skipping every block; a wrong answer costs its cross entropy.
        run_target: Skipping earns something only while more than this share of the gated blocks
            would run (by MACs where the reward goes by MACs); 0 for always.
        reward: blocks (each skipped block earns as much) or macs (by what its block takes).
        policy_weight: Weight of the policy gradient beside the supervised loss.
        baseline: Subtract from each return the mean return of the rest of the batch.
        self_critical: Subtract from each return what the same sample earns when its gates decide
            by one half: an extra forward pass, and far less variance where samples differ.
        supervised: Whether the supervised loss trains beside the reward; false, with as many
            reward epochs as epochs, is reinforcement learning from scratch.
    """

    reward_epochs: int = 0
    reward_learning_rate: float | None = 1e-4
    settled_epochs: int = 0
    alpha: float = 0.1
    run_target: float = 0.0
    reward: Literal["blocks", "macs"] = "blocks"
    policy_weight: float = 0.01
    baseline: bool = False
    self_critical: bool = False
    supervised: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        rate = self.reward_learning_rate
        _check(
            self,
            {
                "reward_epochs": (self.reward_epochs >= 0, "an int of at least 0"),
                "settled_epochs": (
                    0 <= self.settled_epochs <= self.reward_epochs,
                    f"an int from 0 to the {self.reward_epochs} reward_epochs",
                ),
                "reward_learning_rate": (rate is None or rate > 0, "a positive number, or None"),
                "alpha": (0 <= self.alpha < math.inf, "a number of at least 0"),
                "run_target": (0 <= self.run_target < 1, "a number in [0, 1)"),
                "reward": (self.reward in ("blocks", "macs"), "blocks or macs"),
                "policy_weight": (0 <= self.policy_weight < math.inf, "a number of at least 0"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class HaltingConfig:
    """Settings for a transformer that learns to halt its tokens, after it was trained plain.

    Attributes:
        halting_epochs: So many last epochs train with halting tokens; those before train the
            plain network.
        halting_learning_rate: At the start of those last epochs; decays to zero by a cosine.
        ponder_weight: Of the layers that tokens run, beside the cross entropy.
        prior_weight: Of the distance from the prior on where tokens halt.
        target_depth: Layers after which tokens shall halt, about, says that prior; half of all if
            None.
    Reference: Yin et al. (2022), A-ViT, for the weights.
    """

    halting_epochs: int = 0
    halting_learning_rate: float = 3e-4
    ponder_weight: float = 5e-4
    prior_weight: float = 1e-3
    target_depth: float | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        target = self.target_depth
        _check(
            self,
            {
                "halting_epochs": (self.halting_epochs >= 0, "an int of at least 0"),
                "halting_learning_rate": (self.halting_learning_rate > 0, "a positive number"),
                "ponder_weight": (0 <= self.ponder_weight < math.inf, "a number of at least 0"),
                "prior_weight": (0 <= self.prior_weight < math.inf, "a number of at least 0"),
                "target_depth": (
                    target is None or 0 < target < math.inf,
                    "a positive number of layers",
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of training. The defaults suit a small network trained from scratch.

    Attributes:
        epochs: Passes over the training data, at least 1.
        batch_size: Samples a step; ignored where a DataLoader is given.
        optimizer: adam, adamw or sgd (momentum 0.9, Nesterov).
        learning_rate: At the start; decays to zero over all epochs by a cosine, a step an epoch.
        warmup_epochs: So many first epochs let the learning rate rise in even steps.
        weight_decay: On weight matrices and kernels, not on biases and norms.
        loss_weights: One per exit; all 1 if None.
        detach: Let only the final exit train the stages.
        freeze_backbone: Train the exits before the final one only: stages and final exit stay as
            they are, BatchNorm's running statistics too.
        gradient_equilibrium: Let a stage learn from the mean of the losses of the exits behind
            it, not from their sum; from ``backbone_epochs`` on.
        backbone_epochs: Mixed training: so many first epochs train the final exit only, then all.
        ramp_epochs: So many epochs, after those of the backbone, let the loss weights of the
            exits before the final one grow from 0 to full.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        distillation: Share of the early exits' loss that comes from the final exit, in [0, 1].
        class_balance: "sampling" draws every class as often, with replacement, for test data
            whose classes are equally likely while those of train are not.
        class_weights: Of each class in the loss, of a network that says one for every pixel; all
            1 if None.
        validation_share: Share of the training data set cut off to validate on after every
            epoch, in [0, 0.5]; 0 for none.
        gradient_clip_val: Largest norm of the gradient; a larger one is scaled down. None for any.
        seed: Of the order of samples, of augmentation and of dropout, and of the validation part.
        device: cpu, cuda, or auto (cuda where there is one).
        devices: Processes that train together (DDP), at least 1.
        precision: bfloat16 computes most of a step in it, and keeps weights and losses in float32:
            faster on GPUs, and for convolutions on CPUs with matrix units (AMX).
        gates: For a network that skips blocks; the defaults if None.
        halting: For a network whose tokens halt; the defaults if None.
    """

    epochs: int = 10
    batch_size: int = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = 0.003
    warmup_epochs: int = 0
    weight_decay: float = 0.01
    loss_weights: tuple[float, ...] | None = None
    detach: bool = False
    freeze_backbone: bool = False
    gradient_equilibrium: bool = False
    backbone_epochs: int = 0
    ramp_epochs: int = 0
    label_smoothing: float = 0.0
    distillation: float = 0.0
    class_balance: Literal["none", "sampling"] = "none"
    class_weights: tuple[float, ...] | None = None
    validation_share: float = 0.0
    gradient_clip_val: float | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    gates: GateConfig | None = None
    halting: HaltingConfig | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        clip = self.gradient_clip_val
        epochs_left = self.epochs - self.backbone_epochs
        num_first = self.epochs - self._last_phase()
        checks = {
            "epochs": (self.epochs >= 1, "an int of at least 1"),
            "batch_size": (self.batch_size >= 1, "an int of at least 1"),
            "optimizer": (self.optimizer in ("adam", "adamw", "sgd"), "adam, adamw or sgd"),
            "learning_rate": (self.learning_rate > 0, "a positive number"),
            "warmup_epochs": (
                0 <= self.warmup_epochs < max(num_first, 1),
                f"an int in [0, {max(num_first, 1) - 1}], fewer than the epochs of the first phase",
            ),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "loss_weights": (
                all(0 <= weight < math.inf for weight in self.loss_weights or ()),
                "numbers of at least 0",
            ),
            "backbone_epochs": (
                0 <= self.backbone_epochs < self.epochs,
                f"an int in [0, {self.epochs - 1}], fewer than the epochs",
            ),
            "ramp_epochs": (
                0 <= self.ramp_epochs <= epochs_left,
                f"an int in [0, {epochs_left}], no more than the epochs after backbone_epochs",
            ),
            "freeze_backbone": (
                not (self.freeze_backbone and (self.backbone_epochs or self.gradient_equilibrium)),
                "false where backbone_epochs or gradient_equilibrium trains the backbone; "
                "set those to 0 and false to freeze it",
            ),
            "gradient_equilibrium": (
                not (self.gradient_equilibrium and self.detach),
                "false with detach, which lets the final exit alone train the stages",
            ),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "distillation": (0 <= self.distillation <= 1, "in [0, 1]"),
            "class_balance": (self.class_balance in ("none", "sampling"), "none or sampling"),
            "class_weights": (
                all(0 < weight < math.inf for weight in self.class_weights or ()),
                "positive numbers",
            ),
            "validation_share": (0 <= self.validation_share <= 0.5, "in [0, 0.5]"),
            "gradient_clip_val": (
                clip is None or 0 < clip < math.inf,
                "a positive number, or None",
            ),
            "device": (self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
            "devices": (self.devices >= 1, "an int of at least 1"),
            "precision": (self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
            "seed": (0 <= self.seed < 2**32, "an int in [0, 2**32 - 1]"),
        }
        fits = self._last_phase() <= self.epochs
        for kind, name in (("gates", "reward_epochs"), ("halting", "halting_epochs")):
            if getattr(self, kind) is not None:
                expected = f"of at most {self.epochs} {name}, as many as there are epochs"
                checks[kind] = (fits, expected)
        _check(self, checks)

    def _last_phase(self) -> int:
        """Epochs of reinforcement learning, or with halting tokens."""
        reward = 0 if self.gates is None else self.gates.reward_epochs
        return reward if self.halting is None else self.halting.halting_epochs


def _check_types(config: DataclassInstance) -> None:
    """Refuse what cannot be compared with a number, before it is."""
    for field in fields(config):
        kind, expected = _KINDS.get(str(field.type).removesuffix(" | None"), (object, ""))
        value = getattr(config, field.name)
        if value is None and str(field.type).endswith("None"):
            continue
        if kind is tuple:
            is_valid = isinstance(value, tuple | list) and all(isinstance(v, Real) for v in value)
        else:
            is_valid = isinstance(value, kind)
        if not is_valid:
            raise InvalidArgumentError(
                f"The {field.name!r} parameter must be {expected}. Got {value!r}."
            )


_KINDS: Mapping[str, tuple[type, str]] = {
    "int": (Integral, "an int"),
    "float": (Real, "a number"),
    "tuple[float, ...]": (tuple, "a tuple of numbers"),
    "GateConfig": (GateConfig, "a GateConfig"),
    "HaltingConfig": (HaltingConfig, "a HaltingConfig"),
}
"""Of what class values are, by the type of a field, and how a message calls it."""


def _check(config: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    for name, (is_valid, expected) in checks.items():
        if not is_valid:
            raise InvalidArgumentError(
                f"The {name!r} parameter must be {expected}. Got {getattr(config, name)!r}."
            )
