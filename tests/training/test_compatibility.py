"""What a single pass cannot honour: each refused by name, with the way out, before it costs anything."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from accelerate.utils import DistributedType
from peft import AdaptionPromptConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from support.conversations import chat, tool_chat
from support.pairs import SINGLE_TURNS
from support.tiny_causal_lms import tiny_model
from support.tiny_multimodal import tiny_conditional
from support.trainers import SETTINGS, as_dataset, float32_model, largest_difference, single_pass_trainer
from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer, SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.engine.enable import UnsupportedModelError, check_model
from trl_singlepass.training.compatibility import (
    check_engine,
    check_loss_is_per_token,
    check_parallelism,
    check_sequence_parallelism,
    check_tensor_parallelism,
    check_weights_reach_the_loss,
)


pytestmark = pytest.mark.filterwarnings(
    # Deprecations of TRL and transformers that a user who sets these arguments sees in stock training as well.
    "ignore:.*(is|are) deprecated.*:FutureWarning",
)
TINY = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16}
CHATS = [chat(3), chat(2, seed=1), tool_chat()]


def test_a_loss_that_the_model_divides_is_refused(monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    check_loss_is_per_token(model, accepts_loss_kwargs=False)
    monkeypatch.setattr(trl, "__version__", "1.14.0")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel divides its loss by the tokens of each batch.*trl>=1\.15"):
        check_loss_is_per_token(model, accepts_loss_kwargs=False)


def test_weights_that_do_not_reach_the_loss_are_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.14.0")
    with pytest.raises(ValueError, match=r"need trl>=1\.15, found 1\.14\.0"):
        check_weights_reach_the_loss(SimpleNamespace(), compute_loss_func=None)


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("Molmo2ForConditionalGeneration", "does not train on text alone: .*mm_token_type_ids.*Load another model"),
        ("GlmImageForConditionalGeneration", "has no head over the tokens that it reads.*Load another model"),
    ],
)
def test_models_that_do_not_train_on_text_are_refused(class_name, message):
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers has no {class_name}")
    with pytest.raises(UnsupportedModelError, match=f"{class_name} {message}"):
        check_model(tiny_conditional(class_name))


def test_a_vocabulary_padded_in_the_embedding_alone_is_accepted():
    if not hasattr(transformers, "Inkling2ForCausalLM"):
        pytest.skip("transformers has no Inkling2ForCausalLM")
    model = tiny_model("inkling2_text", vocab_size=128)
    assert model.get_output_embeddings().out_features < model.get_input_embeddings().num_embeddings
    check_model(model)


def test_images_are_refused(tmp_path, tokenizer):
    rows = [{"messages": chat(1), "images": ["a.png"]}]
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM .*get_image_features"):
        single_pass_trainer(tmp_path, tokenizer, rows)


@pytest.fixture
def no_data_is_prepared(monkeypatch):
    for name in ("training.dataset.prepare_dataset", "preference.trainer.prepare_pairs"):
        monkeypatch.setattr(f"trl_singlepass.{name}", lambda *_, **__: pytest.fail("prepared"))


@pytest.mark.usefixtures("no_data_is_prepared")
def test_adaption_prompts_are_refused_before_the_data_is_read(tmp_path, tokenizer):
    """PEFT keeps the forward that a model has without TRL's fused head: stock trainers stop in their first step."""
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM")
    model = float32_model(tokenizer, "llama")
    with pytest.raises(ValueError, match="AdaptionPromptConfig"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model, kwargs={"peft_config": config})
    with pytest.raises(ValueError, match="AdaptionPromptConfig"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, get_peft_model(model, config))


@pytest.mark.parametrize("role", ["model", "model with adapters", "policy", "reference"])
@pytest.mark.usefixtures("no_data_is_prepared")
def test_a_model_that_is_compiled_already_is_refused(tmp_path, tokenizer, role):
    model = float32_model(tokenizer)
    inside = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if role == "model with adapters" else model
    compiled = torch.compile(inside, backend="eager")
    if role in ("policy", "reference"):
        policy, reference = (compiled, model) if role == "policy" else (model, compiled)
        args, rows = SinglePassDPOConfig(str(tmp_path), **SETTINGS), as_dataset(SINGLE_TURNS)
        make = partial(SinglePassDPOTrainer, policy, reference)
    else:
        args, rows = SinglePassSFTConfig(str(tmp_path), **SETTINGS), as_dataset(CHATS)
        make = partial(SinglePassSFTTrainer, compiled)
    with pytest.raises(ValueError, match="torch_compile=True"):
        make(args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_model_that_is_compiled_in_place_trains_as_one_that_is_not(tmp_path, tokenizer):
    graphs, both = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for is_compiled in (False, True):
        model = float32_model(tokenizer)
        if is_compiled:
            model.compile(backend=count)
        both.append(single_pass_trainer(tmp_path, tokenizer, CHATS, model, max_steps=2))
        both[-1].train()
    assert graphs
    assert largest_difference(*both) <= 1e-6


def test_prompt_learning_is_refused(tmp_path, tokenizer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"PromptTuningConfig adds virtual tokens.*LoraConfig"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, kwargs={"peft_config": config})
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, get_peft_model(float32_model(tokenizer), config))


