"""
Ways of training one conversation, as compared by the benchmarks.

The single pass and all kinds of N-pass are the same training step. `last_turn` and `keep_reasoning` are what people do
to avoid the cost of N-pass: they train less, or on contexts that do not occur at inference.

Every mode runs the decoder on all of its tokens and the LM head only on targets, in chunks whose gradient is computed
right away, so that logits cost the same in every mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

from trl_singlepass import PrefixTree, Sample
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import row_context
from trl_singlepass.reference.timing import Schedule, make_step
from trl_singlepass.trees.rows import Row


HEAD_CHUNK = 1024
PACKED = "benchmark_packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    lengths: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run one causal call per sample of a packed row: what varlen kernels do, with PyTorch's attention."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


class Step:
    """Model and samples on their device; the `loss()` of a mode runs forward and backward."""

    def __init__(self, model: Any, samples: Sequence[Sample], kept: Sequence[Sample] = ()) -> None:
        self.model, self.device = model, model.device
        self.samples, self.kept = samples, kept
        self.tokens = [torch.from_numpy(sample.token_ids.copy()).to(self.device) for sample in samples]
        self.num_targets = sum(len(sample) - sample.prompt_length for sample in samples)

    def decoder(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the last hidden states, of shape `(batch, length, hidden)`."""
        return self.model.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state

    def backward(self, hidden: torch.Tensor, targets: torch.Tensor) -> float:
        """Return the loss of hidden states `(targets, hidden)`, after backpropagating it through the model."""
        leaf, loss = hidden.detach().requires_grad_(), 0.0
        for chunk, chunk_targets in zip(leaf.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            logits = self.model.lm_head(chunk).float()
            part = F.cross_entropy(logits, chunk_targets, reduction="sum") / self.num_targets
            part.backward()
            loss += float(part.detach())
        hidden.backward(leaf.grad)
        return loss

    def completions(self, hidden: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states that predict completion tokens, and these tokens; `hidden`: `(length, hidden)`."""
        starts = [sample.prompt_length for sample in self.samples]
        triples = list(zip(hidden, self.tokens, starts, strict=True))
        predicting = [states[start - 1 : len(tokens) - 1] for states, tokens, start in triples]
        return torch.cat(predicting), torch.cat([tokens[start:] for _, tokens, start in triples])


def npass_sequential(step: Step) -> Callable[[], float]:
    """One forward and backward per sample."""
    parts = [(tokens[None], sample.prompt_length) for tokens, sample in zip(step.tokens, step.samples, strict=True)]

    def loss() -> float:
        return sum(step.backward(step.decoder(ids)[0, start - 1 : -1], ids[0, start:]) for ids, start in parts)

    return loss


def npass_padded(step: Step) -> Callable[[], float]:
    """All samples in one batch. Right padding needs no mask, since no token attends to later ones."""
    input_ids = pad_sequence(step.tokens, batch_first=True)
    return lambda: step.backward(*step.completions(list(step.decoder(input_ids))))


def npass_packed(step: Step) -> Callable[[], float]:
    """All samples in one row without padding, each attending to itself."""
    step.model.set_attn_implementation(PACKED)
    lengths = [len(tokens) for tokens in step.tokens]
    positions = torch.cat([torch.arange(length, device=step.device) for length in lengths])[None]
    input_ids = torch.cat(step.tokens)[None]

    def loss() -> float:
        hidden = step.decoder(input_ids, position_ids=positions, lengths=lengths)[0]
        return step.backward(*step.completions(hidden.split(lengths)))

    return loss


def single_pass(step: Step) -> Callable[[], float]:
    """The samples' prefix tree in one row."""
    enable_tree(step.model)
    row = Row.from_tree(PrefixTree.from_samples(step.samples)).columns()
    batch = DataCollatorForSinglePass(pad_token_id=0)([row])
    tensors = {name: value.to(step.device) for name, value in batch.items()}
    labels, tree = tensors["labels"][0], tensors["tree"]
    predicting = (labels != -100).nonzero()[:, 0] - 1
    inputs = {name: tensors[name] for name in ("input_ids", "position_ids", "attention_mask")}

    def loss() -> float:
        with row_context(tree):
            hidden = step.decoder(**inputs)[0]
        return step.backward(hidden[predicting], labels[predicting + 1])

    return loss


def waves(step: Step) -> Callable[[], float]:
    """The same row, in the smallest waves that keep the history next to any branch."""
    enable_tree(step.model)
    in_waves = make_step(step.model, step.samples, Schedule.WAVES)
    return lambda: float(in_waves())


def last_turn(step: Step) -> Callable[[], float]:
    """The last sample alone."""
    return npass_sequential(Step(step.model, step.samples[-1:]))


def keep_reasoning(step: Step) -> Callable[[], float]:
    """All turns in one causal row, in contexts that keep the reasoning of earlier turns."""
    return causal_row(Step(step.model, step.kept))


def causal_row(step: Step) -> Callable[[], float]:
    """A plain causal row with as many tokens and targets as the tree: a yardstick for memory, not for the loss."""
    row = PrefixTree.from_samples(step.samples)
    input_ids = torch.from_numpy(row.input_ids.copy()).to(step.device)[None]
    labels = torch.from_numpy(row.labels.copy()).to(step.device)
    predicting = (labels != -100).nonzero()[:, 0] - 1
    return lambda: step.backward(step.decoder(input_ids)[0][predicting], labels[predicting + 1])


_MODES = (single_pass, waves, npass_sequential, npass_padded, npass_packed, last_turn, keep_reasoning, causal_row)
MODES = {mode.__name__: mode for mode in _MODES}
