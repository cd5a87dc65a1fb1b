"""Transformers that classify by their first token, taken apart into embedding, layers and head.

Known: ours with one exit, timm's ``VisionTransformer``, transformers' ViT, DeiT and BERT.

Shapes: ``B`` batch, ``T`` tokens, ``D`` width of a token, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.model.ragged import Ragged
from offramp.routing.layers import BertLayer, TimmLayer, TransformerLayer, ViTLayer


class TokenParts(NamedTuple):
    """A transformer in order.

    Attributes:
        embed: From the inputs to tokens, shape (B, T, D), of which the first is the class token,
            and which of them are no padding, shape (B, T), bool.
        layers: Its layers.
        head: From the class token after the last layer, shape (B, D), to logits, shape (B, C);
            holds the final norm.
        ragged: Where padding is marked in the inputs; None where there is none.
    """

    embed: nn.Module
    layers: tuple[TransformerLayer, ...]
    head: nn.Module
    ragged: Ragged | None = None


class TokenStage(nn.Module):
    """Embedding and layers, every token in each: the plain network but for its head."""

    def __init__(
        self, embed: nn.Module, layers: Iterable[TransformerLayer], *, has_padding: bool
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.has_padding = has_padding

    def forward(self, *inputs: Tensor) -> Tensor | Features:
        """Map inputs to the last layer's tokens and, with padding, which of them are none."""
        x_BTD, is_valid_BT = self.embed(*inputs)
        for layer in self.layers:
            x_BTD = layer(x_BTD, is_valid_BT if self.has_padding else None)
        return (x_BTD, is_valid_BT) if self.has_padding else x_BTD


class ClassTokenHead(nn.Module):
    """A head on the first token."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x_BTD: Tensor, is_valid_BT: Tensor | None = None) -> Tensor:
        """Map tokens to logits."""
        logits_BC: Tensor = self.head(x_BTD[:, 0])
        return logits_BC


def as_one_exit(parts: TokenParts) -> MultiExitNetwork:
    """Put a transformer together as a network of one exit."""
    stage = TokenStage(parts.embed, parts.layers, has_padding=parts.ragged is not None)
    network = MultiExitNetwork([stage], [ClassTokenHead(parts.head)])
    network.ragged = parts.ragged
    return network


def take_apart(transformer: nn.Module) -> TokenParts:
    """Find embedding, layers and head."""
    if isinstance(transformer, MultiExitNetwork):
        stage, head = transformer.stages[0], transformer.exits[0]
        if type(stage) is TokenStage and type(head) is ClassTokenHead:
            layers: Any = tuple(stage.layers)
            return TokenParts(stage.embed, layers, head.head, transformer.ragged)
    package = type(transformer).__module__.partition(".")[0]
    describe = _KNOWN.get((package, type(transformer).__name__))
    if describe is None:
        raise BackboneCutError(
            "Expected a transformer whose parts are known: ours with one exit (variant=plain), "
            "timm's VisionTransformer, or transformers' ViTForImageClassification, "
            "DeiTForImageClassification or BertForSequenceClassification. "
            f"Got {type(transformer).__name__}: build a HaltingNetwork from its embedding, layers "
            "and head."
        )
    return describe(transformer)


def example_of(transformer: Any) -> Features | None:
    """Make inputs of the shape that a model's configuration names."""
    if isinstance(transformer, MultiExitNetwork):
        return None
    weight = next(transformer.parameters())
    config = getattr(transformer, "config", None)
    if config is not None and hasattr(config, "vocab_size"):
        ids_BT = torch.zeros(1, min(8, config.max_position_embeddings), dtype=torch.int64)
        return ids_BT.to(weight.device), torch.ones_like(ids_BT).to(weight.device)
    if config is not None:
        channels, side = config.num_channels, config.image_size
    else:
        channels, side = transformer.patch_embed.proj.in_channels, transformer.patch_embed.img_size
    if side is None:
        raise BackboneCutError("Expected an 'example', since the model names no size of images.")
    height, width = (side, side) if isinstance(side, int) else (side[0], side[-1])
    return (weight.new_zeros(1, channels, height, width),)