def test_a_collator_that_would_lose_the_tree_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="data_collator=function would drop the tree"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, kwargs={"data_collator": lambda rows: rows})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 1, 1), "cp_size=2: context parallelism .*Set cp_size=1"), ((1, 2, 2), "tp_size=2 and sp_size=2 both")],
)
def test_parallelism_over_the_row_is_refused(sizes, message):
    config = type("ParallelismConfig", (), dict(zip(("cp_size", "tp_size", "sp_size"), sizes, strict=True)))()
    with pytest.raises(ValueError, match=message):
        check_parallelism(config)


@pytest.mark.parametrize(
    ("kind", "fp16", "model_type", "trl_version", "message"),
    [
        ("FSDP", False, "qwen3", "1.16", r"FSDP: accelerate \S+ shares rows on DeepSpeed only\. Use DeepSpeed"),
        ("DEEPSPEED", True, "qwen3", "1.16", r"fp16, whose loss scale hides wrong gradients\. Use bf16"),
        ("DEEPSPEED", False, "mamba", "1.16", r"a model without num_attention_heads and num_key_value_heads"),
        ("DEEPSPEED", False, "qwen3", "1.15", r"trl 1\.15, whose fused head takes no shifted labels"),
        ("DEEPSPEED", False, "qwen3_5_text", "1.16", None),
    ],
    ids=["engine", "precision", "model", "trl", "hybrid"],
)
def test_what_rows_that_ranks_share_cannot_honour_is_refused(
    monkeypatch, kind, fp16, model_type, trl_version, message
):
    monkeypatch.setattr(trl, "__version__", trl_version)
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind])
    args = SimpleNamespace(fp16=fp16)
    if message is None:
        check_sequence_parallelism(tiny_model(model_type), args, accelerator)
        return
    with pytest.raises(ValueError, match=rf"^Sequence parallelism \(sp_size\) does not work with {message}"):
        check_sequence_parallelism(tiny_model(model_type), args, accelerator)


def test_a_pipeline_is_refused(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    model.config.distributed_config = type("DistributedConfig", (), {"pp_size": 2})()
    with pytest.raises(ValueError, match="pp_size=2: a pipeline passes hidden states on"):
        check_tensor_parallelism(model, args=None, tp_size=1)


@pytest.mark.parametrize(
    ("config", "refused"),
    [({"save_strategy": "epoch"}, True), ({"save_strategy": "steps", "save_only_model": True}, False), ({}, False)],
)
def test_an_optimizer_that_cannot_be_saved_is_refused_before_the_data_is_prepared(
    tmp_path, tokenizer, monkeypatch, config, refused
):
    class PreparesDataError(Exception):
        pass

    def prepare(*args):
        raise PreparesDataError

    monkeypatch.setattr(SinglePassSFTTrainer, "_prepare_dataset", prepare)
    model = float32_model(tokenizer)
    model._is_distributed_loading_by_transformers = True  # as `from_pretrained(distributed_config=…)` does
    expected = pytest.raises(ValueError, match=r"save_strategy='epoch'.*save_only_model=True.*FSDP2 or ZeRO-3")
    with expected if refused else pytest.raises(PreparesDataError):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model, **config)


def test_a_refused_model_is_named_before_the_dataset_is_prepared(tmp_path, tokenizer, monkeypatch):
    model = float32_model(tokenizer)
    model.is_loaded_in_8bit = True
    monkeypatch.setattr(
        "trl_singlepass.training.dataset.prepare_dataset", lambda *_, **__: pytest.fail("prepared first")
    )
    with pytest.raises(UnsupportedModelError, match="load_in_8bit"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model)


def test_attention_dropout_stops_the_first_step(tmp_path, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"GPT2Attention asks for attention dropout 0\.1"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model).train()


def make_accelerator(kind, device):
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=1 if kind == DistributedType.NO else 2,
        device=torch.device(device),
        state=SimpleNamespace(deepspeed_plugin=None),
    )


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)


def test_liger_without_its_package_is_refused_before_the_data_is_prepared(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("trl_singlepass.training.compatibility.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr(SinglePassSFTTrainer, "_prepare_dataset", lambda *_: pytest.fail("prepared the data"))
    with pytest.raises(ImportError, match=r"use_liger_kernel=True needs liger-kernel\. Run pip install liger-kernel"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, use_liger_kernel=True)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
@pytest.mark.parametrize("asked", [True, False], ids=["by the arguments", "by accelerate"])
def test_fsdp_on_a_cpu_says_that_it_needs_a_gpu_whatever_accelerate_chose(monkeypatch, two_processes, kind, asked):
    """Each setting that an error named led to the next error."""
    if not asked:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = SimpleNamespace(deepspeed=None, fsdp=asked)
    with pytest.raises(ValueError, match=r"FSDP needs a GPU. To try two processes on a CPU, use DDP: use_cpu=True"):
        check_engine(args, make_accelerator(kind, "cpu"))


def test_an_engine_that_is_switched_off_on_a_gpu_is_refused_by_name(two_processes):
    args = SimpleNamespace(deepspeed=None, fsdp=True)
    with pytest.raises(ValueError, match=r"asks for FSDP, but accelerate chose MULTI_GPU.*switch engines off"):
        check_engine(args, make_accelerator(DistributedType.MULTI_GPU, "cuda"))


def test_ddp_on_a_cpu_is_accepted(two_processes):
    check_engine(SimpleNamespace(deepspeed=None, fsdp=None), make_accelerator(DistributedType.MULTI_CPU, "cpu"))


def test_one_process_may_keep_an_fsdp_configuration(monkeypatch, two_processes):
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_engine(SimpleNamespace(deepspeed=None, fsdp=True), make_accelerator(DistributedType.NO, "cpu"))
