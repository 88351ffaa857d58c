"""The tree enters with the batch: whoever calls the model with it computes what the trainer computes."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from support.conversations import chat
from support.image_chats import image_collator, image_rows, image_sample_sets
from support.image_models import image_model
from support.pairs import batch_of, pair
from support.planted_layers import OwnAttention, plant, qwen3_model
from support.sample_sets import reasoning_chat
from support.trainers import (
    SETTINGS,
    OwnLoss,
    as_dataset,
    dpo_trainer,
    float32_model,
    largest_difference,
    logged,
    needs_weighted_loss,
    single_pass_trainer,
)
from trl_singlepass import (
    DataCollatorForSinglePass,
    SinglePassDPOTrainer,
    SinglePassSFTConfig,
    SinglePassSFTTrainer,
    enable_images,
    enable_tree,
    prepare_dataset,
)
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


CHATS = [chat(3), chat(2, seed=1)]
SAMPLES = reasoning_chat()


def row_batch(samples=SAMPLES):
    return DataCollatorForSinglePass(0)([Row.from_tree(PrefixTree.from_samples(samples)).columns()])


class OwnStep(SinglePassSFTTrainer):
    """Runs the step itself, with the model's own loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


# One row -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["plain", "lora", "compiled", "copied", "fused head around it"])
@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_a_call_is_the_mean_over_targets(wrap):
    model = qwen3_model(vocab_size=97)
    expected = npass_loss_and_gradients(copy.deepcopy(model), SAMPLES)
    enable_tree(model)
    called = model
    if wrap == "lora":
        called = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    elif wrap == "compiled":
        called = torch.compile(model, backend="eager")
    elif wrap == "copied":
        called = model = copy.deepcopy(model)
    elif wrap == "fused head around it":
        add_fused_lm_head(model)
        enable_tree(model)
    outputs = called(**row_batch())
    torch.compiler.reset()
    assert outputs.logits.shape[1] == len(PrefixTree.from_samples(SAMPLES))
    assert float(outputs.loss.detach()) == pytest.approx(expected.loss, rel=1e-6)
    if wrap != "lora":
        outputs.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected.gradients[name], atol=1e-6, rtol=0)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, lambda model: AveragedModel(model).module])
@pytest.mark.parametrize("head", ["before", "after", None])
def test_a_copy_is_enabled_and_runs_its_own_weights(make_copy, head):
    """With TRL's head, added before trees were enabled or after, whose functions are bound to the original."""
    model = qwen3_model(vocab_size=97)
    if head == "before":
        add_fused_lm_head(model)
    enable_tree(model)
    if head == "after":
        add_fused_lm_head(model)
        enable_tree(model)
    other, fresh, batch = make_copy(model), qwen3_model(vocab_size=97), row_batch()
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fresh.load_state_dict(other.state_dict())
    enable_tree(fresh)
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        assert torch.equal(other(**inputs).logits, fresh(**inputs).logits)
        assert not torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_embeddings_in_place_of_tokens_run_on_the_tree():
    model, batch = qwen3_model(vocab_size=97), row_batch()
    enable_tree(model)
    embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(model(**embedded).logits, model(**batch).logits)


def test_generation_with_an_enabled_model_as_assistant_runs_as_before():
    model, stock, ids = qwen3_model(vocab_size=97), qwen3_model(vocab_size=97), torch.randint(3, 97, (1, 9))
    enable_tree(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, assistant_model=copy.deepcopy(model), **options)
    assert torch.equal(found, stock.generate(ids, **options))


@pytest.mark.parametrize("change", ["attention", "layer"])
def test_layers_that_no_longer_read_the_tree_stop_a_loop(change):
    model, batch = qwen3_model(vocab_size=97), row_batch()
    enable_tree(model)
    if change == "attention":
        model.set_attn_implementation("sdpa")
    else:
        plant(model, OwnAttention)
    with pytest.raises(ValueError, match="attention layers"):
        model(**batch)


def test_a_mask_that_a_model_keeps_is_refused_for_another_row():
    model = qwen3_model(vocab_size=97)
    enable_tree(model)
    kept, forwards = {}, [layer.self_attn.forward for layer in model.model.layers]

    def keeping(forward):
        def attend(hidden_states, position_embeddings, attention_mask=None, **kwargs):
            mask = kept.setdefault(hidden_states.shape[1], attention_mask)
            return forward(hidden_states, position_embeddings, mask, **kwargs)

        return attend

    for layer, forward in zip(model.model.layers, forwards, strict=True):
        layer.self_attn.forward = keeping(forward)
    model(**row_batch())
    with pytest.raises(ValueError, match="mask of another row"):
        model(**row_batch(SAMPLES[::-1]))


def test_a_batch_without_a_tree_runs_as_before():
    model, stock = qwen3_model(vocab_size=97), qwen3_model(vocab_size=97)
    enable_tree(model)
    ids = torch.randint(3, 97, (2, 9))
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_weights_that_a_caller_would_not_read_are_refused():
    model, batch = qwen3_model(vocab_size=97), row_batch([*SAMPLES, *SAMPLES])
    enable_tree(model)
    assert batch["tree"].loss_weights is not None
    with pytest.raises(ValueError, match="loss_weights"):
        model(**batch)
    assert model(**{**batch, "tree": batch["tree"].handled()}).logits.shape[0] == 1


