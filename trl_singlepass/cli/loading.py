"""Loads what the command line names: tokenizer or processor, configuration, model. Errors are `ValueError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import is_offline_mode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
    logging,
)

from ..data.reader import check_renders
from ..trees.errors import first_line


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(
    model: str, *, chat_template: str | None = None, trust_remote_code: bool = False, reads_images: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Return the tokenizer of a model, or its processor, with the template of the file `chat_template` if given."""
    with _naming(model):
        auto_class = AutoProcessor if reads_images else AutoTokenizer
        loaded = auto_class.from_pretrained(model, trust_remote_code=trust_remote_code)
    if reads_images and not isinstance(loaded, ProcessorMixin):
        raise ValueError(f"The data has images, and {model} has no processor that reads them. Name a model that does.")
    check_renders(loaded)
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"There is no file {chat_template}. --chat_template takes a file with a Jinja template.")
        loaded.chat_template = Path(chat_template).read_text("utf-8")
    if loaded.chat_template is None:
        what = "processor" if reads_images else "tokenizer"
        raise ValueError(f"The {what} of {model} has no chat template. Give one with --chat_template FILE.")
    return loaded


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """Return the configuration of a model, or `None` for a folder with a tokenizer only."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None
    with _naming(model):
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)


def load_model(
    model: str,
    *,
    dtype: str,
    attn_implementation: str | None,
    device: str | None,
    trust_remote_code: bool = False,
    reads_images: bool = False,
) -> PreTrainedModel:
    """Return a language model, in training mode, from a folder or the Hub."""
    auto_class = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    with _naming(model):
        loaded = auto_class.from_pretrained(
            model, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    return loaded.to(pick_device(device)).train()


def load_slice(
    model: str,
    device: torch.device,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    *,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Return the first layers of a model, those that its `config` has; missing weights raise `ValueError`."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hides the table of the weights that are not loaded: those of the other layers
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"{model} has no weights for {', '.join(sorted(info['missing_keys'])[:4])}.")
    return loaded.to(device)


def pick_device(name: str | None) -> torch.device:
    """Return the device of a name; without one, a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Raise errors of loading as a `ValueError` that names the model."""
    try:
        yield
    except Exception as error:  # the Hub client raises many kinds
        if Path(model).is_dir():
            code = " --trust_remote_code runs it." if "trust_remote_code" in str(error) else ""
            raise ValueError(f"{model} cannot be loaded: {first_line(error)}{code}") from error
        reason = "the Hub cannot be reached, and it is not in the cache." if is_offline_mode() else first_line(error)
        raise ValueError(
            f"{model} cannot be loaded: {reason} Expected a folder with a model, or the id of one on the Hub."
        ) from error
