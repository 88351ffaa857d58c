"""What trainers on conversations and on pairs do alike."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOTrainer, SFTTrainer

import trl_singlepass
from support.conversations import chat, tool_chat
from support.pairs import SINGLE_TURNS, TRAJECTORIES, batch_of
from support.planted_layers import plant
from support.trainers import (
    as_dataset,
    dpo_trainer,
    float32_model,
    largest_difference,
    logged,
    parameters,
    single_pass_trainer,
)
from trl_singlepass import SinglePassDPOConfig, SinglePassGRPOConfig, SinglePassSFTConfig
from trl_singlepass.data.row_tree import RowTree
from trl_singlepass.engine.check.checked_model import TreeCheckError


CHATS = [chat(3), chat(2, seed=1), tool_chat()]
KINDS = {"conversations": (single_pass_trainer, CHATS), "pairs": (dpo_trainer, TRAJECTORIES)}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make(kind, tmp_path, tokenizer):
    """Return a function that makes a trainer of this kind."""
    trainer, examples = KINDS[kind]
    return lambda *args, data=examples, **settings: trainer(tmp_path, tokenizer, data, *args, **settings)


def test_a_stream_trains_as_stored_examples(make, kind):
    both = []
    for stored in (True, False):
        rows = as_dataset(KINDS[kind][1])
        rows = rows if stored else rows.to_iterable_dataset()
        both.append(make(data=rows, train_sampling_strategy="sequential", max_steps=3, per_device_train_batch_size=1))
        both[-1].train()
    assert largest_difference(*both) == 0
    assert logged(both[0], "num_trained_tokens") == logged(both[1], "num_trained_tokens")


def test_the_log_has_what_is_shared(make):
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    rows = trainer.train_dataset
    of_samples = sum(map(sum, rows["multiplicity"]))
    assert logged(trainer, "sharing_factor") == pytest.approx([of_samples / sum(map(len, rows["input_ids"]))] * 2)
    assert logged(trainer, "num_tokens") == [of_samples, 2 * of_samples]


def test_an_adapter_trains_and_its_base_stays(make):
    trainer = make(kwargs={"peft_config": LoraConfig(target_modules=["q_proj"])}, max_steps=2)
    start = parameters(trainer)
    trainer.train()
    moved = {name for name, value in parameters(trainer).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name and ".ref." not in name}
    assert {"trl", "single-pass"} <= set(trainer.model.model_tags)


def test_a_head_that_an_engine_shards_on_its_own_is_gathered_when_the_model_runs(make):
    trainer = make()
    head, gathered = trainer.model.get_output_embeddings(), []
    head.unshard, head.reshard = lambda: gathered.append(True), lambda: None  # as FSDP2 gives them to a module
    trainer.train()
    assert gathered


def test_the_tree_moves_to_the_device_of_the_run(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    tree = batch_of(trainer)["tree"]
    assert (tree.depth if isinstance(tree, RowTree) else tree.targets).device.type == "meta"


def test_log_probabilities_of_a_reference_are_not_rounded_with_the_other_inputs(tmp_path, tokenizer, monkeypatch):
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, precompute_ref_log_probs=True)

    def rounded(self, inputs):  # as under DeepSpeed in bfloat16
        is_float = {name: torch.is_tensor(value) and value.is_floating_point() for name, value in inputs.items()}
        return {name: value.bfloat16() if is_float[name] else value for name, value in inputs.items()}

    monkeypatch.setattr(Trainer, "_prepare_inputs", rounded)
    batch = batch_of(trainer)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert batch[name].dtype == torch.float32
        assert batch[name].tolist() == list(trainer.train_dataset[name])


def test_a_run_warns_of_nothing_that_trl_does_itself(make, kind):
    given = {"eval_dataset": as_dataset(KINDS[kind][1]), "compute_metrics": lambda prediction: {}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(kwargs=given)
        trainer.train()
        trainer.evaluate()
    assert not [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]


# Arguments and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [SFTTrainer, DPOTrainer])
def test_the_signature_is_trls(stock):
    own = getattr(trl_singlepass, f"SinglePass{stock.__name__}")
    ours, theirs = (inspect.signature(trainer.__init__).parameters for trainer in (own, stock))
    assert [name for name in ours if name in theirs] == list(theirs)
    assert all((ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default) for name in theirs)


@pytest.mark.parametrize("config", [SinglePassSFTConfig, SinglePassDPOConfig, SinglePassGRPOConfig])
def test_a_misspelt_setting_is_answered_with_the_one_that_it_looks_like(config, tmp_path):
    with pytest.raises(TypeError, match="max_row_tokens"):
        config(str(tmp_path), max_row_token=64)
    copied = pickle.loads(pickle.dumps(config(str(tmp_path), max_row_tokens=64, bf16=False, use_cpu=True)))
    assert copied.max_row_tokens == 64


@pytest.mark.parametrize(
    "settings",
    [
        {"train_turns": "first"},
        {"bad_rows": "skip"},
        {"history": "drop"},
        {"wave_tokens": 0},
        {"overlong_turns": "keep"},
        {"max_row_tokens": 1},
        {"max_length": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
def test_wrong_settings_are_named(make, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make(**settings)


@pytest.mark.parametrize(
    "settings", [{"loss_reduction": "mean"}, {"reasoning_weight": -1.0}, {"reasoning_weight": float("nan")}], ids=str
)
def test_wrong_weights_are_named(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SinglePassSFTConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.fixture
def no_data_is_prepared(monkeypatch):
    for name in ("training.dataset.prepare_dataset", "preference.trainer.prepare"):
        monkeypatch.setattr(f"trl_singlepass.{name}", lambda *_, **__: pytest.fail("prepared"))


@pytest.mark.usefixtures("no_data_is_prepared")
@pytest.mark.parametrize(
    "adapter",
    [
        # PEFT keeps the forward that a model has without TRL's fused head: stock trainers stop in their first step.
        AdaptionPromptConfig(adapter_len=4, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM"),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_are_refused_before_the_data_is_read(make, tokenizer, adapter):
    name, model = type(adapter).__name__, float32_model(tokenizer, "llama")
    with pytest.raises(ValueError, match=name):
        make(model, kwargs={"peft_config": adapter})
    with pytest.raises(ValueError, match=name):
        make(get_peft_model(model, adapter))


@pytest.mark.usefixtures("no_data_is_prepared")
def test_a_model_that_is_compiled_already_is_refused(make, kind, tokenizer):
    model = float32_model(tokenizer)
    compiled = torch.compile(model, backend="eager")
    adapted = torch.compile(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), backend="eager")
    for models in ((compiled,), (adapted,), *([(model, compiled)] if kind == "pairs" else [])):
        with pytest.raises(ValueError, match="torch_compile=True"):
            make(*models)


def test_a_collator_that_would_lose_the_tree_is_refused(make):
    with pytest.raises(ValueError, match="data_collator"):
        make(kwargs={"data_collator": lambda rows: rows})
    trainer = make()
    with pytest.raises(ValueError, match="data_collator"):
        trainer.data_collator = lambda rows: {}
    collate, calls = copy.deepcopy(trainer.data_collator), []

    class Counting(type(collate)):
        def __call__(self, examples):
            calls.append(1)
            return super().__call__(examples)

    collate.__class__ = Counting
    trainer.data_collator = collate
    trainer.train()
    assert calls


def test_images_are_refused_where_the_model_reads_none(make):
    examples = [{**SINGLE_TURNS[0], "messages": chat(1), "images": ["a.png"]}]
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM .*get_image_features"):
        make(data=examples)


# The measured check of a run -----------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Counts optimizer steps."""

    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


# tests/engine/test_check.py finds each of them.
@pytest.mark.parametrize("name", ["TokenShift", "NGramEmbedding", "ZeroGate"])
def test_a_planted_layer_stops_a_run_before_its_first_step(make, tmp_path, tokenizer, name):
    """Nothing has changed by then, and nothing is saved."""
    model, place = plant(float32_model(tokenizer), name)
    steps = Steps()
    trainer = make(model, kwargs={"callbacks": [steps]}, save_strategy="steps", save_steps=1)
    before = parameters(trainer)
    with pytest.raises(TreeCheckError, match=rf"{place} \({name}\)"):
        trainer.train()
    assert steps.count == 0
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer).items())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_planted_layer_in_the_reference_stops_a_run(tmp_path, tokenizer):
    reference, _ = plant(float32_model(tokenizer), "TokenShift")
    with pytest.raises(TreeCheckError, match="TokenShift"):
        dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, None, reference).train()
