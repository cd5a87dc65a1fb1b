"""Transformer layers in two halves, so that masked, padded and packed tokens share their weights.

Attention is the only part of a layer in which tokens meet. What comes before it (the projections)
and after it (the rest of the layer) works on each token alone, whatever axes stand in front.

Shapes: ``B`` batch, ``T`` tokens, ``D`` width of a token, ``A`` width of all heads together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerLayer(nn.Module, ABC):
    """A layer of self-attention and an MLP, cut where its tokens meet.

    Attributes:
        num_heads: Heads of its attention.
        attention_dropout: Share of attention weights that are dropped in training.
    """

    num_heads: int
    attention_dropout: float = 0.0

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what a layer's attention works on."""

    @abstractmethod
    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """Run what follows attention."""

    def forward(self, x_BTD: Tensor, is_key_BT: Tensor | None = None) -> Tensor:
        """Run the layer on a batch of as many tokens each."""
        query, key, value = self.project(x_BTD)
        dropout = self.attention_dropout if self.training else 0.0
        context = attend(query, key, value, self.num_heads, is_key_BT=is_key_BT, dropout=dropout)
        return self.complete(x_BTD, context)


def attend(
    query_BTA: Tensor,
    key_BTA: Tensor,
    value_BTA: Tensor,
    num_heads: int,
    *,
    is_key_BT: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the tokens of each sample to one another."""
    query, key, value = (_by_head(x, num_heads) for x in (query_BTA, key_BTA, value_BTA))
    mask = None if is_key_BT is None else is_key_BT[..., None, None, :]
    if torch.compiler.is_exporting():
        context = _attend_in_graph(query, key, value, mask)
    else:
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout
        )
    return context.transpose(-3, -2).flatten(-2)


def _attend_in_graph(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same in few operations; torch's own becomes twice as many nodes of an ONNX graph."""
    score = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    context: Tensor = score.softmax(-1) @ value
    return context


def _by_head(x_BTA: Tensor, num_heads: int) -> Tensor:
    return x_BTA.reshape(*x_BTA.shape[:-1], num_heads, -1).transpose(-3, -2)


class TimmLayer(TransformerLayer):
    """A ``Block`` of timm's VisionTransformer."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.num_heads = block.attn.num_heads
        self.attention_dropout = block.attn.attn_drop.p

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention = self.block.attn
        qkv = attention.qkv(self.block.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(-3)
        query, key = attention.q_norm(query), attention.k_norm(key)
        return query.flatten(-2), key.flatten(-2), value.flatten(-2)

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        block, attention = self.block, self.block.attn
        update = attention.proj_drop(attention.proj(attention.norm(context)))
        x = x + block.drop_path1(block.ls1(update))
        y: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return y


class EvaLayer(TransformerLayer):
    """An ``EvaBlock`` of timm, as in EVA-02 and DINOv3: places are rotations of query and key.

    Each token carries its rotation, sines and cosines, behind its coordinates.
    """

    def __init__(self, block: Any, *, num_angles: int) -> None:
        super().__init__()
        self.block = block
        self.num_heads = block.attn.num_heads
        self.attention_dropout = block.attn.attn_drop.p
        self._num_angles = num_angles

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention = self.block.attn
        seen = self.block.norm1(x[..., : -self._num_angles])
        if attention.qkv is None:
            qkv: tuple[Tensor, ...] = _projected(attention, seen)
        elif attention.q_bias is None:
            qkv = attention.qkv(seen).chunk(3, dim=-1)
        else:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            qkv = F.linear(seen, attention.qkv.weight, bias).chunk(3, dim=-1)
        query, key, value = (each.reshape(*each.shape[:-1], self.num_heads, -1) for each in qkv)
        angles = x[..., None, -self._num_angles :]
        query = self._rotated(attention.q_norm(query), angles)
        key = self._rotated(attention.k_norm(key), angles)
        return query.flatten(-2), key.flatten(-2), value.flatten(-2)

    def _rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        sine, cosine = angles.chunk(2, dim=-1)
        if self.block.attn.rotate_half:
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cosine + turned * sine

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        block, attention = self.block, self.block.attn
        x, angles = x[..., : -self._num_angles], x[..., -self._num_angles :]
        update = attention.proj_drop(attention.proj(attention.norm(context)))
        x = x + block.drop_path1(update if block.gamma_1 is None else block.gamma_1 * update)
        update = block.mlp(block.norm2(x))
        x = x + block.drop_path2(update if block.gamma_2 is None else block.gamma_2 * update)
        return torch.cat([x, angles], -1)


class TorchvisionLayer(TransformerLayer):
    """An ``EncoderBlock`` of torchvision's VisionTransformer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.self_attention.num_heads
        self.attention_dropout = layer.self_attention.dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention = self.layer.self_attention
        qkv = F.linear(self.layer.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.chunk(3, dim=-1)
        return query, key, value

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer, out = self.layer, self.layer.self_attention.out_proj
        x = layer.dropout(F.linear(context, out.weight, out.bias)) + x
        y: Tensor = x + layer.mlp(layer.ln_2(x))
        return y

    def forward(self, x_BTD: Tensor, is_key_BT: Tensor | None = None) -> Tensor:
        """Run the layer; where no token is left out, as torch's own kernel does."""
        if is_key_BT is not None:
            return super().forward(x_BTD, is_key_BT)
        y_BTD: Tensor = self.layer(x_BTD)
        return y_BTD


class ViTLayer(TransformerLayer):
    """A layer of transformers' ViT, DeiT, ViTMSN, AST or BEiT."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.attention.num_attention_heads
        self.attention_dropout = layer.attention.attention_dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        return _projected(self.layer.attention, self.layer.layernorm_before(x))

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer = self.layer
        x = self._scaled(1, layer.dropout(layer.attention.o_proj(context))) + x
        y: Tensor = self._scaled(2, layer.dropout(layer.mlp(layer.layernorm_after(x)))) + x
        return y

    def _scaled(self, number: int, update: Tensor) -> Tensor:
        """BEiT scales what a half of the layer adds, and drops it for a share of the samples."""
        scale = getattr(self.layer, f"lambda_{number}", None)
        if scale is None:
            return update
        scaled: Tensor = self.layer.drop_path(scale * update)
        return scaled


def _projected(attention: Any, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention.q_proj(seen), attention.k_proj(seen), attention.v_proj(seen)


class Dinov2Layer(TransformerLayer):
    """A layer of transformers' DINOv2, with registers or without."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.attention.num_attention_heads
        self.attention_dropout = layer.attention.attention_dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        return _projected(self.layer.attention, self.layer.norm1(x))

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer = self.layer
        x = layer.drop_path(layer.layer_scale1(layer.attention.o_proj(context))) + x
        y: Tensor = layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x)))) + x
        return y


