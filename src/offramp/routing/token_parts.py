"""Transformers taken apart into embedding, layers and head, whatever tokens they answer by.

Most answer by their first token; others by the mean of tokens, by two of them, or by both. What
their answer is made of is a :class:`Readout`.

Shapes: ``B`` batch, ``T`` tokens, ``D`` width of a token, ``C`` classes, ``R`` what is read of
tokens, ``A`` width of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.model.ragged import Ragged
from offramp.routing.layers import (
    AlbertLayer,
    BertLayer,
    ClipLayer,
    Dinov2Layer,
    DistilBertLayer,
    EvaLayer,
    TimmLayer,
    TorchvisionLayer,
    TransformerLayer,
    ViTLayer,
)
from offramp.routing.own import own_parts


class Readout(nn.Module):
    """The tokens that make an answer, if that takes more than the first one.

    Each token is marked with its share in everything that is read: behind its coordinates, so
    that the marks go with it where tokens are dropped.

    Args:
        norm: Of each token, in front of all that is read.
        firsts: How many of the first tokens are read, each on its own.
        mean_from: The first of the tokens whose mean is read; None where no mean is.
    """

    def __init__(self, norm: nn.Module, *, firsts: int, mean_from: int | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.firsts = firsts
        self.mean_from = mean_from
        self.num_marks = firsts + (mean_from is not None)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Read tokens without marks, as the backbone itself does, shape (B, A)."""
        x_BTD = self.norm(x_BTD)
        read = [x_BTD[:, index] for index in range(self.firsts)]
        if self.mean_from is not None:
            read.append(x_BTD[:, self.mean_from :].mean(1))
        return torch.cat(read, 1) if len(read) > 1 else read[0]

    def mark(self, x_BTD: Tensor) -> Tensor:
        """Put each token's marks behind it."""
        place_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        marks = [place_T == index for index in range(self.firsts)]
        if self.mean_from is not None:
            marks.append(place_T >= self.mean_from)
        marks_TR = torch.stack(marks, 1).to(x_BTD.dtype)
        marks_TR = marks_TR / marks_TR.sum(0)
        return torch.cat([x_BTD, marks_TR.expand(x_BTD.shape[0], -1, -1)], 2)

    def shares(self, x: Tensor) -> Tensor:
        """Read what each marked token adds to the answer, shape (..., A)."""
        tokens, marks = x[..., : -self.num_marks], x[..., -self.num_marks :]
        read: Tensor = self.norm(tokens)
        return (marks[..., None] * read[..., None, :]).flatten(-2)


class MarkedEmbed(nn.Module):
    """An embedding that marks its tokens."""

    def __init__(self, embed: nn.Module, readout: Readout) -> None:
        super().__init__()
        self.embed = embed
        self._mark = readout.mark

    def forward(self, *inputs: Tensor) -> Features:
        """Map inputs to marked tokens and which of them are no padding."""
        x_BTD, is_valid_BT = self.embed(*inputs)
        return self._mark(x_BTD), is_valid_BT


