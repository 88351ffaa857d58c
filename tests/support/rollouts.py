"""Scripted rollouts of several requests, and TRL's trainers on one row per request, by plain forwards."""

import random

import torch
from trl import GRPOTrainer, RLOOTrainer


def history(rng, kind, requests, vocab_size):
    """Return the prompt of the next request, after others `(prompt, output)`."""
    user = [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 6))]
    (start, _), (prompt, output) = requests[0], requests[-1]
    if kind == "appended":
        return [*prompt, *output, *user]
    if kind == "stripped":  # of each output, what follows its reasoning
        return [*start, *(token for _, output in requests for token in output[len(output) // 2 :]), *user]
    if kind == "compacted":  # a summary, and the last output
        return [*start[:3], *user, *output]
    if kind == "cleared":  # the middle is gone
        return [*start, *user[:1], *output]
    return [*user, 5, 6]  # a subagent begins anew


KINDS = ("appended", "stripped", "compacted", "cleared", "subagent")


def scripted_rollout(rng, start, vocab_size, kinds=KINDS, num_requests=None, longest=9):
    """Return a rollout's requests, `(prompt, output)`: one of them generates nothing, if there are several."""
    requests = [(start, [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, longest))])]
    for number in range(1, num_requests or rng.randrange(1, 9)):
        prompt = history(rng, rng.choice(kinds), requests, vocab_size)
        length = 0 if number == 2 else rng.choice([1, 2, 3, longest])
        requests.append((prompt, [rng.randrange(3, vocab_size) for _ in range(length)]))
    return requests


def as_fields(rollouts):
    """Return the fields that a `rollout_func` returns, of lists of requests."""
    completions = [[token for _, output in requests for token in output] for requests in rollouts]
    return {
        "prompt_ids": [requests[0][0] for requests in rollouts],
        "completion_ids": completions,
        "logprobs": [[-6.4 - 0.1 * (token % 3) for token in line] for line in completions],
        "contexts": [[(prompt, len(output)) for prompt, output in requests] for requests in rollouts],
        "score": [float(sum(line) % 7) for line in completions],
    }


def as_one_line(fields, rollouts):
    """Return rollouts that only append as TRL takes them: what users said is masked in one completion."""
    lines, masks, log_probs = [], [], []
    for requests, own in zip(rollouts, fields["logprobs"], strict=True):
        line, mask = list(requests[0][0]), []
        for prompt, output in requests:
            assert prompt[: len(line)] == line
            mask += [0] * (len(prompt) - len(line)) + [1] * len(output)
            line = prompt + output
        own = iter(own)
        lines.append(line[len(requests[0][0]) :])
        masks.append(mask)
        log_probs.append([next(own) if generated else 0.0 for generated in mask])
    return {**fields, "completion_ids": lines, "env_mask": masks, "logprobs": log_probs, "contexts": None}


def without_padding(line, tokenizer):
    return tuple(token for token in line if token != tokenizer.pad_token_id)


class Scripted:
    """A `rollout_func` of the same rollouts for every trainer that asks as often, with `(prompt, output)` of each."""

    def __init__(self, as_one_line=False, ends=False, change=None, vocab_size=None, **options):
        self.calls, self.as_one_line, self.ends, self.change, self.options = 0, as_one_line, ends, change, options
        self.vocab_size = vocab_size
        self.requests = {}  # by the tokens of a rollout

    def __call__(self, prompts, trainer):
        rng = random.Random(1000 * self.calls + trainer.accelerator.process_index)
        self.calls += 1
        tokenizer = trainer._tokenizer
        vocab_size = self.vocab_size or len(tokenizer)
        rendered = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        rollouts = [scripted_rollout(rng, start, vocab_size, **self.options) for start in rendered]
        for requests in rollouts[::2] if self.ends else ():
            requests[-1][1][-1:] = [tokenizer.eos_token_id]
        fields = as_fields(rollouts)
        for index, requests in enumerate(rollouts):
            line = fields["prompt_ids"][index] + fields["completion_ids"][index]
            self.requests[without_padding(line, tokenizer)] = requests
        fields = as_one_line(fields, rollouts) if self.as_one_line else fields
        return fields if self.change is None else self.change(fields)


class OneRowPerRequest:
    """Stands before a trainer of TRL: a batch of one padded row per request gives its log-probabilities."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, num_kept, batch_size=None, compute_entropy=False, **options
    ):
        device, rows, places = input_ids.device, [], []
        for index, line in enumerate(input_ids.tolist()):
            for prompt, output in self.rollout_func.requests[without_padding(line, self._tokenizer)]:
                rows.append(prompt + output)
                places.append((index, len(prompt), len(output)))
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        valid = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        router = {"output_router_logits": True} if options.get("compute_aux_loss") else {}
        outputs = model(input_ids=ids, attention_mask=valid, use_cache=False, **router)
        log_probs = (outputs.logits.float() / self.temperature).log_softmax(-1)
        lines, entropy = [[] for _ in input_ids], [[] for _ in input_ids]
        for row, (index, num_prompt, num_output) in enumerate(places):
            own = log_probs[row, num_prompt - 1 : num_prompt + num_output - 1]
            lines[index].append(own.gather(-1, ids[row, num_prompt : num_prompt + num_output, None])[:, 0])
            entropy[index].append(-(own.exp() * own).sum(-1))
        found = [
            torch.stack([torch.nn.functional.pad(x, (0, num_kept - len(x))) for x in map(torch.cat, values)])
            for values in (lines, entropy)
        ]
        return found[0], found[1] if compute_entropy else None, outputs.aux_loss if router else None


class RolloutsForRLOO:
    """Gives TRL's RLOO, which takes no `rollout_func`, the completions of one."""

    def __init__(self, *args, rollout_func, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout_func = rollout_func

    def _tokenize_prompts(self, prompts):
        self.made = self.rollout_func(prompts, self)
        return self.made["prompt_ids"], None, {}

    def _generate_single_turn(self, *_):
        return self.made["completion_ids"]

    def _calculate_rewards(self, inputs, *others):
        for example, score in zip(inputs, self.made["score"], strict=True):
            example["score"] = score
        return super()._calculate_rewards(inputs, *others)


class StockGRPO(OneRowPerRequest, GRPOTrainer):
    """TRL's GRPO on one row per request."""


class StockRLOO(OneRowPerRequest, RolloutsForRLOO, RLOOTrainer):
    """TRL's RLOO on one row per request."""
