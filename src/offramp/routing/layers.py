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


class ViTLayer(TransformerLayer):
    """A layer of transformers' ViT or DeiT."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.attention.num_attention_heads
        self.attention_dropout = layer.attention.attention_dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        attention, seen = self.layer.attention, self.layer.layernorm_before(x)
        return attention.q_proj(seen), attention.k_proj(seen), attention.v_proj(seen)

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        layer = self.layer
        x = layer.dropout(layer.attention.o_proj(context)) + x
        y: Tensor = layer.dropout(layer.mlp(layer.layernorm_after(x))) + x
        return y


class BertLayer(TransformerLayer):
    """A layer of transformers' BERT, whose norms follow the residual sums."""

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
