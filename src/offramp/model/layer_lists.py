"""Cutting transformers models by their layer lists, since torch.fx cannot trace them.

A model is written down as a list of steps, each from features to features: what comes before
the layers, every layer, and what comes after them. The steps call the model's own modules in the
way its own ``forward`` does; :func:`~offramp.add_exits` checks that they give the same output.

Shapes: ``B`` batch, ``T`` tokens, ``D`` width of a token, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from offramp.model.multi_exit import Features, as_features
from offramp.model.ragged import Ragged

Step = tuple[str, nn.Module]
"""Path of the module after which it ends, and a module from features to features."""


class LayerList:
    """The steps of a transformers model."""

    between: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        num_read: int = 1,
        num_crossing: Sequence[int] | None = None,
        ragged: Ragged | None = None,
    ) -> None:
        self._steps = steps
        self.num_read = num_read
        self.ragged = ragged
        self._num_crossing = num_crossing
        paths = [path for path, _ in steps]
        self.places: Mapping[str, int] = {path: i for i, path in enumerate(paths[:-1], start=1)}
        self.refused: Mapping[str, str] = {paths[-1]: "the backbone ends there, in the final exit"}

    def is_narrow(self, position: int) -> bool:
        """Return True if only what an exit reads crosses there."""
        return self._num_crossing is None or self._num_crossing[position - 1] == self.num_read

    def stages(self, positions: Sequence[int]) -> list[nn.Module]:
        """The slices between positions."""
        modules = [module for _, module in self._steps]
        return [
            InOrder(modules[start:end]) for start, end in pairwise((0, *positions, len(modules)))
        ]


class InOrder(nn.Module):
    """Steps that run one after the other, each given all that the one before returned."""

    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, *features: Tensor) -> Tensor | Features:
        """Map the first step's inputs to the last one's output."""
        for step in self.steps:
            features = as_features(step(*features))
        return features if len(features) > 1 else features[0]


def find_layer_list(backbone: nn.Module) -> LayerList | None:
    """Write a transformers model down as steps."""
    if not type(backbone).__module__.startswith("transformers."):
        return None
    describe = _KNOWN.get(type(backbone).__name__)
    return None if describe is None else describe(backbone)


def bert_steps(bert: Any, path: str = "bert") -> list[Step]:
    """Write a ``BertModel`` down as steps: its embeddings, then each of its layers."""
    wrapped = (BertLayerStep(layer, bert.config) for layer in bert.encoder.layer)
    layers = _numbered(f"{path}.encoder.layer", wrapped)
    return [(f"{path}.embeddings", BertStartStep(bert.embeddings)), *layers]


class BertStartStep(nn.Module):
    """BERT's embeddings; the mask goes along."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        token_type_ids_BT: Tensor | None = None,
    ) -> Features:
        """Map token ids to tokens and mask, which is 1 everywhere where none is given."""
        if mask_BT is None:
            mask_BT = torch.ones_like(input_ids_BT)
        return self.embeddings(input_ids_BT, token_type_ids=token_type_ids_BT), mask_BT


