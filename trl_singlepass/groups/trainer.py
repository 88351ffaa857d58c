"""
`SinglePassGRPOTrainer` and `SinglePassRLOOTrainer`: TRL's trainers, with the completions of a batch on prefix trees.

Generation, rewards, advantages, losses and logs are TRL's. What differs is where log-probabilities come from: lines
that begin alike share what they have in common, of the policy, the old policy and the reference alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from ..attention.registry import own_attention
from ..data.collator import Batch, Collator, DataCollatorForSinglePass
from ..data.preparation import say
from ..engine.enable import without_adapters
from ..engine.model_call import check_receipt
from ..engine.pieces import Pieces
from ..engine.row_runner import RowRunner
from ..images.loading import image_loader_of
from ..images.placeholders import placeholders_of
from ..training.compatibility import read_images
from ..training.config import complete_config
from ..training.mixin import ReferenceMixin
from ..training.refusals import ENGINES, GROUPS, check
from .config import SinglePassGRPOConfig, SinglePassRLOOConfig
from .contexts import RequestLines, Rollout, read_rollouts
from .images import LineImages, number_images
from .lines import PaddedLines


# Below this, rows save less than building them costs, and lines run as TRL runs them.
_LEAST_SHARING = 1.03
_NUM_PROMPTS = 64  # of the forecast
# Losses whose mean over a step is the same however its samples are divided among its batches.
_ANY_ORDER = frozenset({"grpo", "dr_grpo", "dapo", "cispo", "vespo", "sapo", "luspo"})

Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities and entropies, of shape `(num_lines, completion_length)`, and the load-balancing loss."""


