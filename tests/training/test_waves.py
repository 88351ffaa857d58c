"""Training in waves moves parameters as rows at once do; `test_equivalence.py` compares both with stock training."""

import logging
from types import SimpleNamespace

import pytest
import torch

from benchmarks.hybrid_step import small_hybrid
from support.tiny_models import tiny_model
from support.trainers import (
    CONVERSATIONS,
    assert_trained_alike,
    float32_model,
    in_order,
    largest_difference,
    logged,
)
from trl_singlepass.engine import pieces
from trl_singlepass.training.sharding import stop_prefetching


LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


def assert_equal(one, waves, model):
    assert max(logged(waves, "num_waves")) > 1
    assert_trained_alike(one, waves, model, LOGGED)


def test_half_precision_is_as_near_to_float32_as_one_row(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    settings = [{}, {"bf16": True}, {"bf16": True, "wave_tokens": 64}]
    trainers = [in_order(tmp_path, tokenizer, model, per_device_train_batch_size=4, **own) for own in settings]
    for trainer in trainers:
        trainer.train()
    exact, row, waves = trainers
    assert 0 < largest_difference(waves, exact) <= 2 * largest_difference(row, exact)


def test_gradients_that_a_scaler_scales(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    plain, scaled = (
        in_order(tmp_path, tokenizer, model, per_device_train_batch_size=4, max_grad_norm=0.0, **own)
        for own in ({}, {"wave_tokens": 64})
    )
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as fp16 has it on a GPU
    for trainer in (plain, scaled):
        trainer.train()
    assert max(logged(scaled, "num_waves")) > 1
    assert scaled.accelerator.scaler.get_scale() == 1024.0
    assert largest_difference(plain, scaled) <= 1e-6


def square_of_log_probs(outputs, labels, num_items_in_batch=None):
    """A loss that reads all targets: no factor is known before all have been scored."""
    log_probs = outputs.log_probs if "log_probs" in outputs else scored(outputs.logits, labels)
    return log_probs.sum() ** 2 / 1000 / (num_items_in_batch or 1)


square_of_log_probs.is_sum_over_targets = True  # it does not ask which sample a target is from


def scored(logits, labels):
    """Log-probabilities of the targets of a row, 0 where there is none, `(1, row_length - 1)`."""
    targets = labels[:, 1:, None]
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0))
    return chosen.masked_fill(targets == -100, 0)[..., 0]


OWN_LOSSES = [{"label_smoothing_factor": 0.3}, {"compute_loss_func": square_of_log_probs}]