# Callers beside the trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [OwnLoss, OwnStep])
def test_a_loss_of_ones_own_trains_what_the_trainer_trains(tmp_path, tokenizer, owner):
    settings = {"max_steps": 3}
    expected = single_pass_trainer(tmp_path, tokenizer, CHATS, **settings)
    args = SinglePassSFTConfig(str(tmp_path), **{**SETTINGS, **settings})
    model = float32_model(tokenizer)
    found = owner(model, args, train_dataset=as_dataset(CHATS), processing_class=tokenizer)
    for trainer in (expected, found):
        trainer.train()
    assert largest_difference(expected, found) < 1e-6
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-6)


@needs_weighted_loss
def test_a_callback_reads_the_loss_of_the_evaluation(tmp_path, tokenizer):
    losses = []

    class Reader(TrainerCallback):
        def on_evaluate(self, args, state, control, model, eval_dataloader, metrics, **kwargs):
            with torch.no_grad():
                (batch,) = eval_dataloader
                losses.append((float(model(**batch).loss), metrics["eval_loss"]))

    kwargs = {"callbacks": [Reader()], "eval_dataset": as_dataset(CHATS)}
    single_pass_trainer(tmp_path, tokenizer, CHATS, kwargs=kwargs).evaluate()
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6)


def test_a_plain_loop_trains_what_the_trainer_trains(tmp_path, tokenizer):
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    expected = single_pass_trainer(tmp_path, tokenizer, CHATS, **settings)
    expected.train()
    model = float32_model(tokenizer)
    enable_tree(model)
    rows, collator = prepare_dataset(as_dataset(CHATS), tokenizer), DataCollatorForSinglePass(tokenizer.pad_token_id)
    accelerator = Accelerator(cpu=True)
    loader, optimizer = DataLoader(rows, 8, collate_fn=collator), torch.optim.SGD(model.parameters(), lr=0.1)
    model, loader, optimizer = accelerator.prepare(model, loader, optimizer)
    for _ in range(3):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_a_loop_trains_images_as_the_trainer_does(tmp_path, tokenizer, family):
    model = image_model(family, torch.float32)
    rows = image_rows(image_sample_sets(model))
    trained = copy.deepcopy(model)
    collator = image_collator(model)
    args = SinglePassSFTConfig(str(tmp_path), **SETTINGS, packing=False)
    trainer = SinglePassSFTTrainer(
        trained, args, image_collator(model), train_dataset=rows, processing_class=tokenizer
    )
    trainer.args.per_device_train_batch_size = len(rows)
    trainer._train_batch_size = len(rows)
    trainer.train()
    enable_tree(model)
    enable_images(model, collator)
    batch = collator(list(rows))
    loss = model(**batch).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("setting", "value"), [("wave_tokens", 16), ("log_turn_metrics", True)])
def test_a_loss_of_ones_own_does_not_undo_a_setting_in_silence(tmp_path, tokenizer, setting, value):
    args = SinglePassSFTConfig(str(tmp_path), **SETTINGS, **{setting: value})
    trainer = OwnLoss(float32_model(tokenizer), args, train_dataset=as_dataset(CHATS), processing_class=tokenizer)
    with pytest.raises(ValueError, match=setting):
        trainer.train()


# Collators -----------------------------------------------------------------------------------------------------------


def test_a_collator_of_plain_text_may_be_anything(tmp_path, tokenizer):
    trainer = single_pass_trainer(tmp_path, tokenizer, [{"text": "one two three"}] * 2)
    collate, calls = trainer.data_collator.plain, []
    trainer.data_collator = lambda examples: calls.append(1) or collate(examples)
    trainer.train()
    assert calls


# Pairs ---------------------------------------------------------------------------------------------------------------


class OwnPairLoss(SinglePassDPOTrainer):
    """The sigmoid loss, written down again, with the reference in the same call."""

    def _compute_loss(self, model, inputs, return_outputs=False):
        inputs = dict(inputs)
        mask = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        policy = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        with torch.no_grad():
            reference = self.ref_model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        chosen, rejected = (policy - reference).chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected)).mean()


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
def test_pairs_train_the_same_through_the_model(tmp_path, tokenizer, monkeypatch):
    pairs, settings = [pair(2), pair(3, 1)], {"max_steps": 2}
    expected, found = (dpo_trainer(tmp_path, tokenizer, pairs, **settings) for _ in range(2))
    found.__class__ = OwnPairLoss
    for trainer in (expected, found):
        trainer.train()
    assert largest_difference(expected, found) < 1e-6
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"max_row_tokens": 170}], ids=["one row", "several rows"])
def test_logits_of_pairs_are_in_lines(tmp_path, tokenizer, settings):
    trainer = dpo_trainer(tmp_path, tokenizer, [pair(2), pair(3, 1)], per_device_train_batch_size=2, **settings)
    batch = batch_of(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        outputs = trainer.model(**batch, labels=labels)
        fused = trainer.model(**batch, labels=labels, fused_lm_head=True)
    log_probs = outputs.logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    log_probs = log_probs * batch["completion_mask"][:, 1:]
    torch.testing.assert_close(log_probs, fused.log_probs, atol=1e-5, rtol=0)
    mean = -log_probs.sum() / batch["completion_mask"][:, 1:].sum()
    torch.testing.assert_close(outputs.loss, mean, atol=1e-5, rtol=0)
