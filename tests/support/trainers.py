"""Trainers on tiny models, stock and single-pass, and what tests read off them."""

import copy
import inspect
from importlib.util import find_spec

import datasets
import pytest
import torch
import transformers
import trl
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from support.conversations import chat, expand
from support.tiny_models import FAMILIES, model_of_type, tiny_model
from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer, SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.data.arrow import COST_COLUMNS
from trl_singlepass.training.config import EngineConfig, SinglePassConfig
from trl_singlepass.trees.rows import ROW_COLUMNS


needs_weighted_loss = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="loss weights reach the loss through the fused head of TRL 1.15"
)


def needs_bitsandbytes(test):
    """Mark a test that `make test-slow` runs, since it installs bitsandbytes."""
    reason = "needs bitsandbytes: pip install trl-singlepass[quantization]"
    return pytest.mark.slow(pytest.mark.skipif(find_spec("bitsandbytes") is None, reason=reason)(test))


needs_cached_states = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="recurrent layers keep their states in the cache since 5.23",
)

SETTINGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "max_steps": 1,
}
# One to three turns each, so that batches of as many conversations hold different numbers of samples.
CONVERSATIONS = [chat(3 - seed % 3, seed) for seed in range(8)]


def as_dataset(rows):
    """Return rows as a dataset; lists of messages become rows with a `messages` column."""
    return datasets.Dataset.from_list([{"messages": row} if isinstance(row, list) else row for row in rows])


def columns_of_rows(dataset):
    """Return the rows of a prepared dataset without the columns that it keeps of what was given."""
    return dataset.select_columns([*ROW_COLUMNS, *COST_COLUMNS])[:]


def float32_model(tokenizer, family="qwen3", attn_implementation="sdpa", **overrides):
    """Return a tiny model of a family or type whose vocabulary and special tokens are the tokenizer's."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    overrides = {"initializer_range": 0.05, **ids, **overrides}
    if family not in FAMILIES:
        return model_of_type(family, vocab_size=len(tokenizer), **overrides).float()
    return tiny_model(family, len(tokenizer), torch.float32, attn_implementation, **overrides)


def own_settings(config):
    """Names of the settings that a configuration adds to TRL's, or whose defaults it changes: shared ones first."""
    shared = [cls for cls in (EngineConfig, SinglePassConfig) if issubclass(config, cls)]
    return list(dict.fromkeys(name for cls in (*shared, config) for name in cls.__annotations__))


def own_classes(trainer):
    """Return the classes of a trainer that this project defines: its own, then what trainers share."""
    return [cls for cls in trainer.__mro__ if cls.__module__.startswith("trl_singlepass.")]


def own_methods(trainer):
    return {name for cls in own_classes(trainer) for name, member in vars(cls).items() if inspect.isfunction(member)}


def overridden(trainer):
    """Names of the methods of other libraries that a trainer overrides, itself or by what trainers share."""
    theirs = [cls for cls in trainer.__mro__ if cls not in own_classes(trainer)]
    return own_methods(trainer) & {name for cls in theirs for name in vars(cls)}


def adapted(model):
    """Return a model with an adapter whose both factors count."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def perturbed(model, scale=0.02):
    """Return a frozen copy of a model with other weights: a reference that differs from the policy."""
    generator = torch.Generator().manual_seed(1)
    other = copy.deepcopy(model).requires_grad_(requires_grad=False)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter += scale * noise.to(parameter.dtype)
    return other.eval()


def in_four_bits(model, folder, **options):
    """Return a model with 4-bit weights; computations stay in float32."""
    import bitsandbytes  # takes seconds, and most runs do not need it

    # On CPUs with AVX512-BF16, bitsandbytes repacks weights for inference and rounds their scales to bf16.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    model.save_pretrained(folder)
    options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    return type(model).from_pretrained(folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})


class OwnLoss(SinglePassSFTTrainer):
    """Computes the loss itself, from the model's logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        targets = inputs["labels"][:, 1:].flatten()
        loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets, reduction="sum") / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # of which the engine takes the mean
        return (loss, outputs) if return_outputs else loss


def single_pass_trainer(tmp_path, tokenizer, dataset, model=None, config=SinglePassSFTConfig, kwargs=None, **settings):
    """Return a single-pass trainer on a dataset or on rows."""
    return _trainer(SinglePassSFTTrainer, config, tmp_path, tokenizer, dataset, model, kwargs, settings)


def stock_trainer(tmp_path, tokenizer, dataset, model=None, kwargs=None, **settings):
    """Return TRL's trainer on a dataset or on rows."""
    settings = {"max_length": None, **settings}
    return _trainer(SFTTrainer, SFTConfig, tmp_path, tokenizer, dataset, model, kwargs, settings)


def dpo_trainer(tmp_path, tokenizer, pairs, model=None, ref_model=None, kwargs=None, **settings):
    """Return a single-pass DPO trainer on a copy of a model; a policy without adapters gets a perturbed reference."""
    kind = SinglePassDPOTrainer, SinglePassDPOConfig
    return _dpo_trainer(kind, tmp_path, tokenizer, pairs, model, ref_model, kwargs, settings)


