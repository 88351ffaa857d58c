"""How the rows of each batch run: at once, or in pieces that fit into memory (`wave_tokens`, `max_row_tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context
from functools import cached_property
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, logging
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention.row_group import RowGroup
from ..attention.varlen_plan import KEYS_PER_CALL
from ..cost.flops import head_sizes
from ..cost.memory import ActivationBytes
from ..data.collator import Batch
from ..images.reading import images_see_themselves
from ..recurrent.decoder import get_decoder, in_evaluation_mode
from ..recurrent.measurement import attention_of, path_dependent_layers
from ..trees.rows import TreePlan
from .enable import without_adapters
from .model_call import refuse_own_calls
from .router_loss import RouterRecorder
from .row_runner import PieceLoss, RowRunner
from .ulysses import get_gradient_scale
from .wave_plan import WavePlan
from .wrapped_model import SHARDED, wrapped_model


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

# Of free memory; the rest is for what is not counted: fragmentation, buffers, keys and values that wait.
_USABLE_SHARE = 0.8
_MULTIPLE = 256
# About 250 launches of 5 µs (`benchmarks/host_time.py` counts them), and half of an H100's peak in bfloat16.
SECONDS_PER_LAYER, OPERATIONS_PER_SECOND = 250 * 5e-6, 5e14
# Lengths of the two passes whose difference counts: multiples of the chunks in which scans run.
_SHORT, _LONG = 128, 384


class Pieces:
    """
    Decides how the rows of a trainer run.

    Takes a model with trees enabled, and the setting that bounds memory, if there is one. `knows_loss` says whether
    each piece knows its part of the loss beforehand, `has_router_loss` whether a load-balancing loss is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        accelerator: Accelerator,
        *,
        setting: str | None,
        knows_loss: bool,
        has_router_loss: bool,
    ) -> None:
        self._model, self._args, self._accelerator = model, args, accelerator
        self._base, self.setting, self._knows_loss = without_adapters(model), setting, knows_loss
        self._shares_rows = getattr(accelerator.parallelism_config, "sp_size", 1) > 1
        runs_in_pieces = setting is not None or self._shares_rows
        self._recorder = RouterRecorder(self._base) if has_router_loss and runs_in_pieces else None
        if runs_in_pieces:
            refuse_own_calls(self._base, setting or "sp_size")
        # Models take a lone token for a step of generation, and drop the mask that carries the tree to recomputation.
        self._is_hybrid = bool(path_dependent_layers(self._base))
        self._shows_images_whole = images_see_themselves(self._base)
        self._wave_tokens: int | None = None if args.wave_tokens == "auto" else args.wave_tokens
        self._is_compared = False

    @property
    def wave_tokens(self) -> int | None:
        """Largest number of tokens of a row that have activations at the same time; `None` if rows run whole."""
        if self._wave_tokens is None and self._args.wave_tokens is not None:
            tokens, reason = wave_tokens_that_fit(self._model, self._args)
            self._wave_tokens = on_shared_rows(tokens, self._accelerator, divides_layers=not self._is_hybrid)
            logger.info(f"wave_tokens='auto' is {self._wave_tokens}: {reason}.")
            if self._wave_tokens < self._smallest_wave:
                logger.warning(
                    f"wave_tokens='auto' is {self._wave_tokens}, and below about {self._smallest_wave} tokens a fast "
                    "GPU computes a wave of this model in less time than the host takes to launch it, and waits. More "
                    "tokens fit with gradient_checkpointing=True, offload_kv=True or more GPUs."
                )
        return self._wave_tokens

    @cached_property
    def _smallest_wave(self) -> int:
        """Number of tokens from which on a wave keeps the device busy."""
        return 1 if self._args.device.type == "cpu" else tokens_that_hide_launches(self._base)

    def plan(self, row: TreePlan) -> WavePlan:
        """Return the waves of a row: one, if it runs whole."""
        # History can wait with its activations if nothing has to run forward before: neither for a loss that reads all
        # pieces (of pairs, of a mixture's load), nor because the ranks of a sharded model make the same calls.
        is_sharded = self._accelerator.distributed_type in SHARDED
        return WavePlan.from_tree_plan(
            row,
            self.wave_tokens or row.length,
            keep_history=self._knows_loss and self._recorder is None and not is_sharded,
            smallest_wave=self._smallest_wave,
            allow_single_tokens=not self._is_hybrid,
            cut_images=not self._shows_images_whole,
        )

    def runner(
        self,
        model: nn.Module,
        rows: Sequence[Batch],
        plans: Sequence[WavePlan] | None = None,
        *,
        divisor: int = 1,
        loss: PieceLoss | None = None,
        is_own_loss: bool = False,
        trains: bool = True,
        group: RowGroup | None = None,
    ) -> RowRunner | None:
        """
        Return what runs the rows of a batch in place of a model, `None` if they run at once; all ranks must call.

        `model` is as the Trainer wrapped it, and `divisor` is what the Trainer divides its loss by. A loss of the
        user's own gets log-probabilities, which pieces alone return, be it one. `trains` says if a backward follows.
        """
        if self.setting is None and group is None:
            return None
        scale = 1 / divisor if group is None else 1 / (divisor * get_gradient_scale(model, group.size))
        runner = RowRunner(
            wrapped_model(model, self._accelerator, scale, group),
            rows,
            [self.plan(row["tree"].plan) for row in rows] if plans is None else plans,
            loss=loss,
            is_own_loss=is_own_loss,
            recorder=self._recorder,
            offload=self._args.offload_kv,
            group=group,
            compares=trains and not self._is_compared,
        )
        if runner.most_pieces == 1 and group is None and not is_own_loss:
            return None
        self._is_compared = self._is_compared or trains
        return runner


