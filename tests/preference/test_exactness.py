"""Loss and all gradients equal N separate forwards per turn and trajectory, in float64, for every loss of TRL."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer

from support.chat_tokenizers import make_tokenizer
from support.float64_comparison import TOLERANCE, assert_same_gradients, float64_head, gradients_of
from support.pairs import TRAJECTORIES, batch_of, pair, plain
from support.slow import slow_but_for
from support.tiny_models import model_of_type, tiny_model
from support.trainers import dpo_trainer, perturbed
from trl_singlepass import render_samples
from trl_singlepass.engine.borrowed_state import attributes
from trl_singlepass.reference.verification import ForcedFloat64


QUESTION = [{"role": "user", "content": "Tell me all that you know about the numbers. " * 5}]
# The second and the last one answer the same question.
SEVERAL = [*TRAJECTORIES, {**pair(2, 7), "prompt": QUESTION}, {**pair(1, 8), "prompt": QUESTION}]
LOSSES = {
    **{name: {"loss_types": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard")},
    **{name: {"loss_types": [name]} for name in ("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")},
    "sigmoid_norm": {"loss_types": ["sigmoid_norm"]},
    "exo_pair": {"loss_types": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.1},
    "mixture": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mean over the batch": {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.5, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha of ipo": {"loss_types": ["ipo"], "ld_alpha": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "use_weighting": {"use_weighting": True},
}
# Name -> model, template. All templates strip earlier reasoning, but that of Llama, which keeps the whole history.
FAMILIES = {
    "qwen3": (lambda size: tiny_model("qwen3", size, attn_implementation="sdpa"), "qwen3"),
    "llama": (lambda size: tiny_model("llama", size, attn_implementation="sdpa"), "llama3"),
    "qwen3-moe": (lambda size: tiny_model("qwen3-moe", size, attn_implementation="sdpa"), "qwen3"),
    "gpt-oss": (lambda size: tiny_model("gpt-oss", size), "gptoss"),
    "qwen3.5": (lambda size: model_of_type("qwen3_5_text", vocab_size=size), "qwen3_5_think"),
}


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


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A trainer in float64 beside separate forwards; with settings of parts, on pairs that make several."""
    family, settings = request.param
    make_model, template = FAMILIES[family]
    tokenizer = make_tokenizer(template)
    pairs = SEVERAL if settings else TRAJECTORIES
    pairs = list(map(plain, pairs)) if template == "llama3" else pairs
    with float64_head():
        # Weights of WPO need one more output of the head, which the trainer asks for when it is made.
        settings = {"use_weighting": True, **settings}
        yield ExactPairs(tmp_path_factory.mktemp("out"), tokenizer, pairs, make_model(len(tokenizer)), **settings)


# All losses of one family always, one loss of the others; what is TRL's own code does not depend on the family.
WHOLE = [((family, {}), name) for family in FAMILIES for name in LOSSES]
QUICK = [each for each in WHOLE if each[0][0] == "llama" or each[1] == "sigmoid"]
ROWS = {"max_row_tokens": 260}
# The history of a pair is longer than a wave.
WAVES = {"wave_tokens": 60}
BOTH = {**ROWS, **WAVES}
QUICK += [(("llama", ROWS), "aot"), (("llama", WAVES), "mean over the batch"), (("qwen3-moe", BOTH), "sigmoid")]
IN_PARTS = [
    *((("llama", settings), name) for settings in (ROWS, WAVES) for name in ("aot", "mean over the batch")),
    *((("llama", settings), name) for settings in (ROWS, WAVES) for name in ("use_weighting", "ld_alpha of ipo")),
    *(((family, own), "sigmoid") for family in FAMILIES for own in (ROWS, WAVES, BOTH) if family != "gpt-oss"),
    # Its system prompt is long.
    *((("gpt-oss", settings), "sigmoid") for settings in ({"max_row_tokens": 600}, WAVES)),
    (("llama", {**WAVES, "offload_kv": True}), "sigmoid"),
]


@pytest.mark.parametrize(("case", "name"), slow_but_for(QUICK, [*WHOLE, *IN_PARTS]), indirect=["case"], ids=str)
def test_loss_and_gradients_equal_separate_forwards(case, name):
    rows, args = case.batch["tree"].rows, case.trainer.args
    runner = case.trainer._pieces.runner(case.trainer.model, rows, trains=False)
    assert (runner is None) == (args.max_row_tokens is None and args.wave_tokens is None)
    assert runner is None or runner.num_pieces > 2
    assert "not trained" not in case.trainer.train_dataset.info.description  # no turn is cut
    case.set_loss(**LOSSES[name])
    case.assert_equal()
