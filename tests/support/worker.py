"""
One process of a distributed test: train a tiny model for a few steps and write the results to a file.

Usage: `worker.py SETTINGS.json`, alone or under `torchrun`, `accelerate launch` or `deepspeed`; the fork
server calls `main`. Settings: `result` (a path without suffix), `config` (arguments of the trainer's config), and what
the functions below read.
"""

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import datasets
import torch
import transformers
import trl
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedSequenceParallelConfig, DistributedType
from packaging.version import Version
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from support.adapters import adapted
from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from support.drifting_layers import DRIFTING
from support.float64_comparison import in_float64, recompute_in_float64
from support.groups import GRPO, RLOO, as_prompts, image_prompts, reward
from support.image_chats import image_collator, image_rows, image_sample_sets
from support.image_models import image_model
from support.pairs import pair
from support.planted_layers import plant
from support.rollouts import Scripted, StockGRPO, StockRLOO
from support.screens import examples_of, some_pairs
from support.tiny_models import FAMILIES, model_of_type, tiny_model
from support.tiny_multimodal import model_for
from support.tiny_vision import tiny_vision_model
from support.trainers import SETTINGS as COMMON
from support.trainers import OwnLoss, as_dataset, float32_model, in_four_bits, logged, perturbed
from trl_singlepass import (
    ServedRollout,
    SinglePassDPOConfig,
    SinglePassDPOTrainer,
    SinglePassSFTConfig,
    SinglePassSFTTrainer,
)
from trl_singlepass.engine import pieces, ulysses, waves
from trl_singlepass.engine.check.checked_model import TreeCheckError
from trl_singlepass.training import loss as training_loss
from trl_singlepass.training.checkpoints import last_good_checkpoint
from trl_singlepass.training.preemption import PreemptionCallback


def offer_fsdp_on_cpu():
    """Make accelerate wrap models in FSDP2 without a GPU; unpatched, it would silently train without."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # FSDP pins parameters in CPU memory


def without_compiled_communication():
    """Keep DeepSpeed from compiling its extension for ranks on one CPU: gloo needs neither it nor a compiler."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def let_deepspeed_train_in_float64():
    """
    Keep ZeRO-1 from accumulating gradients in float32, the type that it assumes for any such model, and ZeRO-3 from
    refusing float64: it partitions parameters in the type that they have, and checks another one.
    """
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    engine.get_data_types = lambda _: (torch.float64, torch.float64)
    partitioned = importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init
    set_dtype = partitioned._set_dtype
    partitioned._set_dtype = lambda self, config, dtype: set_dtype(
        self, config, torch.float32 if dtype is torch.float64 else dtype
    )


def training_conversations():
    """Conversations of unequal length, so that the rows of two ranks differ in length and in number of targets."""
    return [chat(1 + seed % 4, seed=seed) if seed % 5 else tool_chat() for seed in range(12)]


def evaluation_conversations():
    """Five conversations: on two ranks, the last one on the second rank is a repetition."""
    return [chat(1 + seed, seed=20 + seed) for seed in range(5)]


def parallelism(sp_size):
    """Return the configuration of sequence parallelism."""
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    groups = int(os.environ["WORLD_SIZE"]) // sp_size
    return accelerate.ParallelismConfig(
        sp_backend="deepspeed", sp_size=sp_size, dp_shard_size=groups, sp_handler=handler
    )


def of_rank(folder):
    return folder / f"model{os.environ.get('RANK')}"


def reloaded(model, folder, **options):
    """Save a model and return it as it is loaded."""
    model.save_pretrained(of_rank(folder))
    return type(model).from_pretrained(of_rank(folder), dtype=model.dtype, **options)


