"""Makes commands fail fast without a network: only cached models and datasets can be loaded then."""

from __future__ import annotations

import os
from pathlib import Path


_TIMEOUT = 2.0  # seconds
_MODEL_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")


def check_hub(model: str | None, data: str | None) -> None:
    """
    Refuse a model that cannot be loaded, and switch the libraries to offline mode if the Hub does not answer.

    Left to themselves, they try again for each file of a model, for most of a minute. Processes that are started later
    are offline too.

    `model` is a folder or a hub id, `data` a file, a folder or a hub id. If the model is neither, or the Hub does not
    answer and it is not cached, this raises `ValueError`.
    """
    on_hub = [name for name in (model, data) if name is not None and not Path(name).expanduser().exists()]
    if not on_hub:
        return
    # Imported only now: neither `--help` nor local files need it.
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    if model not in on_hub:
        return
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(f"{model} cannot be loaded: it is neither a folder nor the id of a model.") from error
    if constants.HF_HUB_OFFLINE and not any(
        isinstance(try_to_load_from_cache(model, file), str) for file in _MODEL_FILES
    ):
        raise ValueError(
            f"{model} cannot be loaded: it is neither a folder nor in the cache, and the Hub does not answer or "
            "HF_HUB_OFFLINE is set."
        )


def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception:  # the HTTP library of huggingface_hub, and so the type of the exception, depends on its version
        return False
    return True
