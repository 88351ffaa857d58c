"""Rollouts of agents: each request is what the chat template renders of the messages so far, and is trained in it."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.groups import GRPO, RLOO, train
from support.small_files import write_model
from support.trainers import logged
from trl_singlepass import ServedRollout


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS = {"max_steps": 1, "gradient_accumulation_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def wait_and_add(a: int, b: int) -> int:
    """
    Add two numbers later.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Counter:
    """An environment whose one tool counts."""

    def reset(self, **kwargs):
        self.number = 0
        return " Count!"

    def count(self) -> str:
        """Count."""
        self.number += 1
        return f"so far {self.number}"


def call(name="add", **arguments):
    return (
        f'<think>\nHm.\n</think>\n\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'.replace(
            "'", '"'
        )
    )


ANSWER = "<think>\nSo be it.\n</think>\n\nDone."


def speaking(kind, *texts):
    """Return a trainer whose model says these texts, one after the other in each rollout, and that records itself."""
    trainer_class, config_class = kind

    class Speaking(trainer_class):
        def _roll_out(self, prompts, trainer):
            self.spoken, self.asked = 0, []
            self.made = super()._roll_out(prompts, trainer)
            return self.made

        def _generate_single_turn(self, prompt_ids, *others):
            if self._rolled_out is not None:
                return super()._generate_single_turn(prompt_ids, *others)
            self.asked.append([self._tokenizer.decode(ids) for ids in prompt_ids])
            text = texts[self.spoken] + "<|im_end|>"
            self.spoken += 1
            outputs = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for _ in prompt_ids]
            return outputs if kind is RLOO[1] else (outputs, None)

        def _score_requests(self, *args):
            self.rollouts = self._rollouts
            return super()._score_requests(*args)

    return Speaking, config_class


def rolled_out(kind, tmp_path, folder, tokenizer, texts, rollout_func, **parts):
    """Return a trainer after one step, and the requests of its first rollout as texts."""
    trainer, _ = train(
        speaking(kind, *texts), tmp_path, folder, tokenizer, rollouts=lambda: rollout_func, parts=parts, **STEPS
    )
    rollout = trainer.rollouts[0]
    assert sum(rollout.lengths) == logged(trainer, "num_trained_tokens")[0] / 2  # of two rollouts
    return trainer, [trainer._tokenizer.decode(prompt) for prompt in rollout.prompts]


def rendered(tokenizer, messages, tools=None):
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)


def assistant(text, **call):
    calls = {"tool_calls": [{"type": "function", "function": call}]} if call else {}
    return {"role": "assistant", "reasoning_content": "Hm." if call else "So be it.", "content": text, **calls}


def result(name, content):
    return {"role": "tool", "name": name, "content": content}


@pytest.mark.parametrize("tool", [add, wait_and_add])
@pytest.mark.parametrize(("kind", "of_trainer"), [(GRPO[1], True), (GRPO[1], False), (RLOO[1], False)])
def test_tools(tmp_path, folder, tokenizer, kind, of_trainer, tool):
    """A later question strips the reasoning of the round before it, as the template does where it is served."""
    name, texts = tool.__name__, []
    more = {"role": "user", "content": "And now?"}
    texts = [call(name, a=1, b=2), call("subtract", a=1), ANSWER, ANSWER]
    rollout_func = ServedRollout(
        () if of_trainer else [tool], reply=lambda messages: [more] if more not in messages else []
    )
    parts = {"tools": [tool]} if of_trainer else {}
    trainer, requests = rolled_out(kind, tmp_path, folder, tokenizer, texts, rollout_func, **parts)
    messages, expected = list(trainer.made["messages"][0][:2]), []
    expected.append(rendered(tokenizer, messages, [tool]))
    messages += [assistant("", name=name, arguments={"a": 1, "b": 2}), result(name, "3")]
    expected.append(rendered(tokenizer, messages, [tool]))
    messages += [
        assistant("", name="subtract", arguments={"a": 1}),
        result("subtract", "{'error': 'Tool subtract not found.'}"),
    ]
    expected.append(rendered(tokenizer, messages, [tool]))
    messages += [assistant("Done."), more]
    expected.append(rendered(tokenizer, messages, [tool]))
    assert requests == expected
    assert "Hm." in requests[2]
    assert "Hm." not in requests[3]
    assert (trainer.made["tool_calls"], trainer.made["tool_failures"]) == ([2, 2], [1, 1])
    assert logged(trainer, "rollouts/requests") == [4]
    assert logged(trainer, "rollouts/ended_at_limit") == [0]
    if of_trainer:
        assert logged(trainer, "tools/failure_frequency") == [0.5]