def set_adapter(model):
    """Initialize an adapter's first factors the same way however its layers are sharded."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


def build_model(settings):
    """Return a model, before there is a DeepSpeed config to partition it by, and its tokenizer or processor."""
    own, family, tokenizer = settings.get("model", {}), settings.get("family", "qwen3"), make_tokenizer("qwen3")
    if "screens" in settings:
        model, tokenizer = tiny_vision_model(settings["screens"])
    elif "image_family" in settings:
        model = image_model(settings["image_family"], torch.float64 if settings.get("float64") else torch.float32)
        if settings.get("frozen_encoder"):
            model.model.visual.requires_grad_(False)
    elif "class_name" in settings:
        model = model_for(settings["class_name"], tokenizer)
    elif family == "qwen3":
        model = float32_model(tokenizer, **own)
    elif family in FAMILIES:
        model = tiny_model(family, len(tokenizer), torch.float32, attn_implementation="eager", **own)
    else:
        model = model_of_type(family, vocab_size=len(tokenizer), **own).float()
    if "planted" in settings:
        plant(model, DRIFTING.get(settings["planted"], settings["planted"]))
    if "adapter" in settings:
        model = adapted(settings["adapter"], model)
    return model, tokenizer


SEEN = Counter()
"""How often this rank trained each token as a target."""


class Counting(SinglePassSFTTrainer):
    """Counts the targets that this rank trains."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        SEEN.update(inputs["labels"][inputs["labels"] != -100].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


OWN = {"own loss": OwnLoss, "counting": Counting}
TRAINERS = {  # stock, then those of this project
    "sft": ((SFTTrainer, SFTConfig), (SinglePassSFTTrainer, SinglePassSFTConfig)),
    "pairs": ((DPOTrainer, DPOConfig), (SinglePassDPOTrainer, SinglePassDPOConfig)),
    "grpo": GRPO,
    "rloo": RLOO,
    "grpo on requests": ((StockGRPO, GRPO[0][1]), GRPO[1]),
    "rloo on requests": ((StockRLOO, RLOO[0][1]), RLOO[1]),
}


def more_on_later_ranks(messages):
    """Ask each rank for one request more than the one before it."""
    asked = sum(message["role"] == "assistant" for message in messages)
    return [{"role": "user", "content": "And now?"}] if asked <= PartialState().process_index else []


def model_and_data(settings):
    """Return a model, its tokenizer or processor, and the arguments of the trainer that say what it trains on."""
    model, processor = build_model(settings)
    folder = folder_of(settings)
    if "image_family" in settings:
        rows = image_rows(image_sample_sets(model))
        return model, processor, {"data_collator": image_collator(model), "train_dataset": rows}
    if "groups" in settings:  # TRL loads the reference from the folder of the model
        if "screens" in settings:
            processor.tokenizer.padding_side = "left"
        prompts = image_prompts() if "screens" in settings else as_prompts()
        data = {"train_dataset": prompts, "reward_funcs": reward}
        if "requests" in settings["groups"]:
            data["rollout_func"] = ServedRollout(reply=more_on_later_ranks) if "served" in settings else Scripted()
        return reloaded(model, folder), processor, data
    if "screens" in settings:
        rows = some_pairs(folder) if "pairs" in settings else examples_of(settings["screens"])
        return model, processor, {"train_dataset": as_dataset(rows)}
    if settings.get("pairs"):
        pairs = [pair(1 + seed % 3, seed) for seed in range(12)]
        if settings["pairs"] is True:
            return model, processor, {"train_dataset": as_dataset(pairs)}
        files = {"data_files": settings["pairs"], "cache_dir": str(folder / "cache")}  # which the ranks share
        return model, processor, {"train_dataset": datasets.load_dataset("json", split="train", **files)}
    dataset = as_dataset(settings.get("rows") or training_conversations()[: settings.get("num_rows")])
    if "num_shards" in settings:
        dataset = dataset.to_iterable_dataset(settings["num_shards"])
    evaluation = settings.get("evaluate")
    if evaluation:
        evaluation = as_dataset(evaluation_conversations() if evaluation is True else evaluation)
    return model, processor, {"train_dataset": dataset, "eval_dataset": evaluation}


