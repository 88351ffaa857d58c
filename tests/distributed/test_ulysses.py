"""Two ranks that share each row (DeepSpeed Ulysses) train what one process trains, and never a tree as one text."""

import pytest

from support.slow import slow_but_for
from support.tiny_models import tiny_model
from support.trainers import needs_weighted_loss
from support.worker import training_conversations
from support.worker_settings import assert_same_training, with_config, zero
from trl_singlepass.cost.memory import exchange_bytes


def shared(settings, stage=3, **zero_settings):
    """Return settings under which two ranks share each row."""
    return {**with_config(settings, deepspeed=zero(stage, **zero_settings)), "sp_size": 2}


def one_row_per_batch(accumulation=1, **settings):
    return with_config(settings, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation)


CASES = {
    "one row per step": one_row_per_batch(),
    "two rows per step": one_row_per_batch(2, evaluate=True, config={"gradient_checkpointing": False}),
    "checkpointing": one_row_per_batch(2, config={"gradient_checkpointing": True}),
    "packing": one_row_per_batch(2, config={"packing": True, "max_length": 256}),
    "lora": one_row_per_batch(2, lora=True),
    "two epochs in random order": one_row_per_batch(
        5, config={"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "random"}
    ),
    "weights": one_row_per_batch(
        2, config={"loss_reduction": "turn", "reasoning_weight": 0.3, "gradient_checkpointing": True}
    ),
    "one key-value head": one_row_per_batch(2, model={"num_key_value_heads": 1}),
    "sliding windows": one_row_per_batch(2, family="gemma2"),
    "sinks": one_row_per_batch(2, family="gpt-oss", config={"router_aux_loss_coef": 0.0}),
}
IN_FLOAT64 = ["packing", "lora", "sinks"]
DEFAULT = ["two rows per step", "weights", "one key-value head", "sliding windows"]


@pytest.mark.parametrize("case", slow_but_for(DEFAULT, CASES))
def test_steps(tmp_path, workers, one_process, case):
    alone = one_process(CASES[case])
    run = workers.run(tmp_path, shared(CASES[case]), world_size=2)
    assert (run.world_size, run.engine, run.zero_stage) == (2, "DeepSpeedEngine", 3)
    assert len(run.loss) == len(alone.loss) >= 4
    assert_same_training(run, alone)
    assert run.num_trained_tokens == alone.num_trained_tokens
    if "evaluate" in CASES[case]:
        assert run.evaluation["eval_loss"] == pytest.approx(alone.evaluation["eval_loss"], rel=1e-6)


@needs_weighted_loss  # whose fused head the worker keeps in float64
@pytest.mark.parametrize("case", IN_FLOAT64)
def test_steps_in_float64(tmp_path, workers, one_process, case):
    settings = {**CASES[case], "float64": True}
    run = workers.run(tmp_path, shared(settings), world_size=2)
    assert_same_training(run, one_process(settings), tolerance=1e-13)


@pytest.mark.parametrize(
    ("num_rows", "world_size", "accumulation"), slow_but_for([(7, 4, 2)], [(7, 2, 1), (5, 4, 1), (7, 4, 2)])
)
def test_every_row_is_trained_once_in_an_epoch(tmp_path, workers, one_process, num_rows, world_size, accumulation):
    """Rows that are no multiple of the ranks; with four ranks, two groups of two share rows."""
    epochs = {"num_rows": num_rows, "config": {"max_steps": -1, "num_train_epochs": 1}}
    run = workers.run(tmp_path, shared(one_row_per_batch(accumulation, **epochs)), world_size=world_size)
    assert run.world_size == world_size
    groups = world_size // 2
    order = list(range(num_rows))
    if groups > 1 and accumulation == 1:  # in turn, the first rows of both groups and the second rows of both
        order = [0, 2, 1, 3, 4]
    rows = [{"messages": training_conversations()[row]} for row in order]
    assert_same_training(run, one_process(one_row_per_batch(groups * accumulation, **epochs, rows=rows)))


@pytest.mark.parametrize("stage", slow_but_for([2], [1, 2, 3]))
def test_gradients_that_deepspeed_doubles_are_corrected(tmp_path, workers, one_process, stage):
    scatters = {"reduce_scatter": False} if stage == 3 else {}
    run = workers.run(tmp_path, shared(one_row_per_batch(2), stage, **scatters), world_size=2)
    assert run.zero_stage == stage
    assert_same_training(run, one_process(CASES["two rows per step"]))


@pytest.mark.parametrize("checkpointing", slow_but_for([True], [False, True]))
def test_what_is_sent_is_what_is_counted(tmp_path, workers, checkpointing):
    """Two steps of one conversation; in float32, numbers take twice the bytes."""
    config = {"gradient_checkpointing": checkpointing, "self_check": False, "max_steps": 2}
    settings = {"config": config, "rows": [{"messages": training_conversations()[3]}], "count_exchange": True}
    run = workers.run(tmp_path, shared(one_row_per_batch(**settings)), world_size=2)
    config = tiny_model("qwen3", num_attention_heads=4, num_key_value_heads=2).config
    counted = exchange_bytes(config, run.row_tokens, 2, passes=3 if checkpointing else 2)
    assert run.exchanged == 2 * 2 * counted


@pytest.mark.slow
def test_bf16(tmp_path, workers, one_process):
    settings = one_row_per_batch(2, config={"bf16": True})
    run = workers.run(tmp_path, shared(settings), world_size=2)
    alone = one_process(settings)
    assert run.loss == pytest.approx(alone.loss, rel=5e-4)
    assert run.grad_norm == pytest.approx(alone.grad_norm, rel=1e-2)


@pytest.mark.slow
def test_parameters_in_cpu_memory(tmp_path, workers, one_process):
    device = {"device": "cpu"}
    settings = shared(one_row_per_batch(2), offload_optimizer=device, offload_param=device)
    run = workers.run(tmp_path, settings, world_size=2)
    assert_same_training(run, one_process(CASES["two rows per step"]))


def test_doubled_gradients_are_noticed(tmp_path, workers):
    settings = {**shared(one_row_per_batch(2), stage=2), "break": "overcounting"}
    workers.assert_refused(tmp_path, settings, "DeepSpeed returned gradients")


@pytest.mark.parametrize("wire", ["exchange", "tree_of_attention"])
def test_a_tree_is_never_trained_as_one_text(tmp_path, workers, wire):
    """
    With DeepSpeed's own exchange or without a tree, plain causal attention would run over all branches.

    The check before the first step is off: it would refuse some of these first.
    """
    settings = shared(one_row_per_batch(config={"self_check": False}))
    workers.assert_refused(tmp_path, {**settings, "break": wire}, "received no tree")


@pytest.mark.parametrize(
    ("num_rows", "accumulation"),
    slow_but_for([(7, 1)], [(7, 1), (12, 1), (9, 2)]),
)
def test_batches_of_two_conversations(tmp_path, workers, one_process, num_rows, accumulation):
    """Each rank's batch is one row of two conversations; at the end of an epoch, some have one or none that is new."""
    config = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    settings = with_config({"num_rows": num_rows}, gradient_accumulation_steps=accumulation, **config)
    run = workers.run(tmp_path, shared(settings), world_size=2)
    assert_same_training(run, one_process(settings))


def test_fp16_is_refused(tmp_path, workers):
    workers.assert_refused(tmp_path, shared(one_row_per_batch(config={"fp16": True})), "fp16")