class MarkedLayer(TransformerLayer):
    """A layer on marked tokens, whose marks stay as they are."""

    def __init__(self, layer: TransformerLayer, num_marks: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = layer.num_heads
        self.attention_dropout = layer.attention_dropout
        self._num_marks = num_marks

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TransformerLayer.project`."""
        return self.layer.project(x[..., : -self._num_marks])

    def complete(self, x: Tensor, context: Tensor) -> Tensor:
        """See :meth:`TransformerLayer.complete`."""
        tokens, marks = x[..., : -self._num_marks], x[..., -self._num_marks :]
        return torch.cat([self.layer.complete(tokens, context), marks], -1)


class TokenParts(NamedTuple):
    """A transformer in order.

    Attributes:
        embed: From the inputs to tokens, shape (B, T, D), of which the first is the class token,
            and which of them are no padding, shape (B, T), bool.
        layers: Its layers.
        head: From the class token after the last layer, shape (B, D), or from what is read
            there, shape (B, A), to logits, shape (B, C); holds the final norm.
        ragged: Where padding is marked in the inputs; None where there is none.
        readout: What is read of the tokens; None for the class token alone.
    """

    embed: nn.Module
    layers: tuple[TransformerLayer, ...]
    head: nn.Module
    ragged: Ragged | None = None
    readout: Readout | None = None


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
    """A head on the first token, or on what is read of all."""

    def __init__(self, head: nn.Module, readout: Readout | None = None) -> None:
        super().__init__()
        self.head = head
        self.readout = readout

    def forward(self, x_BTD: Tensor, is_valid_BT: Tensor | None = None) -> Tensor:
        """Map tokens to logits."""
        read_BA = x_BTD[:, 0] if self.readout is None else self.readout(x_BTD)
        logits_BC: Tensor = self.head(read_BA)
        return logits_BC


def as_one_exit(parts: TokenParts) -> MultiExitNetwork:
    """Put a transformer together as a network of one exit."""
    stage = TokenStage(parts.embed, parts.layers, has_padding=parts.ragged is not None)
    network = MultiExitNetwork([stage], [ClassTokenHead(parts.head, parts.readout)])
    network.ragged = parts.ragged
    return network


def take_apart(transformer: nn.Module) -> TokenParts:
    """Find embedding, layers and head."""
    own = own_parts(transformer)
    if own is not None and type(own.stage) is TokenStage and type(own.head) is ClassTokenHead:
        layers: Any = tuple(own.stage.layers)
        return TokenParts(own.stage.embed, layers, own.head.head, own.ragged, own.head.readout)
    package = type(transformer).__module__.partition(".")[0]
    describe = _KNOWN.get((package, type(transformer).__name__))
    if describe is None:
        raise BackboneCutError(
            "Expected a transformer whose parts are known: ours with one exit (variant=plain), or "
            f"one of {', '.join(f'{name} of {package}' for package, name in _KNOWN)}. Got "
            f"{type(transformer).__name__}: build a HaltingNetwork from its embedding, layers and "
            "head."
        )
    return describe(transformer)


def example_of(transformer: Any) -> Features | None:
    """Make inputs of the shape that a model's configuration names."""
    if own_parts(transformer) is not None:
        return None
    weight = next(transformer.parameters())
    config = getattr(transformer, "config", None)
    if config is not None and hasattr(config, "max_position_embeddings"):
        ids_BT = torch.zeros(1, min(8, config.max_position_embeddings), dtype=torch.int64)
        return ids_BT.to(weight.device), torch.ones_like(ids_BT).to(weight.device)
    if config is not None and hasattr(config, "num_mel_bins"):
        return (weight.new_zeros(1, config.max_length, config.num_mel_bins),)
    if config is not None:
        config = getattr(config, "vision_config", config)
        channels, side = config.num_channels, config.image_size
    elif hasattr(transformer, "patch_embed"):
        channels, side = transformer.patch_embed.proj.in_channels, transformer.patch_embed.img_size
    else:
        stem = next(m for m in transformer.modules() if isinstance(m, nn.Conv2d))
        channels, side = stem.in_channels, transformer.image_size
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
    by_class = vit.global_pool == "token" and vit.cls_token is not None
    is_usual = (
        (by_class or vit.global_pool == "avg")
        and vit.attn_pool is None
        and all(_is_usual_block(block) for block in vit.blocks)
    )
    if not is_usual:
        raise BackboneCutError(
            "Expected a VisionTransformer of timm that answers by its class token or by the mean "
            "of its patches (global_pool='token' or 'avg') and has the usual blocks, without a "
            f"gate on attention or a bias by position. Got global_pool={vit.global_pool!r} and "
            f"blocks {type(vit.blocks[0]).__name__}."
        )
    embed, layers = _AllValid(_TimmEmbed(vit)), tuple(map(TimmLayer, vit.blocks))
    if by_class:
        head = nn.Sequential(vit.norm, vit.fc_norm, vit.head_drop, vit.head)
        return TokenParts(embed, layers, head)
    first = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
    head = nn.Sequential(vit.fc_norm, vit.head_drop, vit.head)
    readout = Readout(vit.norm, firsts=0, mean_from=first)
    return TokenParts(embed, layers, head, readout=readout)


def _timm_distilled(vit: Any) -> TokenParts:
    head = _MeanOfTwo(
        nn.Sequential(vit.head_drop, vit.head), nn.Sequential(vit.head_drop, vit.head_dist)
    )
    layers = tuple(map(TimmLayer, vit.blocks))
    readout = Readout(vit.norm, firsts=2)
    return TokenParts(_AllValid(_TimmEmbed(vit)), layers, head, readout=readout)


class _MeanOfTwo(nn.Module):
    """Two heads, each on the half of an answer that is its own, and the mean of their logits."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, answer_BA: Tensor) -> Tensor:
        first_BD, second_BD = answer_BA.chunk(2, dim=1)
        logits_BC: Tensor = (self.first(first_BD) + self.second(second_BD)) / 2
        return logits_BC


def _is_usual_block(block: Any) -> bool:
    if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention":
        return False
    return getattr(block.attn, "gate", None) is None and hasattr(block.attn, "norm")


class _TimmEmbed(nn.Module):
    """The part of timm's VisionTransformer before its blocks."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.patch_embed = vit.patch_embed
        second = getattr(vit, "dist_token", vit.reg_token)
        self.cls_token, self.reg_token = vit.cls_token, second
        self.pos_embed, self.pos_drop = vit.pos_embed, vit.pos_drop
        self.patch_drop = vit.patch_drop or nn.Identity()
        self.norm_pre = vit.norm_pre
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


def _timm_eva(vit: Any) -> TokenParts:
    blocks, rope = vit.blocks, vit.rope
    angles_TE = None
    if rope is not None and not getattr(vit, "rope_mixed", False):
        angles_TE = _angles(vit)
    is_usual = (
        angles_TE is not None
        and angles_TE.ndim == 2
        and vit.global_pool in ("token", "avg")
        and vit.attn_pool is None
        and all(type(block).__name__ == "EvaBlock" for block in blocks)
        and all(type(block.attn).__name__ == "EvaAttention" for block in blocks)
        and all(block.attn.gate is None for block in blocks)
        and (vit.global_pool == "avg" or vit.cls_token is not None)
    )
    if angles_TE is None or not is_usual:
        raise BackboneCutError(
            "Expected an Eva of timm with one rotation for all of its layers, that answers by its "
            "class token or by the mean of its patches, without a gate on attention. Got another: "
            "use a VisionTransformer of timm, or build a HaltingNetwork from its parts."
        )
    norm = _WithoutAngles(vit.norm, num_angles=angles_TE.shape[1])
    by_class = vit.global_pool == "token"
    readout = Readout(
        norm, firsts=int(by_class), mean_from=None if by_class else vit.num_prefix_tokens
    )
    layers = tuple(EvaLayer(block, num_angles=angles_TE.shape[1]) for block in blocks)
    head = nn.Sequential(vit.fc_norm, vit.head_drop, vit.head)
    return TokenParts(_AllValid(_EvaEmbed(vit)), layers, head, readout=readout)


def _angles(vit: Any) -> Tensor:
    """Sines and cosines of each patch."""
    rope = vit.rope
    if getattr(rope, "feat_shape", None) is not None:
        angles_TE: Tensor = rope.get_embed()
    else:
        angles_TE = rope.get_embed(shape=vit.patch_embed.grid_size)
    return angles_TE


class _EvaEmbed(_TimmEmbed):
    """The part of timm's Eva before its blocks; first tokens are not rotated."""

    def __init__(self, vit: Any) -> None:
        super().__init__(vit)
        self.rope = vit.rope

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = super().forward(images_BCHW)
        angles_TE = _angles(self)
        first_TE = torch.zeros_like(angles_TE[:1])
        first_TE[:, angles_TE.shape[1] // 2 :] = 1
        num_firsts = x_BTD.shape[1] - angles_TE.shape[0]
        angles_TE = torch.cat([first_TE.expand(num_firsts, -1), angles_TE])
        return torch.cat([x_BTD, angles_TE.expand(x_BTD.shape[0], -1, -1)], 2)


class _WithoutAngles(nn.Module):
    """A norm on the coordinates of tokens that carry rotations behind them."""

    def __init__(self, norm: nn.Module, *, num_angles: int) -> None:
        super().__init__()
        self.norm = norm
        self._num_angles = num_angles

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x[..., : -self._num_angles])
        return y


def _torchvision(vit: Any) -> TokenParts:
    layers = tuple(map(TorchvisionLayer, vit.encoder.layers))
    head = nn.Sequential(vit.encoder.ln, vit.heads)
    return TokenParts(_AllValid(_TorchvisionEmbed(vit)), layers, head)


class _TorchvisionEmbed(nn.Module):
    """The part of torchvision's VisionTransformer before its layers."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.conv_proj, self.class_token = vit.conv_proj, vit.class_token
        self.pos_embedding, self.dropout = vit.encoder.pos_embedding, vit.encoder.dropout

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = self.conv_proj(images_BCHW).flatten(2).transpose(1, 2)
        x_BTD = torch.cat([self.class_token.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        y_BTD: Tensor = self.dropout(x_BTD + self.pos_embedding)
        return y_BTD


def _vit(name: str) -> Callable[[Any], TokenParts]:
    """Take apart transformers' ViT and its kin, which answer by the class token."""

    def describe(model: Any) -> TokenParts:
        vit = getattr(model, name)
        head = nn.Sequential(vit.layernorm, model.classifier)
        return _of_vit(vit.embeddings, vit.layers, head, None)

    return describe


def _of_vit(
    embed: nn.Module,
    layers: Iterable[Any],
    head: nn.Module,
    readout: Readout | None,
    kind: Callable[[Any], TransformerLayer] = ViTLayer,
) -> TokenParts:
    return TokenParts(_AllValid(embed), tuple(map(kind, layers)), head, readout=readout)


def _deit_with_teacher(model: Any) -> TokenParts:
    vit = model.deit
    head = _MeanOfTwo(model.cls_classifier, model.distillation_classifier)
    return _of_vit(vit.embeddings, vit.layers, head, Readout(vit.layernorm, firsts=2))


def _ast(model: Any) -> TokenParts:
    ast = model.audio_spectrogram_transformer
    head = nn.Sequential(_HalfSum(), model.classifier)
    return _of_vit(ast.embeddings, ast.layers, head, Readout(ast.layernorm, firsts=2))


class _HalfSum(nn.Module):
    def forward(self, answer_BA: Tensor) -> Tensor:
        first_BD, second_BD = answer_BA.chunk(2, dim=1)
        return (first_BD + second_BD) / 2


def _beit(model: Any) -> TokenParts:
    beit = model.beit
    biased = [beit.shared_position_bias, *(layer.relative_position_bias for layer in beit.layers)]
    if any(bias is not None for bias in biased):
        raise BackboneCutError(
            "Expected a BEiT without a bias by position on its attention "
            "(use_relative_position_bias=False), which tokens that are dropped would shift. Got "
            "one: use absolute positions, or a ViT."
        )
    norm = beit.pooler.layernorm
    if norm is None:
        head = nn.Sequential(beit.layernorm, model.classifier)
        return _of_vit(beit.embeddings, beit.layers, head, None)
    readout = Readout(beit.layernorm, firsts=0, mean_from=1)
    return _of_vit(beit.embeddings, beit.layers, nn.Sequential(norm, model.classifier), readout)


def _dinov2(name: str) -> Callable[[Any], TokenParts]:
    def describe(model: Any) -> TokenParts:
        vit = getattr(model, name)
        first = 1 + getattr(model.config, "num_register_tokens", 0)
        readout = Readout(vit.layernorm, firsts=1, mean_from=first)
        layers = vit.encoder.layer
        return _of_vit(vit.embeddings, layers, model.classifier, readout, Dinov2Layer)

    return describe


def _clip(model: Any) -> TokenParts:
    vit = model.vision_model
    embed = nn.Sequential(vit.embeddings, vit.pre_layrnorm)
    readout = Readout(nn.Identity(), firsts=0, mean_from=1)
    return _of_vit(embed, vit.encoder.layers, model.classifier, readout, ClipLayer)


def _siglip(model: Any) -> TokenParts:
    vit = model.vision_model
    readout = Readout(vit.post_layernorm, firsts=0, mean_from=0)
    return _of_vit(vit.embeddings, vit.encoder.layers, model.classifier, readout, ClipLayer)


def _of_text(
    embeddings: nn.Module,
    layers: tuple[TransformerLayer, ...],
    head: Sequence[nn.Module],
    *,
    project: nn.Module | None = None,
) -> TokenParts:
    embed = MaskedEmbed(embeddings, project=project)
    return TokenParts(embed, layers, nn.Sequential(*head), Ragged(mask_index=1))


def _bert(model: Any) -> TokenParts:
    bert = model.bert
    head = (bert.pooler.dense, bert.pooler.activation, model.dropout, model.classifier)
    return _of_text(bert.embeddings, bert_layers(bert), head)


def _roberta(model: Any) -> TokenParts:
    head = model.classifier
    return _of_text(
        model.roberta.embeddings,
        bert_layers(model.roberta),
        (head.dropout, head.dense, nn.Tanh(), head.dropout, head.out_proj),
    )


def _electra(model: Any) -> TokenParts:
    electra, head = model.electra, model.classifier
    return _of_text(
        electra.embeddings,
        bert_layers(electra),
        (head.dropout, head.dense, head.activation, head.dropout, head.out_proj),
        project=getattr(electra, "embeddings_project", None),
    )


def _distilbert(model: Any) -> TokenParts:
    layers = tuple(map(DistilBertLayer, model.distilbert.transformer.layer))
    head = (model.pre_classifier, nn.ReLU(), model.dropout, model.classifier)
    return _of_text(model.distilbert.embeddings, layers, head)


def _albert(model: Any) -> TokenParts:
    albert, encoder = model.albert, model.albert.encoder
    per_group = model.config.num_hidden_layers / model.config.num_hidden_groups
    groups = (int(i / per_group) for i in range(model.config.num_hidden_layers))
    layers = (each for i in groups for each in encoder.albert_layer_groups[i].albert_layers)
    return _of_text(
        albert.embeddings,
        tuple(map(AlbertLayer, layers)),
        (albert.pooler, albert.pooler_activation, model.dropout, model.classifier),
        project=encoder.embedding_hidden_mapping_in,
    )


def bert_layers(bert: Any) -> tuple[BertLayer, ...]:
    """Wrap the layers of a ``BertModel``."""
    return tuple(map(BertLayer, bert.encoder.layer))


class MaskedEmbed(nn.Module):
    """Embeddings of token ids and a mask, or of ids alone, as BERT and its kin have them."""

    def __init__(
        self,
        embeddings: nn.Module,
        pad_id: int | None = None,
        *,
        project: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.project = project or nn.Identity()
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
        types = {} if token_type_ids_BT is None else {"token_type_ids": token_type_ids_BT}
        return self.project(self.embeddings(ids_BT, **types)), is_valid_BT


_KNOWN: Mapping[tuple[str, str], Callable[[Any], TokenParts]] = {
    ("timm", "Eva"): _timm_eva,
    ("timm", "VisionTransformer"): _timm,
    ("timm", "VisionTransformerDistilled"): _timm_distilled,
    ("torchvision", "VisionTransformer"): _torchvision,
    ("transformers", "ASTForAudioClassification"): _ast,
    ("transformers", "AlbertForSequenceClassification"): _albert,
    ("transformers", "BeitForImageClassification"): _beit,
    ("transformers", "BertForSequenceClassification"): _bert,
    ("transformers", "CLIPForImageClassification"): _clip,
    ("transformers", "CamembertForSequenceClassification"): _roberta,
    ("transformers", "DeiTForImageClassification"): _vit("deit"),
    ("transformers", "DeiTForImageClassificationWithTeacher"): _deit_with_teacher,
    ("transformers", "Dinov2ForImageClassification"): _dinov2("dinov2"),
    ("transformers", "Dinov2WithRegistersForImageClassification"): _dinov2("dinov2_with_registers"),
    ("transformers", "DistilBertForSequenceClassification"): _distilbert,
    ("transformers", "ElectraForSequenceClassification"): _electra,
    ("transformers", "RobertaForSequenceClassification"): _roberta,
    ("transformers", "SiglipForImageClassification"): _siglip,
    ("transformers", "ViTForImageClassification"): _vit("vit"),
    ("transformers", "ViTMSNForImageClassification"): _vit("vit"),
    ("transformers", "XLMRobertaForSequenceClassification"): _roberta,
}
"""The function that takes a class apart, by package and name."""
