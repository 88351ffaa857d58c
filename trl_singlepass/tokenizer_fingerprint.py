"""What of a tokenizer decides how text is tokenised, and nothing of what using it changes."""

from __future__ import annotations

import json
from typing import Any

from datasets.fingerprint import Hasher


_SET_BY_USE = ("truncation", "padding")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """
    Return a hash of a tokenizer that stays the same when it is used.

    A fast tokenizer remembers the padding and the truncation of its last call, which would have `datasets` prepare
    everything again.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer.

    Returns:
        `str`: Hash of its vocabulary, rules, special tokens and chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _SET_BY_USE}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    state = (type(tokenizer).__name__, rules, special, tokenizer.chat_template)
    return str(Hasher.hash(json.dumps(state, sort_keys=True)))