class _AllValid(nn.Module):
    """An embedding without padding."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, *inputs: Tensor) -> Features:
        x_BTD: Tensor = self.embed(*inputs)
        return x_BTD, all_valid(x_BTD)


def all_valid(x_BTD: Tensor) -> Tensor:
    """Say that no token is padding."""
    return x_BTD.new_ones(x_BTD.shape[:2]).bool()


def _timm(vit: Any) -> TokenParts:
    is_usual = (
        vit.global_pool == "token"
        and vit.attn_pool is None
        and vit.cls_token is not None
        and all(_is_usual_block(block) for block in vit.blocks)
    )
    if not is_usual:
        raise BackboneCutError(
            "Expected a VisionTransformer of timm that answers by its class token "
            "(global_pool='token') and has the usual blocks, without a gate on attention. "
            f"Got global_pool={vit.global_pool!r} and blocks {type(vit.blocks[0]).__name__}."
        )
    head = nn.Sequential(vit.norm, vit.fc_norm, vit.head_drop, vit.head)
    return TokenParts(_AllValid(_TimmEmbed(vit)), tuple(map(TimmLayer, vit.blocks)), head)


def _is_usual_block(block: Any) -> bool:
    if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention":
        return False
    return getattr(block.attn, "gate", None) is None and hasattr(block.attn, "norm")


class _TimmEmbed(nn.Module):
    """What timm's VisionTransformer does before its blocks; the rest of it is left out."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.patch_embed = vit.patch_embed
        self.cls_token, self.reg_token = vit.cls_token, vit.reg_token
        self.pos_embed, self.pos_drop = vit.pos_embed, vit.pos_drop
        self.patch_drop, self.norm_pre = vit.patch_drop, vit.norm_pre
        self._is_joined_first = not vit.no_embed_class

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = self.patch_embed(images_BCHW).flatten(1, -2)
        if not self._is_joined_first and self.pos_embed is not None:
            x_BTD = x_BTD + self.pos_embed
        prefixes = [t for t in (self.cls_token, self.reg_token) if t is not None]
        x_BTD = torch.cat([t.expand(x_BTD.shape[0], -1, -1) for t in prefixes] + [x_BTD], 1)
        if self._is_joined_first and self.pos_embed is not None:
            x_BTD = x_BTD + self.pos_embed
        y_BTD: Tensor = self.norm_pre(self.patch_drop(self.pos_drop(x_BTD)))
        return y_BTD


def _transformers_vit(name: str) -> Callable[[Any], TokenParts]:
    def describe(model: Any) -> TokenParts:
        vit = getattr(model, name)
        layers = tuple(map(ViTLayer, vit.layers))
        head = nn.Sequential(vit.layernorm, model.classifier)
        return TokenParts(_AllValid(vit.embeddings), layers, head)

    return describe


def _bert(model: Any) -> TokenParts:
    bert = model.bert
    head = nn.Sequential(bert.pooler.dense, bert.pooler.activation, model.dropout, model.classifier)
    return TokenParts(MaskedEmbed(bert.embeddings), bert_layers(bert), head, Ragged(mask_index=1))


def bert_layers(bert: Any) -> tuple[BertLayer, ...]:
    """Wrap the layers of a ``BertModel``."""
    return tuple(map(BertLayer, bert.encoder.layer))


class MaskedEmbed(nn.Module):
    """BERT's embeddings of token ids and a mask, or of ids alone."""

    def __init__(self, embeddings: nn.Module, pad_id: int | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self._pad_id = pad_id

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        token_type_ids_BT: Tensor | None = None,
    ) -> Features:
        """Map token ids to tokens and which of them are no padding."""
        if mask_BT is not None:
            is_valid_BT = mask_BT != 0
        elif self._pad_id is not None:
            is_valid_BT = ids_BT != self._pad_id
        else:
            is_valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        return self.embeddings(ids_BT, token_type_ids=token_type_ids_BT), is_valid_BT


_KNOWN: Mapping[tuple[str, str], Callable[[Any], TokenParts]] = {
    ("timm", "VisionTransformer"): _timm,
    ("transformers", "BertForSequenceClassification"): _bert,
    ("transformers", "DeiTForImageClassification"): _transformers_vit("deit"),
    ("transformers", "ViTForImageClassification"): _transformers_vit("vit"),
}
"""How each class is taken apart, by its package and name."""
