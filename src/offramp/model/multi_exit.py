"""The network with several exits: stages that run one after the other, an exit after each.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError
from offramp.measure.cost import count_macs, evaluation_mode
from offramp.measure.exit_costs import ExitCosts, mean_costs
from offramp.measure.outputs import LABELS, MAPS, Outputs, SaysClasses
from offramp.model.inputs import InputSpec, as_inputs
from offramp.model.ragged import Ragged

Features = tuple[Tensor, ...]
"""The tensors that cross from one stage to the next, batch axis first."""


class MultiExitNetwork(SaysClasses, nn.Module):
    """A backbone cut into stages, with an exit after each.

    Stage k maps the features of stage k - 1 to its own (a tensor, or a tuple of tensors when
    several cross the cut); exit k maps the features of stage k to logits. Both are called with
    the features as positional arguments. ``forward`` always returns every exit's logits:
    stopping early is the business of a runner.

    Args:
        stages: The slices of the backbone, in order.
        exits: As many exit heads; the last one is the final exit.
    Raises:
        InvalidArgumentError: If there is no stage, or not one exit per stage.
    Example:
        >>> stages = [nn.Linear(8, 4), nn.Linear(4, 4)]
        >>> network = MultiExitNetwork(stages, [nn.Linear(4, 3), nn.Linear(4, 3)])
        >>> [tuple(logits.shape) for logits in network(torch.zeros(5, 8))]
        [(5, 3), (5, 3)]
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[nn.Module]) -> None:
        super().__init__()
        if not stages or len(stages) != len(exits):
            raise InvalidArgumentError(
                "Expected at least one stage and as many exits as stages. "
                f"Got {len(stages)} stages and {len(exits)} exits."
            )
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self.backbone_keys: dict[str, str] = {}
        """The key here of each key in the backbone's state dict; empty without a backbone."""
        self.input_specs: tuple[InputSpec, ...] = ()
        """The backbone's inputs as the example showed them; empty without one."""
        self.num_classes: int | None = None
        """Number of classes; None where nobody said it."""
        self.ragged: Ragged | None = None
        """The place of the padding mask; None if all samples have one size."""
        self.pixel_multiple: int | None = None
        """Segmentation only: image height and width must be divisible by this."""

    @property
    def num_exits(self) -> int:
        """Number of exits, the final one counted."""
        return len(self.exits)

    @property
    def outputs(self) -> Outputs:
        """The output of an exit for a sample: a class, or a map of classes."""
        return LABELS if self.pixel_multiple is None else MAPS

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs in the backbone's ``forward``; empty without an example."""
        return tuple(spec.name for spec in self.input_specs)

    def share_keys_with(self, backbone: nn.Module) -> None:
        """Note which of a backbone's weights stands where in this network, which shares them.

        Weights of the backbone that no stage uses are kept beside the stages.

        Args:
            backbone: The module that the stages were cut from.
        """
        own = {id(tensor): key for key, tensor in _tensors(self)}
        unused = nn.Module()
        tensors = dict(_tensors(backbone))
        shared = {key: tensors[key] for key in backbone.state_dict()}
        for key, tensor in shared.items():
            if id(tensor) not in own:
                name = key.replace(".", "_")
                if isinstance(tensor, nn.Parameter):
                    unused.register_parameter(name, tensor)
                else:
                    unused.register_buffer(name, tensor)
                own[id(tensor)] = f"unused.{name}"
        if unused.state_dict():
            self.unused = unused
        self.backbone_keys = {key: own[id(tensor)] for key, tensor in shared.items()}

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The backbone's weights under the backbone's own keys, as its ``state_dict()`` has them.

        Returns:
            Tensors that share memory with the network's.
        """
        state = self.state_dict()
        return {key: state[own] for key, own in self.backbone_keys.items()}

    def load_backbone_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the backbone, key for key; exits before the final one stay.

        Args:
            state: As the backbone's own ``state_dict()``.
        Raises:
            ArtifactError: If a key is missing or unknown, or a tensor has another shape; nothing
                is loaded then.
        """
        own = self.state_dict()
        expected = {key: own[name].shape for key, name in self.backbone_keys.items()}
        found = {key: tensor.shape for key, tensor in state.items()}
        if expected != found:
            keys = expected.keys() | found.keys()
            different = sorted(key for key in keys if expected.get(key) != found.get(key))
            raise ArtifactError(
                f"Expected a checkpoint of the backbone, with {len(expected)} tensors. "
                f"{len(different)} are missing, unknown or of another shape, first "
                f"{different[0]!r}."
            )
        self.load_state_dict(
            {name: state[key] for key, name in self.backbone_keys.items()}, strict=False
        )

    def run_stage(self, stage_index: int, features: Features) -> Features:
        """Run one stage.

        Args:
            stage_index: Number of the stage, from 0.
            features: What the stage before returned; the network's inputs for stage 0.
        Returns:
            The features of this stage.
        """
        return as_features(self.stages[stage_index](*features))

    def run_exit(self, exit_index: int, features: Features) -> Tensor:
        """Run one exit head.

        Args:
            exit_index: Number of the exit, from 0.
            features: The features of the stage it hangs on.
        Returns:
            Its logits, shape (B, C), float.
        """
        logits: Tensor = self.exits[exit_index](*features)
        return logits

    def forward(
        self, *inputs: Tensor | Mapping[str, Tensor], detach: bool = False
    ) -> tuple[Tensor, ...]:
        """Compute every exit's logits.

        Args:
            inputs: The backbone's inputs, each with the batch axis first, or a dict of them by
                name.
            detach: Whether the exits before the final one read detached features, so that only
                the final exit's loss reaches the stages.
        Returns:
            Raw logits of each exit, shape (B, C) each, in the order of the exits.
        """
        features: Features = as_inputs(inputs, self)
        outputs = []
        for k in range(self.num_exits):
            features = self.run_stage(k, features)
            is_final = k == self.num_exits - 1
            seen = tuple(f.detach() for f in features) if detach and not is_final else features
            outputs.append(self.run_exit(k, seen))
        return tuple(outputs)

    def plain(self) -> PlainNetwork:
        """The plain network: the same stages with the final exit only, weights shared.

        Returns:
            What every saving is measured against.
        """
        return PlainNetwork(self)

    def trimmed(self, inputs: Features) -> Features:
        """A batch of inputs as the stages shall see it: without padding that all samples have.

        Args:
            inputs: The network's inputs, each with the batch axis first.
        Returns:
            The same, or shorter ones.
        """
        return inputs if self.ragged is None else self.ragged.trim_inputs(inputs)

    def take(self, features: Features, rows_B: Tensor) -> Features:
        """Features of some samples of a batch, padded to the longest of those.

        Args:
            features: What a stage returned.
            rows_B: Which samples, shape (B,), int64.
        Returns:
            As many tensors, of those samples only.
        """
        taken = take_samples(features, rows_B)
        return taken if self.ragged is None else self.ragged.trim_features(taken)

    @torch.no_grad()
    def costs(self, *inputs: Tensor | Mapping[str, Tensor]) -> ExitCosts:
        """Count the MACs per sample of every stage and head, by running them on one sample.

        Where samples are of unequal length, the mean over the batch, padding left out.

        Args:
            inputs: A batch like those the network will see, at least one sample.
        Returns:
            MACs of each part.
        Raises:
            ShapeError: If the batch is empty.
        """
        given = as_inputs(inputs, self)
        if self.ragged is None:
            return self._costs_of(tuple(tensor[:1] for tensor in given))
        return self.costs_of_lengths(self.ragged.lengths(given), given)

    def plain_macs(self, *inputs: Tensor) -> Tensor:
        """Count what each sample would cost the plain network, padding left out.

        Args:
            inputs: As for :meth:`costs`.
        Returns:
            MACs of each sample, shape (B,), int64, on the CPU.
        """
        if self.ragged is None:
            return torch.full((len(inputs[0]),), self.costs(*inputs).plain_macs)
        lengths, of_sample_B = torch.unique(self.ragged.lengths(inputs), return_inverse=True)
        macs = [self.costs_at(length, inputs).plain_macs for length in lengths.tolist()]
        return torch.tensor(macs)[of_sample_B.cpu()]

    def costs_of_lengths(self, lengths_N: Tensor, inputs: Features) -> ExitCosts:
        """Count the MACs of the mean of samples of unequal length.

        Args:
            lengths_N: Tokens of each sample, shape (N,), int64.
            inputs: As for :meth:`costs_at`.
        Returns:
            MACs of each part, the mean over the samples.
        """
        lengths, counts = torch.unique(lengths_N, return_counts=True)
        costs = [self.costs_at(length, inputs) for length in lengths.tolist()]
        return mean_costs(costs, counts.tolist())

    @torch.no_grad()
    def costs_at(self, num_tokens: int, inputs: Features) -> ExitCosts:
        """Count the MACs of a sample of so many tokens.

        Args:
            num_tokens: Its length, at least 1.
            inputs: The network's inputs, each of the shape (B, T): tokens are theirs, those of
                its longest sample, again from the first on where they are too few.
        Returns:
            MACs of each part.
        """
        assert self.ragged is not None
        mask_BT = self.ragged.mask_of_inputs(inputs)
        if not bool(mask_BT.any()):
            return self._costs_of(tuple(t.new_ones((1, max(num_tokens, 1))) for t in inputs))
        row = mask_BT.sum(1).argmax()
        valid_T = mask_BT[row].nonzero()[:, 0]
        taken_T = valid_T[torch.arange(max(num_tokens, 1), device=valid_T.device) % len(valid_T)]
        return self._costs_of(tuple(t[row, taken_T][None] for t in inputs))

    def _costs_of(self, sample: Features) -> ExitCosts:
        stage_macs, head_macs = [], []
        features = sample
        with evaluation_mode(self):
            for stage, head in zip(self.stages, self.exits, strict=True):
                stage_macs.append(count_macs(stage, *features))
                features = as_features(stage(*features))
                head_macs.append(count_macs(head, *features))
        return ExitCosts(stage_macs=tuple(stage_macs), head_macs=tuple(head_macs))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by key, one that stands twice twice."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class PlainNetwork(nn.Module):
    """A multi-exit network's stages and final exit, run as one ordinary network."""

    def __init__(self, network: MultiExitNetwork) -> None:
        super().__init__()
        self.stages = network.stages
        self.head = network.exits[-1]
        self.input_specs = network.input_specs
        self.ragged = network.ragged

    def forward(self, *inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Compute the final exit's logits."""
        features: Features = as_inputs(inputs, self)
        for stage in self.stages:
            features = as_features(stage(*features))
        logits: Tensor = self.head(*features)
        return logits


def take_samples(features: Features, rows_B: Tensor) -> Features:
    """Take some samples of a batch, each tensor laid out in memory as before.

    ``index_select`` alone would lay channels-last feature maps out anew, channels first, and the
    convolutions after it would turn them back.
    """
    return tuple(_take(tensor, rows_B) for tensor in features)


def _take(tensor: Tensor, rows_B: Tensor) -> Tensor:
    is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not tensor.is_contiguous():
        return tensor.permute(0, 2, 3, 1).index_select(0, rows_B).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows_B)


def as_features(output: object) -> Features:
    """Bring what a stage returned into the form of features."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tuple) and output and all(isinstance(t, Tensor) for t in output):
        return output
    raise ShapeError(
        f"Expected a tensor or a tuple of tensors as features. Got {type(output).__name__}."
    )