class ClipLayer(TransformerLayer):
    """A layer of the vision part of transformers' CLIP or SigLIP."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.self_attn.num_heads
        self.attention_dropout = layer.self_attn.dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        return _projected(self.layer.self_attn, self.layer.layer_norm1(x))

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer = self.layer
        x = x + layer.self_attn.out_proj(context)
        y: Tensor = x + layer.mlp(layer.layer_norm2(x))
        return y


class BertLayer(TransformerLayer):
    """A layer of transformers' BERT and its kin, whose norms follow the residual sums."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.attention.self.num_attention_heads
        self.attention_dropout = layer.attention.self.dropout.p

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention = self.layer.attention.self
        return attention.query(x), attention.key(x), attention.value(x)

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer = self.layer
        x = layer.attention.output(context, x)
        y: Tensor = layer.output(layer.intermediate(x), x)
        return y


class DistilBertLayer(TransformerLayer):
    """A layer of transformers' DistilBERT."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.attention.n_heads
        self.attention_dropout = layer.attention.dropout.p

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention = self.layer.attention
        return attention.q_lin(x), attention.k_lin(x), attention.v_lin(x)

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer = self.layer
        x = layer.sa_layer_norm(layer.attention.out_lin(context) + x)
        y: Tensor = layer.output_layer_norm(layer.ffn(x) + x)
        return y


class AlbertLayer(TransformerLayer):
    """A layer of transformers' ALBERT, whose weights other layers may share."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.attention.num_attention_heads
        self.attention_dropout = layer.attention.attention_dropout.p

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention = self.layer.attention
        return attention.query(x), attention.key(x), attention.value(x)

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer, attention = self.layer, self.layer.attention
        x = attention.LayerNorm(x + attention.output_dropout(attention.dense(context)))
        y: Tensor = layer.full_layer_layer_norm(layer.ff_chunk(x) + x)
        return y
