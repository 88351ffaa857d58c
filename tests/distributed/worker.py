"""
Train a tiny model for a few steps and write down what happened; one process of a distributed test.

Usage: `worker.py SETTINGS.json RESULT.json`, under `torchrun`, `accelerate launch` or alone.
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

SETTINGS = json.loads(Path(sys.argv[1]).read_text())

if SETTINGS.get("fsdp_on_cpu"):
    # accelerate offers FSDP2 to GPUs only; on CPU it would silently train without it.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import datasets
import torch
import transformers
from chat_tokenizers import make_tokenizer
from conversations import chat, tool_chat
from peft import LoraConfig
from training import SETTINGS as COMMON
from training import as_dataset, float32_model

from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer


def conversations():
    """Conversations of unequal length, so that the rows of two ranks differ in length and in number of targets."""
    return [chat(1 + seed % 4, seed=seed) if seed % 5 else tool_chat() for seed in range(12)]


def build_trainer(output_dir):
    """Return the trainer that the settings describe."""
    tokenizer = make_tokenizer("qwen3")
    # Before the config: a DeepSpeed config makes transformers partition models as they are made, from here on.
    model = float32_model(tokenizer, num_attention_heads=4, num_key_value_heads=2)
    config = SinglePassSFTConfig(
        str(output_dir),
        **{
            **COMMON,
            "max_steps": 6,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 1.0,
            "dataloader_pin_memory": False,
            "seed": 0,
            **SETTINGS.get("config", {}),
        },
    )
    lora = LoraConfig(r=4, init_lora_weights=True) if SETTINGS.get("lora") else None
    return SinglePassSFTTrainer(
        model, config, train_dataset=as_dataset(conversations()), processing_class=tokenizer, peft_config=lora
    )


def main():
    """Train and write the result of rank 0."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.set_seed(0)
    result_path = Path(sys.argv[2])
    trainer = build_trainer(result_path.parent / "out")
    trainer.train(resume_from_checkpoint=SETTINGS.get("resume"))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        torch.save({name: value.cpu() for name, value in state.items()}, result_path.with_suffix(".pt"))
        history = trainer.state.log_history
        result = {
            "world_size": trainer.accelerator.num_processes,
            "distributed_type": str(trainer.accelerator.distributed_type),
            "engine": type(trainer.model_wrapped).__name__,
            **{key: [entry[key] for entry in history if key in entry] for key in ("loss", "grad_norm", "num_tokens")},
            "num_trained_tokens": [e["num_trained_tokens"] for e in history if "num_trained_tokens" in e],
        }
        result_path.write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


main()
sys.stdout.flush()
sys.stderr.flush()
# gloo's threads may abort a process that ends the ordinary way, after all has been done.
os._exit(0)