def folder_of(settings):
    return Path(settings["result"]).parent


def build_trainer(settings):
    """Return the trainer that the settings describe."""
    model, processor, data = model_and_data(settings)
    if settings.get("float64"):
        model.double()
    folder = folder_of(settings)
    if settings.get("four_bits"):  # stored in the type of the other weights, as FSDP demands
        model = in_four_bits(model, of_rank(folder), bnb_4bit_quant_storage=torch.float32)
    if "divided" in settings:  # transformers shards layers among ranks as it loads them
        from transformers.distributed.configuration_utils import DistributedConfig

        sizes = {"attn_implementation": model.config._attn_implementation}
        model = reloaded(model, folder, distributed_config=DistributedConfig(**settings["divided"]), **sizes)
    config = {
        **COMMON,
        "max_steps": 4,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 1.0,
        "dataloader_pin_memory": False,
        "log_turn_metrics": Version(trl.__version__) >= Version("1.15"),
        "seed": 0,
        **settings.get("config", {}),
    }
    if "sp_size" in settings:
        config["parallelism_config"] = parallelism(settings["sp_size"])
    lora = settings.get("lora")  # layers, or `True` for those that PEFT chooses
    peft_config = LoraConfig(r=4, target_modules=None if lora is True else lora) if lora else None
    kind = settings.get("groups", "pairs" if settings.get("pairs") else "sft")
    if kind != "sft":
        del config["log_turn_metrics"]
    if kind == "pairs":
        data["ref_model"] = None if peft_config or "adapter" in settings else perturbed(model)
    trainer_class, config_class = TRAINERS[kind][not settings.get("stock")]
    args = config_class(str(folder / "out"), **config)
    if "groups" in settings and "deepspeed" in config:
        # On a CPU, accelerate leaves that until after the reference has been divided.
        importlib.import_module("deepspeed").init_distributed("gloo")
    trainer_class = OWN.get(settings.get("trainer"), trainer_class)
    return trainer_class(model, args=args, processing_class=processor, peft_config=peft_config, **data)


def untrained(example, index, silent_rows):
    """Return a prepared row, without targets if its index is among the silent rows."""
    if index in silent_rows:
        example["token_parts"] = [0] * len(example["token_parts"])
        example["token_weights"] = []
    return example


class Undeletable(dict):
    """Names that stay."""

    def __delitem__(self, name):
        pass


def cut(wire):
    """Break one part of sequence parallelism, to see that the test notices."""
    if wire == "overcounting":
        for module in (ulysses, pieces, training_loss):
            module.get_gradient_scale = lambda *_: 1
    if wire == "exchange":  # DeepSpeed's own stays
        ulysses.ALL_ATTENTION_FUNCTIONS = Undeletable(ulysses.ALL_ATTENTION_FUNCTIONS)
    if wire == "tree_of_attention":
        waves.running_on = lambda tree: nullcontext(tree)


def count_exchanged_bytes():
    """Count the bytes that this rank sends when ranks that share a row exchange tokens for heads."""
    exchange, sent = torch.distributed.all_to_all_single, [0]

    def count_and_exchange(output, tensor, *args, **kwargs):
        size = torch.distributed.get_world_size(kwargs.get("group"))
        sent[0] += tensor.numel() * tensor.element_size() * (size - 1) // size if tensor.dim() > 3 else 0
        return exchange(output, tensor, *args, **kwargs)

    torch.distributed.all_to_all_single = count_and_exchange
    return sent


def of_all_ranks(value):
    """Return the value of every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def keep_the_head_in_float64():
    """Enter the float64 context in the backward of TRL's fused head: autograd runs it outside of any context."""
    head = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    head.backward = staticmethod(in_float64(head.backward))