class BertLayerStep(nn.Module):
    """A layer; the mask that attention wants is made anew, a small thing beside the layer."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        from transformers.masking_utils import create_bidirectional_mask

        super().__init__()
        self.layer = layer
        self._config = config
        self._make_mask = create_bidirectional_mask

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Features:
        """Map tokens and mask to tokens and mask."""
        mask = self._make_mask(
            config=self._config, inputs_embeds=hidden_BTD, attention_mask=mask_BT
        )
        return self.layer(hidden_BTD, mask), mask_BT


def _bert(model: Any) -> LayerList:
    end = ("classifier", _BertEnd(model.bert.pooler, model.dropout, model.classifier))
    steps = [*bert_steps(model.bert), end]
    return LayerList(steps, num_read=2, ragged=Ragged(mask_index=1))


class _BertEnd(nn.Module):
    def __init__(self, pooler: nn.Module, dropout: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler
        self.dropout = dropout
        self.classifier = classifier

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        logits_BC: Tensor = self.classifier(self.dropout(self.pooler(hidden_BTD)))
        return logits_BC


def _vit(name: str) -> Callable[[Any], LayerList]:
    def describe(model: Any) -> LayerList:
        vit = getattr(model, name)
        layers = _numbered(f"{name}.layers", vit.layers)
        start = (f"{name}.embeddings", vit.embeddings)
        end = ("classifier", nn.Sequential(vit.layernorm, _FirstToken(), model.classifier))
        return LayerList([start, *layers, end])

    return describe


class _FirstToken(nn.Module):
    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD[:, 0, :]


def _convnext(model: Any) -> LayerList:
    convnext = model.convnext
    steps: list[Step] = [("convnext.embeddings", convnext.embeddings)]
    for i, stage in enumerate(convnext.encoder.stages):
        path = f"convnext.encoder.stages.{i}"
        downsampling = _numbered(f"{path}.downsampling_layer", stage.downsampling_layer)
        steps += _ending_at(path, [*downsampling, *_numbered(f"{path}.layers", stage.layers)])
    end = nn.Sequential(_PixelMean(), convnext.layernorm, model.classifier)
    return LayerList([*steps, ("classifier", end)])


def _numbered(path: str, modules: Iterable[nn.Module]) -> list[Step]:
    """Members of a list of modules, each a step."""
    return [(f"{path}.{i}", module) for i, module in enumerate(modules)]


def _ending_at(path: str, steps: Sequence[Step]) -> list[Step]:
    """The steps of a module: the end of the last is the end of the module, the shorter name."""
    return [*steps[:-1], (path, steps[-1][1])]


class _PixelMean(nn.Module):
    def forward(self, features_BDHW: Tensor) -> Tensor:
        return features_BDHW.mean([-2, -1])


def _resnet(model: Any) -> LayerList:
    resnet = model.resnet
    steps: list[Step] = [("resnet.embedder", resnet.embedder)]
    for i, stage in enumerate(resnet.encoder.stages):
        path = f"resnet.encoder.stages.{i}"
        steps += _ending_at(path, _numbered(f"{path}.layers", stage.layers))
    end = nn.Sequential(resnet.pooler, model.classifier)
    return LayerList([*steps, ("classifier", end)])


def _segformer(model: Any) -> LayerList:
    stages = _numbered("segformer.stages", model.segformer.stages)
    return LayerList([*stages, ("classifier", _SegformerEnd(model.config, model.classifier))])


class _SegformerEnd(nn.Module):
    def __init__(self, config: Any, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self._is_map = config.reshape_last_stage
        self._width = config.hidden_sizes[-1]

    def forward(self, features: Tensor) -> Tensor:
        if self._is_map:
            features = features.permute(0, 2, 3, 1)
        features_BTD = features.reshape(features.shape[0], -1, self._width)
        logits_BC: Tensor = self.classifier(features_BTD.mean(dim=1))
        return logits_BC


def _segformer_maps(model: Any) -> LayerList:
    stages = model.segformer.stages
    pyramid = (_PyramidStage(stage, is_first=i == 0) for i, stage in enumerate(stages))
    steps = _numbered("segformer.stages", pyramid)
    end = ("decode_head", _PyramidEnd(model.decode_head))
    return LayerList([*steps, end], num_crossing=range(1, len(stages) + 1))


class _PyramidStage(nn.Module):
    """A stage of an encoder whose decoder reads all stages: the earlier maps go along."""

    def __init__(self, stage: nn.Module, *, is_first: bool) -> None:
        super().__init__()
        self.stage = stage
        self._is_first = is_first

    def forward(self, newest: Tensor, *older: Tensor) -> Features:
        return (self.stage(newest), *(() if self._is_first else (newest, *older)))


class _PyramidEnd(nn.Module):
    def __init__(self, decode_head: nn.Module) -> None:
        super().__init__()
        self.decode_head = decode_head

    def forward(self, *newest_first: Tensor) -> Tensor:
        logits_BCHW: Tensor = self.decode_head(newest_first[::-1])
        return logits_BCHW


_KNOWN: Mapping[str, Callable[[Any], LayerList]] = {
    "BertForSequenceClassification": _bert,
    "ConvNextForImageClassification": _convnext,
    "DeiTForImageClassification": _vit("deit"),
    "ResNetForImageClassification": _resnet,
    "SegformerForImageClassification": _segformer,
    "SegformerForSemanticSegmentation": _segformer_maps,
    "ViTForImageClassification": _vit("vit"),
}
"""The description of each class."""
