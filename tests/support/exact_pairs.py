"""A trainer on pairs in float64 beside N separate forwards per turn and trajectory, with TRL's own loss of both."""

from contextlib import contextmanager

import pytest
import torch
from trl import DPOTrainer
from trl.kernels import ChunkedLogProbFunction

from support.float64_comparison import TOLERANCE, assert_same_gradients, gradients_of
from support.pairs import SeparateForwards, batch_of
from support.trainers import dpo_trainer, perturbed
from trl_singlepass import render_samples
from trl_singlepass.engine.borrowed_state import attributes
from trl_singlepass.reference.verification import ForcedFloat64


class Float64LogProbs(ChunkedLogProbFunction):
    """TRL's fused head with a backward pass in float64; TRL accumulates in float32."""

    @staticmethod
    def backward(ctx, *gradients):
        with ForcedFloat64():
            return ChunkedLogProbFunction.backward(ctx, *gradients)


@contextmanager
def float64_head():
    """Run TRL's fused head in float64 within a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64LogProbs)
        yield


class ExactPairs:
    """
    A trainer on pairs in float64, its batch, and the same turns for separate forwards.

    The policy is `model` with smaller weights, so that sums of log-probabilities stay where losses are curved; the
    reference is a perturbed copy of it. `settings` are those of the trainer.
    """

    def __init__(self, tmp_path, tokenizer, pairs, model, kwargs=None, **settings):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 0.5
        settings = {"gradient_checkpointing": False, "per_device_train_batch_size": len(pairs), **settings}
        reference = perturbed(model, scale=0.01)
        self.trainer = dpo_trainer(tmp_path, tokenizer, pairs, model, reference, kwargs, **settings)
        trajectories = samples_of(pairs, tokenizer)
        self.policy = SeparateForwards(model, trajectories)
        self.reference = SeparateForwards(perturbed(model, scale=0.01), trajectories)
        with ForcedFloat64():
            self.batch = batch_of(self.trainer)

    def set_loss(self, loss_types=("sigmoid",), loss_weights=None, **settings):
        """Choose another loss: making a trainer takes longer than its loss."""
        defaults = {
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            "label_smoothing": 0.0,
        }
        self.trainer.loss_types = list(loss_types)
        self.trainer.loss_weights = loss_weights or [1.0] * len(loss_types)
        for name, value in {**defaults, **settings}.items():
            setattr(self.trainer, name, value)

    def assert_equal(self):
        """Assert that loss and all gradients are those of the separate forwards."""
        self.policy.model.zero_grad()
        self.trainer.model.zero_grad()
        with ForcedFloat64():
            expected = self._expected_loss()
            expected.backward(retain_graph=True)
            loss = self.trainer._compute_loss(self.trainer.model, self.batch, return_outputs=False)
            loss.backward()
        assert loss.dtype == torch.float64
        assert abs(float(loss.detach() - expected.detach())) <= TOLERANCE * abs(float(expected.detach()))
        assert_same_gradients(gradients_of(self.trainer.model), gradients_of(self.policy.model))

    def _expected_loss(self):
        """TRL's own loss of N separate forwards; the reference's outputs are read from the batch."""
        batch = self.policy.batch()
        with torch.no_grad():
            logps = DPOTrainer.compute_ref_log_probs(self.trainer, self.reference, batch)
        batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))
        with attributes(self.trainer, precompute_ref_logps=True):
            return DPOTrainer._compute_loss(self.trainer, self.policy, batch, return_outputs=False)


def samples_of(pairs, tokenizer):
    """Return the turns after the prompt of each trajectory, the chosen ones of all pairs first."""
    trajectories = []
    for side in ("chosen", "rejected"):
        for each in pairs:
            turns = render_samples(each["prompt"] + each[side], tokenizer)
            trajectories.append([turn for turn in turns if turn.message_index >= len(each["prompt"])])
    return trajectories
