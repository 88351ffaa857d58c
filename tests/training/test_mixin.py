"""What both trainers override alike, where a CPU alone would not show that it is left out."""

import pickle
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from support.conversations import chat
from support.pairs import TRAJECTORIES, batch_of, dpo_trainer
from support.trainers import as_dataset, single_pass_trainer
from trl_singlepass import SinglePassDPOConfig, SinglePassGRPOConfig, SinglePassSFTConfig
from trl_singlepass.data.row_tree import RowTree


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


@pytest.fixture(params=["conversations", "pairs"])
def trainer(request, tmp_path, tokenizer):
    if request.param == "pairs":
        return dpo_trainer(tmp_path, tokenizer, TRAJECTORIES)
    return single_pass_trainer(tmp_path, tokenizer, [chat(2), chat(1)])


def test_a_head_that_an_engine_shards_on_its_own_is_gathered_when_the_model_runs(trainer):
    head, gathered = trainer.model.get_output_embeddings(), []
    head.unshard, head.reshard = lambda: gathered.append(True), lambda: None  # as FSDP2 gives them to a module
    trainer.train()
    assert gathered


def test_the_tree_moves_to_the_device_of_the_run(trainer, monkeypatch):
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


@pytest.mark.parametrize(
    ("make", "examples"), [(single_pass_trainer, [chat(2), chat(1)]), (dpo_trainer, TRAJECTORIES)]
)
def test_a_run_warns_of_nothing_that_trl_does_itself(tmp_path, tokenizer, make, examples):
    given = {"eval_dataset": as_dataset(examples), "compute_metrics": lambda prediction: {}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(tmp_path, tokenizer, examples, kwargs=given)
        trainer.train()
        trainer.evaluate()
    assert not [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize("config", [SinglePassSFTConfig, SinglePassDPOConfig, SinglePassGRPOConfig])
def test_a_misspelt_setting_is_answered_with_the_one_that_it_looks_like(config, tmp_path):
    with pytest.raises(TypeError, match="max_row_tokens"):
        config(str(tmp_path), max_row_token=64)
    copied = pickle.loads(pickle.dumps(config(str(tmp_path), max_row_tokens=64, bf16=False, use_cpu=True)))
    assert copied.max_row_tokens == 64