@pytest.mark.parametrize("own", OWN_LOSSES, ids=lambda own: next(iter(own)))
def test_losses_that_read_the_logits_of_a_row_run_at_once(tmp_path, tokenizer, own):
    model = float32_model(tokenizer)
    settings = {"evaluation": CONVERSATIONS[:5], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    own = {"kwargs": own} if "compute_loss_func" in own else own
    row, waves = (in_order(tmp_path, tokenizer, model, wave_tokens=n, **settings, **own) for n in (None, 64))
    for trainer in (row, waves):
        trainer.train()
    assert_equal(row, waves, model)
    assert waves.evaluate()["eval_loss"] == pytest.approx(row.evaluate()["eval_loss"], rel=1e-5)


def in_waves(tmp_path, tokenizer, model=None, wave_tokens=64, **settings):
    model = model or float32_model(tokenizer)
    return in_order(tmp_path, tokenizer, model, wave_tokens=wave_tokens, per_device_train_batch_size=4, **settings)


def test_a_loss_that_reads_logits_is_told_what_waves_have(tmp_path, tokenizer):
    def sum_of_logits(outputs, labels, num_items_in_batch):
        return outputs.logits.sum()

    sum_of_logits.is_sum_over_targets = True
    own = {"compute_loss_func": sum_of_logits}
    with pytest.raises(ValueError, match=r"compute_loss_func.*wave_tokens"):
        in_waves(tmp_path, tokenizer, kwargs=own).train()


@pytest.mark.parametrize(("reasoning_weight", "is_scaled"), [(0.5, None), (1.0, False)])
def test_weights_and_scaled_losses_reach_waves(tmp_path, tokenizer, reasoning_weight, is_scaled):
    """Where `loss_is_scaled_for_ga` is false, the Trainer divides each batch's loss by their number."""
    model = float32_model(tokenizer)
    settings = {"reasoning_weight": reasoning_weight, "gradient_accumulation_steps": 2}
    row, waves = (in_waves(tmp_path, tokenizer, model, size, **settings) for size in (None, 64))
    for trainer in (row, waves):
        trainer.loss_is_scaled_for_ga = is_scaled
        trainer.train()
    assert_equal(row, waves, model)


@pytest.mark.parametrize("is_hybrid", [False, True], ids=["attention", "hybrid"])
def test_rows_that_fit_run_at_once_and_the_log_says_so(tmp_path, tokenizer, caplog, is_hybrid):
    model = small_hybrid() if is_hybrid else None
    with caplog.at_level(logging.INFO, logger="trl_singlepass"):
        trainer = in_waves(tmp_path, tokenizer, model, "auto")
        trainer.train()
    assert logged(trainer, "num_waves") == [1.0]
    assert "wave_tokens='auto' is " in caplog.text


@pytest.mark.parametrize(("device", "says_so"), [("cuda", True), ("cpu", False)])
def test_auto_says_when_waves_make_a_gpu_wait(device, says_so, caplog, monkeypatch):
    model = tiny_model("qwen3")
    weights = sum(x.numel() for x in model.model.layers.parameters()) / len(model.model.layers)
    most = pieces.tokens_that_hide_launches(model)
    assert most == pytest.approx(250 * 5e-6 * 5e14 / 8 / weights, rel=0.01)
    monkeypatch.setattr(pieces, "wave_tokens_that_fit", lambda model, args: (most - 1, "so much fits"))
    args = SimpleNamespace(wave_tokens="auto", device=torch.device(device))
    accelerator = SimpleNamespace(parallelism_config=None)
    made = pieces.Pieces(model, args, accelerator, setting="wave_tokens", knows_loss=True, has_router_loss=False)
    with caplog.at_level(logging.INFO, logger="trl_singlepass"):
        assert made.wave_tokens == most - 1
    assert ("than the host takes to launch it" in caplog.text) == says_so


def test_auto_that_finds_no_room_says_what_there_is(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("trl_singlepass.engine.pieces.free_bytes", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"wave_tokens='auto'.* 0\.0 GiB are free on cpu"):
        in_waves(tmp_path, tokenizer, wave_tokens="auto").train()


@pytest.mark.parametrize(("divides_layers", "tokens"), [(True, 4 * 512), (False, 512)])
def test_auto_on_shared_rows_is_what_fits_on_every_rank(divides_layers, tokens):
    """Ranks that cut a shared row differently would wait for each other forever."""
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(sp_size=4),
        device=torch.device("cpu"),
        gather=lambda own: torch.cat([own, torch.tensor([1024, 512, 2048])]),
    )
    assert pieces.on_shared_rows(768, accelerator, divides_layers=divides_layers) == tokens
    accelerator.parallelism_config.sp_size = 1
    assert pieces.on_shared_rows(768, accelerator, divides_layers=divides_layers) == 768


def test_auto_counts_what_a_varlen_kernel_gathers():
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    heads, head_dim = model.config.num_attention_heads, model.config.head_dim
    device = torch.device("cpu")
    assert pieces._gathered_bytes(model, device, 2) == 0
    assert pieces._gathered_bytes(model, torch.device("cuda"), 4) == 0
    expected = 8 * heads * head_dim * 2  # keys and values of four rows, for every query head
    assert pieces._gathered_bytes(model, torch.device("cuda"), 2) == expected
    model.config._attn_implementation_internal = "tree_varlen_2"
    assert pieces._gathered_bytes(model, device, 2) == expected


def test_a_loss_that_trl_computes_otherwise_stops_the_first_step(tmp_path, tokenizer):
    trainer = in_waves(tmp_path, tokenizer)
    divisor = trainer._tree_loss._divisor
    trainer._tree_loss._divisor = lambda *args: (2 * divisor(*args)[0], 1)
    with pytest.raises(RuntimeError, match=r"The waves of a row have a loss of .*, but TRL .* computes "):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"wave_tokens": 0}, "wave_tokens=0"),
        ({"wave_tokens": "all"}, "wave_tokens='all'"),
        ({"wave_tokens": None, "offload_kv": True}, "offload_kv=True .*Set wave_tokens"),
    ],
)
def test_what_waves_cannot_honour_is_refused(tmp_path, tokenizer, settings, named):
    with pytest.raises(ValueError, match=named):
        in_waves(tmp_path, tokenizer, **settings)


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        (3, {}, {"stage3_prefetch_bucket_size": 0}),
        (3, {"stage3_prefetch_bucket_size": "auto"}, {"stage3_prefetch_bucket_size": 0}),
        (3, {"stage3_prefetch_bucket_size": 9}, {"stage3_prefetch_bucket_size": 9}),
        (2, {}, {}),
    ],
)
def test_prefetching_that_nobody_asked_for_is_turned_off(stage, settings, expected):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": dict(settings)})
    stop_prefetching(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert plugin.deepspeed_config["zero_optimization"] == expected
