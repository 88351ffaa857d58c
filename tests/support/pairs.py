"""Preference pairs, and what N separate forwards per turn and trajectory compute of them."""

from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence

from support.conversations import chat, without_reasoning


def pair(turns=1, seed=0, rejected_turns=None):
    """Return a pair that answers the same first question; later turns ask different ones."""
    chosen, rejected = chat(turns, seed), chat(rejected_turns or turns, seed + 50)
    return {"prompt": chosen[:2], "chosen": chosen[2:], "rejected": rejected[2:]}


def pair_with_shared_turns(shared, turns, seed=0):
    """Return a pair whose trajectories have their first turns in common, behind a prompt of one question."""
    chosen, other = chat(turns, seed), chat(turns, seed + 50)
    border = 1 + 2 * shared
    return {"prompt": chosen[:2], "chosen": chosen[2:], "rejected": chosen[2:border] + other[border:]}


def plain(example):
    """Return a pair without reasoning, for templates that have no place for it."""
    return {name: without_reasoning(messages) for name, messages in example.items()}


SINGLE_TURNS = [pair(seed=seed) for seed in range(8)]
TRAJECTORIES = [pair(3, 0), pair(2, 1, rejected_turns=3), pair_with_shared_turns(1, 3, seed=2)]


def batch_of(trainer, pairs=slice(None)):
    """Return a batch of a trainer's prepared pairs."""
    rows = list(trainer.train_dataset)[pairs]
    return trainer._prepare_inputs(trainer.data_collator(rows))


class SeparateForwards:
    """
    A model in TRL's place that runs one ordinary forward per turn and trajectory, without any tree.

    `trajectories` holds lists of samples, the chosen ones of all pairs first. Called as TRL calls a model, it returns
    the outputs of TRL's fused head, of shape `(trajectories, tokens of the longest)`.
    """

    def __init__(self, model, trajectories):
        self.model, self.trajectories = model, trajectories
        self._outputs = None

    def __call__(self, output_router_logits=False, **inputs):
        if self._outputs is None:  # one graph for all losses
            lines = [[self.outputs_of_turn(sample) for sample in samples] for samples in self.trajectories]
            outputs = {
                name: pad_sequence([torch.cat([turn[name] for turn in line]) for line in lines], batch_first=True)
                for name in lines[0][0]
            }
            aux_loss = self.balancing_loss() if output_router_logits else None
            self._outputs = SimpleNamespace(**outputs, aux_loss=aux_loss)
        return self._outputs

    def outputs_of_turn(self, sample):
        """Per-token outputs of the completion of one turn."""
        ids, start = torch.tensor(sample.token_ids), sample.prompt_length
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]
        log_p = logits.log_softmax(-1)
        return {
            "log_probs": log_p[torch.arange(len(ids) - start), ids[start:]],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == ids[start:],
        }

    def balancing_loss(self):
        """The load-balancing loss of a mixture of experts, with all turns in one padded batch."""
        ids = [torch.tensor(sample.token_ids) for samples in self.trajectories for sample in samples]
        mask = pad_sequence([torch.ones_like(line) for line in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True)
        return self.model(input_ids=padded, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss

    def batch(self):
        """What TRL reads of a batch, beside the model: one line per trajectory, behind a token of prompt."""
        lengths = [sum(len(sample) - sample.prompt_length for sample in samples) for samples in self.trajectories]
        mask = pad_sequence([torch.tensor([0] + [1] * length) for length in lengths], batch_first=True)
        return {"input_ids": torch.ones_like(mask), "attention_mask": mask, "completion_mask": mask}
