"""Makes commands fail fast without a network: only cached models and datasets can be loaded then."""

from __future__ import annotations

import os
from pathlib import Path


_TIMEOUT = 2.0  # seconds
_MODEL_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")


def check_hub(model: str | None, data: str | None) -> None:
    """
    Refuse a model that cannot be loaded with `ValueError`, and go offline if the Hub does not answer.

    Left to themselves, libraries try again for each file of a model, for most of a minute. Processes that are started
    later are offline too.
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