# `wave_tokens="auto"` ------------------------------------------------------------------------------------------------


def wave_tokens_that_fit(model: PreTrainedModel, args: TrainingArguments) -> tuple[int, str]:
    """Return how many tokens may have activations at once, and the calculation; `ValueError` if not even 256 fit."""
    itemsize = 2 if args.bf16 or args.fp16 else next(model.parameters()).element_size()
    per_token = _activation_bytes(model, args, itemsize) + _gathered_bytes(model, args.device, itemsize)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = free_bytes(args.device)
    # The first step allocates gradients and two moments, all in float32.
    left = int(_USABLE_SHARE * free) - 12 * num_trained
    tokens = left // per_token // _MULTIPLE * _MULTIPLE
    gib, mib = 2**30, 2**20
    reason = (
        f"{free / gib:.1f} GiB are free on {args.device}, of which {12 * num_trained / gib:.1f} GiB go to gradients "
        f"and optimizer and a fifth stays in reserve; a token needs {per_token / mib:.2f} MiB of activations"
    )
    if tokens < _MULTIPLE:
        raise ValueError(f"wave_tokens='auto' found no room for {_MULTIPLE} tokens: {reason}. Set wave_tokens.")
    return tokens, reason


def on_shared_rows(tokens: int, accelerator: Accelerator, *, divides_layers: bool) -> int:
    """Return how many tokens a wave may have: of ranks that share rows, which must all call, the smallest decides."""
    size: int = getattr(accelerator.parallelism_config, "sp_size", 1)
    if size == 1:
        return tokens
    least = int(accelerator.gather(torch.tensor([tokens], device=accelerator.device)).min())
    return least * size if divides_layers else least


def tokens_that_hide_launches(model: PreTrainedModel) -> int:
    """
    Return from how many tokens on an H100 computes a wave for longer than the host takes to launch it.

    With gradient checkpointing, a token takes eight operations per weight of a layer, of experts those that it visits.
    """
    layers = [module for module in get_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    experts_per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", None)

    def num_visited(weight: nn.Parameter) -> int:
        is_of_experts = weight.dim() == 3 and isinstance(experts_per_token, int)
        return weight[:experts_per_token].numel() if is_of_experts else weight.numel()

    weights = sum(num_visited(weight) for layer in layers for weight in layer.parameters())
    if not weights:  # other ranks hold them
        return 1
    return int(len(layers) * SECONDS_PER_LAYER * OPERATIONS_PER_SECOND / (8 * weights))


def _activation_bytes(model: PreTrainedModel, args: TrainingArguments, itemsize: int) -> int:
    """Return the activations of a token: counted, or measured where layers are recurrent or convolve."""
    checkpointing, base = bool(args.gradient_checkpointing), without_adapters(model)
    if not path_dependent_layers(base):
        return ActivationBytes.from_config(model.config, itemsize, checkpointing=checkpointing).per_token
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
        return measure_activation_bytes(base, args.device, checkpointing=checkpointing)


def _gathered_bytes(model: PreTrainedModel, device: torch.device, itemsize: int) -> int:
    """Return what a varlen kernel adds per token: gradients of gathered keys and values for every query head."""
    config = model.config.get_text_config()
    is_varlen = str(config._attn_implementation).startswith("tree_varlen")
    if not is_varlen and (device.type != "cuda" or itemsize != 2):
        return 0  # block by block
    heads, _, head_dim = head_sizes(config)
    return KEYS_PER_CALL * 2 * heads * head_dim * itemsize


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device, including those that PyTorch holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def measure_activation_bytes(model: PreTrainedModel, device: torch.device, *, checkpointing: bool) -> int:
    """
    Return the bytes per token that the decoder of a model saves for its backward pass.

    It runs on 128 and on 384 tokens, so that weights and buffers drop out of the difference. With gradient
    checkpointing, a layer saves its input, and one layer at a time everything.
    """
    decoder = get_decoder(model)
    # Without checkpointing, and without eager attention, whose scores no row keeps.
    with in_evaluation_mode(decoder), attention_of(model, "tree_torch"):
        # In an empty context there is no tree, which the row of the step has by now.
        short, long = (Context().run(_saved_bytes, decoder, length, device) for length in (_SHORT, _LONG))
    per_layer = [(b - a) // (_LONG - _SHORT) for a, b in zip(short[1:], long[1:], strict=True)]
    if not checkpointing or not per_layer:
        return (long[0] - short[0]) // (_LONG - _SHORT)
    itemsize = next(model.parameters()).element_size()
    return int(len(per_layer) * model.config.get_text_config().hidden_size * itemsize + max(per_layer))


def _saved_bytes(decoder: nn.Module, length: int, device: torch.device) -> list[int]:
    """Return the bytes that a forward pass saves: in all, and in each layer that can be checkpointed."""
    held: dict[int, torch.Tensor] = {}
    by_layer: list[int] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its address
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    def enter(*_: object) -> None:
        by_layer.append(-total())

    def leave(*_: object) -> None:
        by_layer[-1] += total()

    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [hook for x in layers for hook in (x.register_forward_pre_hook(enter), x.register_forward_hook(leave))]
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            decoder(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [total(), *by_layer]