def stock_dpo_trainer(tmp_path, tokenizer, pairs, model=None, ref_model=None, kwargs=None, **settings):
    """The same of TRL."""
    settings = {"max_length": None, **settings}
    return _dpo_trainer((DPOTrainer, DPOConfig), tmp_path, tokenizer, pairs, model, ref_model, kwargs, settings)


def _dpo_trainer(kind, tmp_path, tokenizer, pairs, model, ref_model, kwargs, settings):
    model, kwargs = copy.deepcopy(float32_model(tokenizer) if model is None else model), kwargs or {}
    if ref_model is None and not isinstance(model, PeftModel) and "peft_config" not in kwargs:
        ref_model = perturbed(model)
    kwargs = {"ref_model": copy.deepcopy(ref_model), **kwargs}
    return _trainer(*kind, tmp_path, tokenizer, pairs, model, kwargs, settings)


def _trainer(trainer_class, config_class, tmp_path, tokenizer, dataset, model, kwargs, settings):
    return trainer_class(
        model=float32_model(tokenizer) if model is None else model,
        args=config_class(str(tmp_path), **{**SETTINGS, **settings}),
        train_dataset=as_dataset(dataset) if isinstance(dataset, list) else dataset,
        processing_class=tokenizer,
        **(kwargs or {}),
    )


class Expanded(SFTTrainer):
    """A stock trainer whose batches hold all samples of the conversations in a batch of the single pass."""

    turns_per_batch = None

    def get_train_dataloader(self):
        batches, start = [], 0
        for turns in self.turns_per_batch:
            batches.append(list(range(start, start + turns)))
            start += turns
        dataset = self._remove_unused_columns(self.train_dataset, description="training")
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator))


def in_order(tmp_path, tokenizer, model, conversations=CONVERSATIONS, evaluation=None, kwargs=None, **settings):
    """Return the single-pass trainer of a copy of a model that keeps the order of the conversations."""
    kwargs = {"eval_dataset": as_dataset(evaluation) if evaluation else None, **(kwargs or {})}
    settings = {"max_length": None, "train_sampling_strategy": "sequential", **settings}
    return single_pass_trainer(tmp_path, tokenizer, conversations, copy.deepcopy(model), kwargs=kwargs, **settings)


def on_samples(tmp_path, tokenizer, model, samples, evaluation=None, kwargs=None, **settings):
    """
    Return stock `SFTTrainer` of a copy of a model for the samples of each conversation, evaluating all in one batch.

    `samples` are lists of rows, one per conversation.
    """
    rows = as_dataset([row for of_one in samples for row in of_one])
    kwargs = {"eval_dataset": as_dataset(evaluation) if evaluation else None, **(kwargs or {})}
    settings = {"max_length": None, "per_device_eval_batch_size": 1000, **settings}
    trainer = _trainer(Expanded, SFTConfig, tmp_path, tokenizer, rows, copy.deepcopy(model), kwargs, settings)
    size = settings["per_device_train_batch_size"]
    trainer.turns_per_batch = [sum(map(len, samples[start : start + size])) for start in range(0, len(samples), size)]
    return trainer


def train_both_on_pairs(tmp_path, tokenizer, model, pairs, own=None, **settings):
    """Train copies of a model on pairs, stock and in a single pass; return both trainers."""
    stock = stock_dpo_trainer(tmp_path, tokenizer, pairs, model, **settings)
    ours = dpo_trainer(tmp_path, tokenizer, pairs, model, **settings, **(own or {}))
    for trainer in (stock, ours):
        trainer.train()
    return stock, ours


def train_both(tmp_path, tokenizer, model, own=None, evaluation=(), **settings):
    """Train copies of a model both ways on the same conversations per step; return both trainers."""
    settings = {"per_device_train_batch_size": 8, **settings}
    evaluated = [sample for messages in evaluation for sample in expand(messages)]
    stock = on_samples(tmp_path, tokenizer, model, list(map(expand, CONVERSATIONS)), evaluated, **settings)
    ours = in_order(tmp_path, tokenizer, model, evaluation=evaluation, **settings, **(own or {}))
    for trainer in (stock, ours):
        trainer.train()
    return stock, ours


def assert_trained_alike(stock, ours, start, keys=("loss", "grad_norm"), tolerance=1e-6, least_move=1000, rel=1e-4):
    """Assert that trainers moved a model alike, and far more than the tolerance, and that they logged the same."""
    assert largest_difference(stock, ours) <= tolerance
    after = parameters(stock)
    moves = [float((after[name] - p.detach()).abs().max()) for name, p in start.named_parameters() if name in after]
    assert max(moves, default=0) >= least_move * tolerance
    for key in keys:
        assert logged(ours, key) == pytest.approx(logged(stock, key), rel=rel, abs=rel / 10), key


def parameters(trainer):
    """Return a copy of the model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def largest_difference(trainer, other):
    """Return the largest difference of a parameter between two trainers' models."""
    ours, theirs = parameters(trainer), parameters(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def logs(trainer):
    """Return all that a trainer logged, without what a clock measured."""
    clocks = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(clocks)}
        for entry in trainer.state.log_history
    ]


def logged(trainer, key):
    """Return the values that a trainer logged under a key, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
