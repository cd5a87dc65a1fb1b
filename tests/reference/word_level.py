"""A tokenizer of a few words, as tokenizers writes it to tokenizer.json."""

import json
from collections.abc import Mapping


def word_level(vocabulary: Mapping[str, int]) -> str:
    return json.dumps(
        {
            "version": "1.0",
            "pre_tokenizer": {"type": "Whitespace"},
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": "[UNK]"},
        }
    )