class RecomputeInFloat64(TrainerCallback):
    """Keeps gradient checkpointing in float64, where it is on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.gradient_checkpointing:
            recompute_in_float64(model)


class Accident(TrainerCallback):
    """A failure of one rank: at the end of a step, or `delay` step durations later, two steps later at the latest."""

    def __init__(self, kind, step, rank=0, delay=0.0):
        self.kind, self.step, self.rank, self.delay = kind, step, rank, delay

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index != self.rank:
            return
        if state.global_step == self.step and self.delay:
            threading.Timer(self.delay * (time.monotonic() - self.began), self.happen).start()
        elif state.global_step == self.step + (2 if self.delay else 0):
            self.happen()

    def happen(self):
        if self.kind == "full disk":  # what a process sees of it: a write fails halfway through a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        elif self.kind == "SIGKILL in saving":
            torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))


def summary(trainer):
    """Return metrics of the run and the engine that trained it."""
    history = trainer.state.log_history
    keys = ("loss", "grad_norm", "num_tokens", "num_trained_tokens", "num_waves", "aux_loss", "reward")
    return {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "tp_size": trainer.get_tp_size(),
        "row_tokens": len(next(iter(trainer.train_dataset)).get("input_ids", ())),
        "engine": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        **{key: [float(entry[key]) for entry in history if key in entry] for key in keys},
        "requests": logged(trainer, "rollouts/requests"),
        "by_turn": [
            {name: value for name, value in entry.items() if "/" in name} for entry in history if "loss" in entry
        ],
    }


def run(trainer, *, expects_refusal):
    """Train; return the error that refuses the model, if one is expected."""
    try:
        trainer.train(resume_from_checkpoint=last_good_checkpoint(trainer.args.output_dir))
    except TreeCheckError as error:
        if not expects_refusal:
            raise
        return str(error)
    return None


def train(settings):
    """Train; rank 0 writes the result."""
    cut(settings.get("break"))
    exchanged = count_exchanged_bytes() if settings.get("count_exchange") else [0]
    trainer = build_trainer(settings)
    if "silent_rows" in settings:
        silent = {"silent_rows": settings["silent_rows"]}
        trainer.train_dataset = trainer.train_dataset.map(untrained, with_indices=True, fn_kwargs=silent)
    if settings.get("same_adapter"):
        set_adapter(trainer.model)
    if settings.get("four_bits"):
        for parameter in trainer.model.parameters():  # TRL's bfloat16 would blur the comparison
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    preemption = PreemptionCallback()
    trainer.add_callback(preemption)
    if settings.get("float64"):
        trainer.add_callback(RecomputeInFloat64())
    if "accident" in settings:
        trainer.add_callback(Accident(**settings["accident"]))
    refused = run(trainer, expects_refusal=bool({"planted", "adapter"} & settings.keys()))
    if preemption.was_preempted:
        return
    evaluation = trainer.evaluate() if settings.get("evaluate") else {}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # ZeRO-3 gathers it on rank 0
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    seen, waves = of_all_ranks(sorted(SEEN.items())), of_all_ranks(logged(trainer, "num_waves"))
    if trainer.accelerator.is_main_process:
        result = Path(settings["result"])
        torch.save({name: value.cpu() for name, value in state.items()}, result.with_suffix(".pt"))
        found = {"evaluation": evaluation, "exchanged": exchanged[0], "refused": refused}
        found |= {**summary(trainer), "seen": seen, "waves_by_rank": waves}
        result.with_suffix(".json").write_text(json.dumps(found))


def main(settings):
    """Train with these settings, alone or as one of several processes."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.set_seed(0)
    if settings.get("fsdp_on_cpu"):
        offer_fsdp_on_cpu()
    if "deepspeed" in settings.get("config", {}) or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        without_compiled_communication()
        if settings.get("float64"):
            let_deepspeed_train_in_float64()
    if settings.get("float64"):
        torch.set_default_dtype(torch.float64)
        keep_the_head_in_float64()
    trains = in_float64(train) if settings.get("float64") else train
    trains(settings)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort an ordinary exit after everything is done.
    os._exit(0)
