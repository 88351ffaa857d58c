"""Fingerprint of a tokenizer or processor: part of the name under which `datasets` caches prepared rows."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, ProcessorMixin


# A serialised tokenizer begins with its version and with the truncation and padding of its last call.
_AFTER_LAST_CALL = '"added_tokens"'
# Rules of fast tokenizers by the tokenizer: its backend, the state in which that was hashed, and the hash.
_hashed_rules: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, object, str]] = WeakKeyDictionary()
_PROBE = "The quick brown fox, 3.14 × 2026!\n\n\tdef f(x): return x  # Größe, 日本語, привет 🙂"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    Return a hash of a tokenizer or processor that does not change when it is used.

    A fast tokenizer remembers the padding and truncation of its last call, which would make `datasets` prepare
    everything again. The hash covers vocabulary, rules, special tokens and chat template; of a processor, its settings
    too.
    """
    if isinstance(tokenizer, ProcessorMixin):
        of_tokenizer = tokenizer_fingerprint(tokenizer.tokenizer)
        return str(Hasher.hash((of_tokenizer, tokenizer.to_json_string(), tokenizer.chat_template)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: object = sorted(tokenizer.get_vocab().items()) if backend is None else _hash_rules(tokenizer, backend)
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return str(Hasher.hash((type(tokenizer).__name__, rules, special, tokenizer.chat_template)))


def _hash_rules(tokenizer: PreTrainedTokenizerBase, backend: Any) -> str:
    """Return a hash of all rules of a fast tokenizer; one that is known is used again, since it takes 0.1 seconds."""
    # The model, by far the largest part, is told by its size and by what it does.
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    state = (
        *(part and part.__getstate__() for part in parts),
        (backend.encode_special_tokens, backend.get_vocab_size(False), repr(backend.get_added_tokens_decoder())),
        backend.encode(_PROBE, add_special_tokens=False).ids,
    )
    known, known_state, found = _hashed_rules.get(tokenizer, (None, None, ""))
    if known is not backend or known_state != state:
        serialised: str = backend.to_str()
        found = str(Hasher.hash(serialised[max(serialised.find(_AFTER_LAST_CALL), 0) :]))
        _hashed_rules[tokenizer] = backend, state, found
    return found
