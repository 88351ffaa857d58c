"""What of a tokenizer decides how text is tokenised, and nothing of what using it changes."""

from __future__ import annotations

from typing import Any

from datasets.fingerprint import Hasher


# A serialised tokenizer begins with its version, and the truncation and padding of its last use.
_AFTER_LAST_USE = '"added_tokens"'


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
        serialised = backend.to_str()
        rules = serialised[max(serialised.find(_AFTER_LAST_USE), 0) :]
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return str(Hasher.hash((type(tokenizer).__name__, rules, special, tokenizer.chat_template)))
