"""Recorded rollouts train as those that are made in training: one row per request, corrected for another policy."""

import pytest

from support.groups import GRPO, RLOO, assert_equal, train
from support.rollouts import StockGRPO, StockRLOO, without_padding
from support.small_files import write_model
from support.trainers import logged
from trl_singlepass import RecordedRollouts, render_samples


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


def log(number, rollout):
    """Return a rollout of two turns whose reasoning the template strips."""
    messages = []
    for turn in range(2):
        messages.append({"role": "user", "content": f"Question {turn} of {number}."})
        thought = "so " * (rollout + turn + 1)
        messages.append({"role": "assistant", "reasoning_content": thought, "content": f"Answer {rollout}."})
    return {"messages": messages, "reward": float(rollout % 3)}


def as_turns(example, tokenizer, with_log_probs=True):
    turns = []
    for sample in render_samples(example["messages"], tokenizer):
        prompt, output = sample.token_ids[: sample.prompt_length], sample.token_ids[sample.prompt_length :]
        turn = {"prompt_ids": prompt.tolist(), "completion_ids": output.tolist()}
        if with_log_probs:
            turn["logprobs"] = [-6.5 + 0.1 * (token % 3) for token in turn["completion_ids"]]
        turns.append(turn)
    return {"turns": turns, "reward": example["reward"]}


EXAMPLES = [log(number, rollout) for number in range(4) for rollout in range(2)]


class Noted:
    """Recorded rollouts that say which requests made each, for the trainers with one row per request."""

    def __init__(self, recorded):
        self.recorded, self.requests = recorded, {}

    def __call__(self, prompts, trainer):
        fields = self.recorded(prompts, trainer)
        for start, completion, contexts in zip(
            fields["prompt_ids"], fields["completion_ids"], fields["contexts"], strict=True
        ):
            tokens = iter(completion)
            requests = [(prompt, [next(tokens) for _ in range(length)]) for prompt, length in contexts]
            self.requests[without_padding(start + completion, trainer._tokenizer)] = requests
        return {**fields, "score": fields["recorded_reward"], "env_mask": None}


@pytest.mark.parametrize("form", ["messages", "turns"])
@pytest.mark.parametrize(("stock", "both"), [(StockGRPO, GRPO), (StockRLOO, RLOO)], ids=["grpo", "rloo"])
def test_recorded_rollouts(tmp_path, folder, tokenizer, stock, both, form):
    examples = EXAMPLES if form == "messages" else [as_turns(example, tokenizer) for example in EXAMPLES]
    recorded = RecordedRollouts(examples, tokenizer, 2)
    settings = {"dataset": recorded.prompts, "rollouts": lambda: Noted(recorded), **STEPS}
    if both is GRPO:
        settings["vllm_importance_sampling_mode"] = "token_truncate"  # whole rollouts are far from the model
    ours = assert_equal(((stock, both[0][1]), both[1]), tmp_path, folder, tokenizer, tolerance=1e-4, **settings)
    is_corrected = form == "turns" and both is GRPO
    assert bool(logged(ours, "sampling/importance_sampling_ratio/mean")) == is_corrected
    (samples,) = {tuple(map(len, [*render_samples(EXAMPLES[0]["messages"], tokenizer)]))}
    first = recorded([recorded.prompts[0]["prompt"]], ours)
    assert tuple(len(prompt) + length for prompt, length in first["contexts"][0]) == samples


def test_the_recorded_reward_is_that_of_each_rollout(tmp_path, folder, tokenizer):
    recorded = RecordedRollouts(EXAMPLES, tokenizer, 2)
    rewards = {"reward_funcs": recorded.reward}
    settings = {"dataset": recorded.prompts, "rollouts": lambda: recorded, "parts": rewards, **STEPS}
    ours, _ = train(GRPO[1], tmp_path, folder, tokenizer, **settings)
    assert logged(ours, "reward") == [0.5, 0.5]  # 0 and 1 in each group


def test_rollouts_that_fill_no_group_are_counted(tokenizer, caplog):
    recorded = RecordedRollouts([*EXAMPLES, log(9, 0)], tokenizer, 2)
    assert len(recorded.prompts) == 4
    assert "1 of 9" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda examples, _: [{"messages": example["messages"]} for example in examples], "reward"),
        (lambda examples, _: examples[:1], "num_generations"),
        (lambda examples, tok: [as_turns(e, tok, i > 0) for i, e in enumerate(examples)], "logprobs"),
    ],
)
def test_wrong_examples(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        RecordedRollouts(wrong(EXAMPLES, tokenizer), tokenizer, 2)