class GroupsMixin(ReferenceMixin):
    """What both trainers override; it stands before TRL's."""

    _pieces: Pieces
    _last_loaded_step: int
    # Read by rollouts of agents: metrics of a batch, and the tools of each of its rollouts.
    _log_metric: Callable[[str, float], None]
    _sync_tool_dicts: list[dict[str, Callable[..., Any]]]
    _async_tool_dicts: list[dict[str, Callable[..., Any]]]
    _buffered_inputs: list[Batch] | None
    _runner: RowRunner | None = None  # of the loss that is being computed
    _rollouts: Sequence[Rollout] | None = None  # of the lines that are being scored, if requests made them
    _rollout_func: Callable[..., dict[str, Any]] | None = None
    _rolled_out: Mapping[str, Any] | None = None  # what it returned for the batch that is being scored
    _placeholder: int | None = None  # token that stands for images
    _reads_env_mask: ClassVar = True

    def __init__(
        self, model: Any, *args: Any, rollout_func: Callable[..., dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, *args, **kwargs)
        if rollout_func is not None:
            self.rollout_func = rollout_func
        check(self._situation, ENGINES, GROUPS)
        self._run_on_trees()
        self._pieces = self._make_pieces("wave_tokens", "max_row_tokens")
        self._row_collator = DataCollatorForSinglePass(self._tokenizer.pad_token_id)
        self._why_no_images = self._read_images()
        if self.accelerator.is_main_process:
            say(forecast_sharing(self.train_dataset, self.processing_class, self.args), logging.INFO)

    def _read_images(self) -> str | None:
        """Make the policy and its reference read images on trees; return why not, if they cannot."""
        if not isinstance(self.processing_class, ProcessorMixin):
            return None  # nothing gives them images
        self._row_collator.load_images = image_loader_of(self.processing_class)
        try:
            read_images(self._situation, self._row_collator, *self._models)
            self._placeholder = placeholders_of(self.processing_class).token_id
        except ValueError as error:
            return str(error)
        return None

    def _checked_collator(self, collator: Collator) -> Collator:
        return collator  # which makes no rows

    @property
    def rollout_func(self) -> Callable[..., dict[str, Any]] | None:
        """What makes rollouts in place of TRL's generation; the field `contexts` of what it returns is taken out."""
        return None if self._rollout_func is None else self._roll_out

    @rollout_func.setter
    def rollout_func(self, function: Callable[..., dict[str, Any]] | None) -> None:
        self._rollout_func = function

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Return rollouts in TRL's fields, and keep the requests that made them."""
        assert self._rollout_func is not None
        output = dict(self._rollout_func(prompts, trainer))
        if missing := sorted({"prompt_ids", "completion_ids", "logprobs"} - output.keys()):
            raise ValueError(f"rollout_func must return keys {missing} in its output dict.")
        vocab_size = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
        self._rollouts = read_rollouts(output, vocab_size, self._placeholder, makes_contexts=not self._reads_env_mask)
        output.pop("contexts", None)
        self._rolled_out = output
        return output

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """Score each token in the prompt of its request, where a `rollout_func` says which."""
        self._rollouts = self._rolled_out = None
        output: Batch = super()._generate_and_score_completions(inputs)
        rollouts: Sequence[Rollout] | None = self._rollouts
        if rollouts is not None:
            output["rollouts"] = rollouts
        self._rollouts = self._rolled_out = None
        return output

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        """Let batches hold lines that begin alike; TRL shuffles the lines of a step before it divides them."""
        before = self._buffered_inputs
        inputs: Batch = super()._prepare_inputs(generation_batch)
        buffered = self._buffered_inputs
        if not self.model.training or buffered is None or buffered is before or not self._may_be_ordered():
            return inputs
        num_batches = self.args.gradient_accumulation_steps
        steps = [buffered[start : start + num_batches] for start in range(0, len(buffered), num_batches)]
        self._buffered_inputs = [batch for step in steps for batch in _grouped(step)]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the model's own attention: continuous batching knows no other, and nothing here has a tree."""
        with own_attention(without_adapters(self._models[-1])):
            return super()._generate_single_turn(*args, **kwargs)

    def _may_be_ordered(self) -> bool:
        """Return whether the loss of a step is the same in any order of its lines; means over tokens are not."""
        args = self.args
        return (
            getattr(args, "loss_type", "grpo") in _ANY_ORDER
            and getattr(args, "top_entropy_quantile", 1.0) == 1.0
            and not getattr(self, "_entropy_bonus_enabled", False)
            and not self.aux_loss_enabled
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Scores:
        """Score completions on trees; TRL runs each line with its whole prompt."""
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        if self._rollouts is not None:
            return self._score_requests(model, input_ids, attention_mask, logits_to_keep, batch_size, images, options)
        padded = self._divided(input_ids, attention_mask, batch_size or len(input_ids), images)
        if not self._runs_on_trees(padded):
            if torch.is_grad_enabled():
                self._count([], attention_mask[:, -logits_to_keep:], int(attention_mask.sum()))
            stock: Scores = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options, **images
            )
            return stock
        return _joined([self._score(model, lines, logits_to_keep, **options) for lines in padded])

    def _score_requests(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_kept: int,
        size: int | None,
        images: Batch,
        options: dict[str, bool],
    ) -> Scores:
        """Score the completions of rollouts request by request; the arguments are those of lines."""
        if images.get("pixel_values") is not None:
            raise ValueError("contexts with images: requests cannot show any yet. Leave out contexts, or the images.")
        assert self._rollouts is not None
        ids, mask = input_ids[:, -num_kept:], attention_mask[:, -num_kept:]
        starts, size = range(0, len(ids), size or len(ids)), size or len(ids)
        parts = [slice(start, start + size) for start in starts]
        lines = [RequestLines.from_rollouts(self._rollouts[part], ids[part], mask[part]) for part in parts]
        on_trees, scores = self._runs_on_trees([part.padded for part in lines]), []
        for part in lines:
            own, kept = part.padded, part.is_output.shape[1]
            if on_trees:
                found = self._score(model, own, kept, **options)
            else:
                if torch.is_grad_enabled():
                    self._count([], own.attention_mask[:, -kept:], int(own.attention_mask.sum()))
                found = super()._get_per_token_logps_and_entropies(
                    model, own.input_ids, own.attention_mask, kept, **options
                )
            entropies = None if found[1] is None else part.in_rollouts(found[1])
            scores.append((part.in_rollouts(found[0]), entropies, found[2]))
        return _joined(scores)

    def _divided(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, size: int, images: Batch
    ) -> list[PaddedLines] | None:
        """Return lines in batches of `size`; `None` if trees cannot hold them as the model reads them."""
        shown = None
        if images.get("pixel_values") is not None:
            if self._why_no_images is not None:
                if self._why_no_images and self.accelerator.is_main_process:
                    say(f"Prompts with images run as TRL runs them: {self._why_no_images}", logging.WARNING)
                self._why_no_images = ""  # it has been said
                return None
            is_placeholder = (input_ids == self._placeholder) & attention_mask.bool()
            shown = LineImages.find(is_placeholder.cpu().numpy(), images)
            if shown is None:
                return None
        whole = PaddedLines(input_ids, attention_mask, shown)
        return whole.split(size) if whole.are_without_gaps else None

    def _runs_on_trees(self, padded: Sequence[PaddedLines] | None) -> TypeGuard[Sequence[PaddedLines]]:
        """Return whether trees can hold these lines, and save something; all ranks decide alike, as they meet."""
        # In several pieces, rows bound memory too.
        saves = padded is not None and (
            self._pieces.setting is not None or max(lines.sharing_factor for lines in padded) >= _LEAST_SHARING
        )
        votes = self.accelerator.gather(torch.tensor([[padded is not None, saves]], device=self.accelerator.device))
        return bool(votes[:, 0].all() and votes[:, 1].any())

    def _count(self, rows: Sequence[Batch], is_scored: torch.Tensor, num_unshared: int = 0) -> None:
        self._counts.add(rows, self.accelerator.gather(is_scored.sum()[None]).sum(), num_unshared)

    def _score(
        self,
        model: nn.Module,
        padded: PaddedLines,
        logits_to_keep: int,
        *,
        compute_entropy: bool,
        compute_aux_loss: bool,
    ) -> Scores:
        """Score lines that run together."""
        is_scored = torch.zeros_like(padded.attention_mask)
        is_scored[:, -logits_to_keep:] = 1
        collator = padded.collator(self._row_collator)
        view, labels = padded.merge(is_scored, collator, self.args.max_row_tokens)
        trains = torch.is_grad_enabled()
        if trains:
            self._count(view.rows, padded.attention_mask[:, -logits_to_keep:])
        self._self_check.check(model, view.rows, collator)
        divisor = 1 if self.loss_is_scaled_for_ga else getattr(self, "current_gradient_accumulation_steps", 1)
        runner = self._pieces.runner(model, view.rows, divisor=divisor, trains=trains)
        self._runner = runner if trains else self._runner
        router = {"output_router_logits": True} if compute_aux_loss else {}
        with self.accelerator.autocast():
            outputs = (model if runner is None else runner)(
                input_ids=padded.input_ids, labels=labels, tree=view.handled(), fused_lm_head=True, **router
            )
        check_receipt(view)
        entropies = outputs.entropy[:, -logits_to_keep:] if compute_entropy else None
        return outputs.log_probs[:, -logits_to_keep:], entropies, outputs.aux_loss if compute_aux_loss else None

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Run the backward of all pieces but the last, where a batch runs in several."""
        self._runner, self._rollouts = None, inputs.get("rollouts")
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        runner: RowRunner | None = self._runner
        self._runner = self._rollouts = None
        return loss if runner is None or not loss.requires_grad else runner.backward(loss)


def _joined(parts: Sequence[Scores]) -> Scores:
    """Return scores of lines one after the other."""
    log_probs, entropies, aux_losses = zip(*parts, strict=True)
    return (
        torch.cat(log_probs),
        None if entropies[0] is None else torch.cat(entropies),
        None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
    )


def _grouped(step: Sequence[Batch]) -> list[Batch]:
    """Return the batches of a step with its lines in the order of their tokens: equal beginnings lie together."""
    size = len(step[0]["prompt_ids"])
    batches = list(map(split_pixel_values_by_grid, step))
    whole = {name: _join([batch[name] for batch in batches]) for name in step[0]}
    number = len(step) * size
    images = number_images(unsplit_pixel_values_by_grid(whole))[0] if "pixel_values" in whole else [[]] * number

    def tokens(part: str, line: int) -> list[int]:
        return whole[f"{part}_ids"][line][whole[f"{part}_mask"][line].bool()].tolist()

    order = sorted(range(number), key=lambda i: (tokens("prompt", i), images[i], tokens("completion", i)))

    def take(values: Any, lines: list[int]) -> Any:
        if isinstance(values, torch.Tensor) and values.ndim:
            return values[lines]
        return [values[i] for i in lines] if isinstance(values, list) else values

    chosen = (order[start : start + size] for start in range(0, number, size))
    return [unsplit_pixel_values_by_grid({name: take(x, lines) for name, x in whole.items()}) for lines in chosen]


def _join(values: list[Any]) -> Any:
    """Return what the batches of a step have under one name, line by line; what is not by line stays as it is."""
    first = values[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(values)
    return [value for of_batch in values for value in of_batch] if isinstance(first, list) else first


def forecast_sharing(dataset: Any, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, args: Any) -> str:
    """Return a line for the log, from the first prompts and completions at full length: shorter ones share more."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    options = getattr(args, "chat_template_kwargs", None) or {}
    lengths = []
    for prompt in (example["prompt"] for example in islice(iter(dataset), _NUM_PROMPTS)):
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **options)
        lengths.append(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
    together = min(args.num_generations, args.per_device_train_batch_size)
    factor = sharing_factor(lengths, together, args.max_completion_length)
    median = sorted(lengths)[len(lengths) // 2]
    line = (
        f"prompts of about {median} tokens, {together} completions of at most {args.max_completion_length} in a batch"
    )
    if factor < 1.1:
        return f"Trees save little here ({line}): at least a sharing factor of {factor:.2f}."
    return f"Sharing factor of at least {factor:.2f}, by {line}."


def sharing_factor(prompt_lengths: Sequence[int], num_together: int, completion_length: int) -> float:
    """
    Return tokens of lines ÷ tokens of trees.

    Prompts of 100 tokens with 4 completions of 50 make 4 · 150 = 600 tokens in lines and 100 + 4 · 50 = 300 in trees.
    """
    lines = sum(num_together * (length + completion_length) for length in prompt_lengths)
    trees = sum(length + num_together * completion_length for length in prompt_lengths)
    return lines / trees


class SinglePassGRPOTrainer(GroupsMixin, GRPOTrainer):
    """
    Trainer that computes GRPO's loss with the shared prefixes of completions run once.

    A drop-in replacement of [`~trl.GRPOTrainer`], with its arguments. The completions of a prompt share the prompt,
    and all else that they begin with alike. `args` is a [`SinglePassGRPOConfig`]; a [`~trl.GRPOConfig`] gets the
    settings that it lacks, at their defaults.

    Raises:
        `ValueError`: If a setting or model cannot be trained on trees; the error names the cause and a fix.

    Example: `SinglePassGRPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=dataset).train()`.
    """

    _tag_names: ClassVar = ["trl", "grpo", "single-pass"]
    _name = "SinglePassGRPO"

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, complete_config(args, SinglePassGRPOConfig, model), *others, **kwargs)

    def _tool_call_loop(
        self, prompts: Any, prompt_ids: Any, ids: Any, completions: Any, logprobs: Any, *_: Any
    ) -> Any:
        """Leave rollouts of several requests as they are: their tools have been called."""
        output = self._rolled_out
        if output is None or self._rollouts is None:
            return super()._tool_call_loop(prompts, prompt_ids, ids, completions, logprobs, *_)
        counts = (sum(output.get(name, ())) for name in ("tool_calls", "tool_failures"))
        return output.get("env_mask"), completions, ids, logprobs, *counts, [[] for _ in ids]


class SinglePassRLOOTrainer(GroupsMixin, RLOOTrainer):
    """
    Trainer that computes RLOO's loss with the shared prefixes of completions run once.

    A drop-in replacement of [`~trl.RLOOTrainer`], as [`SinglePassGRPOTrainer`] is of [`~trl.GRPOTrainer`]. It also
    takes a `rollout_func`, which means what it means for [`~trl.GRPOTrainer`]; RLOO reads no `logprobs`.
    """

    _tag_names: ClassVar = ["trl", "rloo", "single-pass"]
    _name = "SinglePassRLOO"
    _reads_env_mask: ClassVar = False

    def __init__(self, model: Any, reward_funcs: Any, args: Any = None, *others: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, complete_config(args, SinglePassRLOOConfig, model), *others, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Make rollouts here, where TRL begins to generate."""
        if self.rollout_func is None:
            return super()._tokenize_prompts(prompts)
        if self.use_vllm and self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        return self.rollout_func(prompts, self)["prompt_ids"], None, {}

    def _generate_single_turn(self, *prompts: Any) -> Any:
        made = self._rolled_out
        return super()._generate_single_turn(*prompts) if made is None else made["completion_ids"]

    def _calculate_rewards(self, inputs: Any, *others: Any) -> Any:
        """Hand reward functions what a `rollout_func` returned beside TRL's fields."""
        for name, values in (self._rolled_out or {}).items():
            if name not in ("prompt_ids", "completion_ids", "logprobs", "env_mask"):
                for index, example in enumerate(inputs):
                    example[name] = values[index] if isinstance(values, list) else values
        return super()._calculate_rewards(inputs, *others)