def test_a_history_is_rewritten_and_the_transcript_is_not(tmp_path, folder, tokenizer):
    def clear(messages):
        for message in messages[:-1]:
            if message["role"] == "tool":
                message["content"] = "[cleared]"
        return messages

    texts = [call(a=1, b=2), call(a=3, b=4), ANSWER]
    trainer, requests = rolled_out(GRPO[1], tmp_path, folder, tokenizer, texts, ServedRollout([add], history=clear))
    assert "\n3\n" in requests[1]
    assert "[cleared]" in requests[2]
    assert "\n3\n" not in requests[2]
    assert [m["content"] for m in trainer.made["messages"][0] if m["role"] == "tool"] == ["3", "7"]


def test_environments(tmp_path, folder, tokenizer):
    texts = [call("count"), call("count"), ANSWER]
    parts = {"environment_factory": Counter}
    trainer, requests = rolled_out(GRPO[1], tmp_path, folder, tokenizer, texts, ServedRollout(), **parts)
    assert "Count!" in requests[0]
    assert "so far 2" in requests[2]
    assert [environment.number for environment in trainer.environments] == [2, 2]


@pytest.mark.parametrize("limit", [{"max_requests": 2}, {"max_tool_calling_iterations": 1}, {"context": True}])
def test_a_rollout_ends_at_a_limit(tmp_path, folder, tokenizer, limit, monkeypatch):
    settings = {name: limit[name] for name in limit if name == "max_tool_calling_iterations"}
    rollout_func = ServedRollout([add], max_requests=limit.get("max_requests", 16))
    trainer_class, config_class = speaking(GRPO[1], *[call(a=1, b=2)] * 16)
    if "context" in limit:
        monkeypatch.setattr("trl_singlepass.groups.rollouts._context_length", lambda trainer: 10)
    kind = trainer_class, config_class
    trainer, _ = train(kind, tmp_path, folder, tokenizer, rollouts=lambda: rollout_func, **STEPS, **settings)
    assert len(trainer.rollouts[0].prompts) == (1 if "context" in limit else 2)
    assert logged(trainer, "rollouts/ended_at_limit") == [1]


def test_log_probabilities_of_vllm_are_kept(tmp_path, folder, tokenizer):
    class Server:
        def generate(self, prompts, images, num_generations):
            outputs = [tokenizer(ANSWER)["input_ids"] for _ in prompts]
            return prompts, outputs, [[[-0.5] for _ in line] for line in outputs], None

        def sync_weights(self):
            pass

    class Served(GRPO[1][0]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.use_vllm, self._last_loaded_step, self.vllm_generation = True, -1, Server()
            self.vllm_mode = "server"

    kind = Served, GRPO[1][1]
    trainer, _ = train(kind, tmp_path, folder, tokenizer, rollouts=ServedRollout, **STEPS)
    assert logged(trainer, "sampling/sampling_logp_difference/mean")[0] > 1


def test_a_template_that_nobody_can_read_needs_a_parser(tmp_path, folder):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}assistant:"
    tokenizer = make_tokenizer("qwen3", plain)
    with pytest.raises(ValueError, match="parse="):
        rolled_out(RLOO[1], tmp_path, folder, tokenizer, [ANSWER], ServedRollout([add]))
    calls = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 5, "b": 4}}}]}
    parse = lambda text: {"content": "", **calls} if "add" in text else {"content": text}  # noqa: E731
    _, requests = rolled_out(RLOO[1], tmp_path, folder, tokenizer, ["add", ANSWER], ServedRollout([add], parse=parse))
    assert requests[1].endswith("tool: 9<|im_end|>assistant:")


def test_texts_are_no_messages(tmp_path, folder, tokenizer):
    with pytest.raises(ValueError, match="messages"):
        ServedRollout()(["a text"], None)
