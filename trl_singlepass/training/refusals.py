"""
What a single pass refuses: one table, from which errors and `docs/limits.md` are printed.

A line of the table says what is refused and when, why, and what to do instead. Its texts are Markdown, from which
errors leave out the backticks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import transformers
import trl
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from ..attention.registry import TREE_ATTENTION
from .sharding import PREFETCHED
from .situation import Found, Situation, before, num_launched


@dataclass(frozen=True)
class Refusal:
    """Something that does not work; errors name it by what `when` finds, if that says more than the page does."""

    what: str
    why: str
    instead: str
    when: Callable[[Situation], Found] | None = None  # if not given: the setting is set that `what` names
    error: type[Exception] = ValueError

    def found(self, run: Situation) -> Found:
        """Return whether a run has it, or the words for it with its value."""
        return run.has(self.what.strip("`")) if self.when is None else self.when(run)


@dataclass(frozen=True)
class Scope:
    """Where some things do not work: a heading for the page, the words of an error, a way out that all have."""

    title: str
    words: str  # `{setting}`: by which rows run in parts
    refusals: tuple[Refusal, ...]
    otherwise: str = ""

    def message(self, refusal: Refusal, found: str | bool, run: Situation) -> str:
        """Return the error of a refusal."""
        what = found if isinstance(found, str) else refusal.what
        error = f"{what} does not work {self.words}: {refusal.why}. {refusal.instead}{self.otherwise}."
        return error.replace("{setting}", run.setting).replace("`", "")


def check(run: Situation, *scopes: Scope) -> None:
    """Raise the error of the first refusal that applies in some scopes."""
    for scope in scopes:
        for refusal in scope.refusals:
            if found := refusal.found(run):
                raise refusal.error(scope.message(refusal, found, run))


def check_parts(run: Situation) -> None:
    """Refuse what does not go with `wave_tokens`, or with `max_row_tokens` of pairs, whichever is set."""
    if run.args.wave_tokens is not None:
        check(run, WAVES, PARTS)
    elif not isinstance(run.args, SFTConfig) and run.args.max_row_tokens is not None:
        check(run, PARTS)


def as_markdown() -> str:
    """Return the lists of the page that says what is refused."""
    return "\n\n".join(
        f"### {scope.title}\n\n"
        + "\n".join(f"- {refusal.what}: {refusal.why}. *{refusal.instead}.*" for refusal in scope.refusals)
        for scope in SCOPES
    )


def _needs_trl(release: str, why: str) -> Refusal:
    """Refuse older releases of TRL."""
    return Refusal(f"`trl` before {release}", why, f"Upgrade to `trl>={release}`", lambda run: before(trl, release))


def _not_shared(these: str, of_a_row: str) -> tuple[Refusal, Refusal]:
    """Refuse ranks that share layers or rows."""
    instead = "Set it to 1, and shard the model with FSDP2 or ZeRO-3"
    return (
        Refusal("`tp_size`", f"ranks that share layers have not been shown to train {these} exactly", instead),
        Refusal("`sp_size`", f"ranks that share a row do not share its {of_a_row}", instead),
    )


PACKAGES = Scope(
    "Packages",
    "without its package",
    (
        Refusal(
            "`attn_implementation='flash_attention_2'` or `3`",
            "neither flash-attn, flash-attn-3 for its third version, nor kernels is installed",
            "Run `pip install kernels`, or set `attn_implementation='sdpa'`",
            Situation.lacks_flash_attention,
            ImportError,
        ),
        Refusal(
            "`use_liger_kernel=True`",
            "it needs liger-kernel",
            "Run `pip install liger-kernel`, or leave it out",
            lambda run: run.args.use_liger_kernel and not is_liger_kernel_available(),
            ImportError,
        ),
    ),
)

# Losses of pairs that read the log-probability of each token, or divide by their number.
_PER_TOKEN_LOSSES = frozenset({"ipo", "sigmoid_norm", "sft"})
_TRAINS_USERS = (
    "it would also train what users and tools wrote; a single pass trains what the model says, turn by turn"
)
_TRAIN_ALL = "Leave it out, or use TRL's `SFTTrainer` to train every token of a conversation"

_NEFTUNE = Refusal(
    "`neftune_noise_alpha`",
    "its noise gets smaller with the length of a row, and tokens that turns share would have one for all of them",
    "Leave it unset",
)

TURNS = Scope(
    "Conversations and pairs",
    "for conversations and pairs in a single pass",
    (
        Refusal(
            "`truncation_mode='keep_end'`",
            "it would start each turn at a different token, and turns could no longer share a prefix",
            "Use `truncation_mode='keep_start'`, or `max_length=None`",
            lambda run: run.args.max_length is not None and run.differs("truncation_mode", "keep_start"),
        ),
        Refusal(
            "`accelerator_config={'dispatch_batches': True}`, but for streams of conversations",
            "it splits the batches of the first process among the others, which would break up trees",
            "Leave it out: each process then reads its own rows",
            Situation.dispatches_batches,
        ),
        Refusal(
            "`include_for_metrics=['inputs']`",
            "it asks for one row of tokens per example, but a batch is a single row",
            "Leave `'inputs'` out: the labels that `compute_metrics` receives are the tokens that count",
            lambda run: "inputs" in run.args.include_for_metrics,
        ),
        _NEFTUNE,
    ),
)

CONVERSATIONS = Scope(
    "Conversations",
    "for conversations in a single pass",
    (
        Refusal("`completion_only_loss=False`", _TRAINS_USERS, _TRAIN_ALL),
        Refusal("`assistant_only_loss=False`", _TRAINS_USERS, _TRAIN_ALL, Situation.trains_users),
        Refusal(
            "`packing_strategy` other than `'bfd'`",
            "it cuts sequences at arbitrary tokens, which would break up trees",
            "Use `packing_strategy='bfd'`, which packs whole conversations",
            lambda run: run.packing and run.differs("packing_strategy", "bfd"),
        ),
        Refusal(
            "`dataset_kwargs={'skip_prepare_dataset': True}`",
            "it passes messages on unprepared, but they must become rows of tokens first",
            "Leave it out",
            Situation.skips_preparation,
        ),
        Refusal(
            "`compute_loss_func` that is not a sum over targets",
            "a row holds several samples, and a loss that reads a sequence as a whole would take them for one",
            "If it is a sum over targets, each by its own logits, say so: `compute_loss_func.is_sum_over_targets = "
            "True`",
            lambda run: (
                run.compute_loss_func is not None
                and not getattr(run.compute_loss_func, "is_sum_over_targets", False)
                and "compute_loss_func"
            ),
        ),
    ),
)

PAIRS = Scope(
    "Pairs",
    "for pairs in a single pass",
    (
        _needs_trl("1.16", "its DPOTrainer has other methods"),
        Refusal(
            "`packing=False`",
            "the pairs of a batch always share rows, with the loss and gradients of separate ones",
            "Leave it out, and set `max_row_tokens` to bound a row",
        ),
        Refusal(
            "`loss_type='ipo'`, `'sigmoid_norm'` and `'sft'` with `turn_discount` or `turn_mean`",
            "it divides by the number of tokens itself, so that turns would be weighed twice",
            "Leave out one of them, or choose a loss that reads sums of log-probabilities, such as `'sigmoid'`",
            lambda run: not _PER_TOKEN_LOSSES.isdisjoint(run.args.loss_type) and run.beside_turn_weights("loss_type"),
        ),
        Refusal(
            "`use_weighting=True` with `turn_discount` or `turn_mean`",
            "it reads the log-probability of each token, which would already be weighed",
            "Leave out one of them",
            lambda run: run.args.use_weighting and run.beside_turn_weights("use_weighting"),
        ),
        Refusal(
            "`ld_alpha` with `turn_discount` or `turn_mean`",
            "it weighs the tokens past the length of the shorter trajectory a second time",
            "Leave out one of them",
            lambda run: run.args.ld_alpha is not None and run.beside_turn_weights("ld_alpha"),
        ),
        *_not_shared("pairs", "pairs"),
    ),
)

_OTHER_ADAPTER = "Use another adapter, such as `LoraConfig`"

ADAPTERS = Scope(
    "Adapters",
    "in a single pass",
    (
        Refusal(
            "`PeftMixedModel`",
            "it hides the model that TRL's fused head replaces the forward of",
            "Use a `PeftModel`: `get_peft_model(model, peft_config)`, without `mixed=True`",
            Situation.hides_the_model,
        ),
        Refusal(
            "prompt-learning adapters such as `PromptTuningConfig`",
            "it adds virtual tokens in front of the row, which belong to no branch of the tree",
            "Use an adapter that adds no tokens, such as `LoraConfig`",
            lambda run: run.adapter(lambda config: getattr(config, "is_prompt_learning", False)),
        ),
        Refusal(
            "`AdaptionPromptConfig`",
            "it calls the forward that the model had before TRL gave it a fused head, so TRL's trainers get no "
            "log-probabilities from it",
            _OTHER_ADAPTER,
            lambda run: run.adapter(lambda config: getattr(config, "is_adaption_prompt", False)),
        ),
        Refusal(
            "`alora_invocation_tokens` of `LoraConfig`",
            "the adapter acts from the last place on where a row has these tokens, and each turn of a row has them "
            "elsewhere",
            "Leave it out, or train one sample per turn (N-pass) with TRL's `SFTTrainer`",
            lambda run: (
                run.adapter(lambda config: bool(getattr(config, "alora_invocation_tokens", None)))
                and "alora_invocation_tokens"
            ),
        ),
        Refusal(  # by name, because the measured check compares outputs, and here only gradients are wrong
            "`velora_config` of `LoraConfig`, but for `init_type='random'`",
            "it computes gradients from a mean over all tokens of a row, so that those of a turn depend on what "
            "shares its row",
            "Set `init_type='random'` in `VeloraConfig`",
            lambda run: (
                run.adapter(
                    lambda config: getattr(getattr(config, "velora_config", None), "init_type", "random") != "random"
                )
                and "velora_config"
            ),
        ),
        Refusal(
            "`PolyConfig`",
            "it needs the task of each example (`task_ids`), which rows do not have",
            _OTHER_ADAPTER,
            lambda run: run.adapter(lambda config: getattr(config, "peft_type", None) == "POLY"),
        ),
        Refusal(
            "`XLoraConfig`",
            "it reads the hidden states of a first pass, which TRL's fused head does not return",
            _OTHER_ADAPTER + ", or train in a loop of your own with `enable_tree(model)`",
            lambda run: run.adapter(lambda config: getattr(config, "peft_type", None) == "XLORA"),
        ),
    ),
)

_OWN_LOSS = "it computes a loss of its own, which does not read weights"
_SAME_WEIGHT = "Leave it out, or give every message the same weight"

WEIGHTS = Scope(
    "Loss weights other than 1",
    "with loss weights other than 1",
    (
        _needs_trl("1.15", "it takes the loss from the model, which does not read weights"),
        Refusal("`loss_type='dft'`", _OWN_LOSS, _SAME_WEIGHT),
        Refusal("`label_smoothing_factor`", _OWN_LOSS, _SAME_WEIGHT),
        Refusal("`compute_loss_func`", _OWN_LOSS, _SAME_WEIGHT),
    ),
)

OLDER_TRL = Scope(
    "TRL before 1.15",
    "with this release of TRL",
    (
        Refusal(
            "models whose class has `accepts_loss_kwargs=False`",
            "it divides its loss by the tokens of each batch, so that a step would train a mean of batch means",
            "Upgrade to `trl>=1.15`, which computes the loss of each token itself",
            lambda run: not run.accepts_loss_kwargs and before(trl, "1.15") and type(run.base).__name__,
        ),
        Refusal(
            "`log_turn_metrics=True`",
            "it reads the loss of each token, which TRL computes since 1.15",
            "Upgrade to `trl>=1.15`",
            lambda run: (
                getattr(run.args, "log_turn_metrics", False) and before(trl, "1.15") and "log_turn_metrics=True"
            ),
        ),
    ),
)


WAVES = Scope(
    "Waves (`wave_tokens`)",
    "with {setting}",
    (
        _needs_trl("1.16", "it has no fused head that takes shifted labels"),
        Refusal(
            "`label_smoothing_factor` before transformers 5.15",
            "its label smoother divides by the targets of a wave, not by those of the step",
            "Upgrade to `transformers>=5.15`",
            lambda run: run.args.label_smoothing_factor != 0 and before(transformers, "5.15"),
        ),
        Refusal("`torch_compile`", "waves add up gradients where a compiled graph cannot see them", "Turn it off"),
        Refusal(
            "`attn_implementation='flex_attention'`",
            "FlexAttention keeps the keys and values of the whole history for the backward pass of every layer",
            "Load the model with `'sdpa'` or a flash kernel",
            lambda run: run.of_text_config("_attn_implementation") == TREE_ATTENTION["flex_attention"],
        ),
        Refusal(
            "`wave_tokens='auto'` with layers that run over whole paths",
            "it runs over whole paths, whose memory a wave does not bound",
            "Set a number of tokens",
            lambda run: run.args.wave_tokens == "auto" and run.memory_is_unknown(),
        ),
        Refusal(
            "`wave_tokens='auto'` with recurrent layers of which a rank holds a shard",
            "its activations are measured on a whole model, not on a shard",
            "Set a number of tokens",
            lambda run: run.args.wave_tokens == "auto" and run.shards_the_model() and run.recurrent(),
        ),
    ),
    ", or set {setting}=None",
)

_NOISE = "tokens that run twice would get different noise each time"

PARTS = Scope(
    "Rows in parts (`wave_tokens`, or `max_row_tokens` of pairs)",
    "with {setting}",
    (
        Refusal("`activation_offloading`", "it expects one forward before each backward", "Turn it off"),
        Refusal(
            "`optim='lomo'`, `'adalomo'` and layerwise optimizers",
            "it updates parameters during backward, between the parts of a row",
            "Choose another",
            Situation.updates_during_backward,
        ),
        Refusal(
            "`Dropout` layers",
            "tokens that run twice would drop different units each time",
            "Set it to 0",
            Situation.dropout,
        ),
        Refusal(
            "adapters that draw random numbers", _NOISE, "Use an adapter that draws none", Situation.random_adapter
        ),
        Refusal(
            "`router_jitter_noise` of a model",
            _NOISE,
            "Set it to 0",
            lambda run: bool(run.of_text_config("router_jitter_noise")) and "router_jitter_noise",
        ),
        Refusal(
            "engines other than DDP, DeepSpeed and FSDP2",
            "how it accumulates gradients is not known",
            "Train with DDP, DeepSpeed or FSDP2",
            lambda run: run.engine not in ("", "NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP") and run.engine,
        ),
        Refusal(
            "`fsdp_version=1`",
            "it flattens parameters between backward passes",
            "Set `fsdp_version=2`",
            lambda run: run.engine == "FSDP" and run.accelerator is not None and not run.accelerator.is_fsdp2,
        ),
        Refusal(
            f"`{PREFETCHED}` of ZeRO-3 above 0",
            "it fetches parameters in the order of the first step, and the number of parts changes from row to row",
            "Set it to 0 or `'auto'`",
            lambda run: run.zero3() and run.of_deepspeed("zero_optimization", PREFETCHED) != 0,
        ),
    ),
    ", or set {setting}=None",
)

IMAGES = Scope(
    "Rows with images",
    "on rows with images",
    (
        Refusal(
            "`wave_tokens='auto'`",
            "it does not count what the encoder of images holds",
            "Set a number of tokens",
        ),
        Refusal(
            "`wave_tokens` with an encoder that is trained, under ZeRO-3 or with `offload_optimizer`",
            "the encoder gets gradients from the last wave, and DeepSpeed adds what comes after the first one to the "
            "gradients of the step before",
            "Freeze the encoder, or shard with FSDP2 or ZeRO-2",
            lambda run: run.args.wave_tokens is not None and run.adds_to_older_gradients() and run.trains_an_encoder(),
        ),
        Refusal(
            "`wave_tokens` of pairs and groups, under DeepSpeed and FSDP2",
            "ranks meet in the encoder, which runs once per row, and have different numbers of rows",
            "Leave it out and set `max_row_tokens`, or train with DDP",
            lambda run: (
                run.args.wave_tokens is not None
                and not isinstance(run.args, SFTConfig)
                and run.engine in ("DEEPSPEED", "FSDP")
            ),
        ),
        Refusal(
            "`sp_size`",
            "ranks that share a row would each have a part of its placeholders, and all of its images",
            "Set it to 1, and shard the model with ZeRO-3 or FSDP2",
        ),
        Refusal(
            "`tp_size`",
            "it has not been shown to train the encoder of images exactly",
            "Shard the model with ZeRO-3 or FSDP2",
        ),
    ),
)

_CHECK_THE_LAUNCH = (
    "Check the launch: `accelerate launch --cpu`, `ACCELERATE_USE_CPU` and `use_cpu=True` switch it off"
)

ENGINES = Scope(
    "Engines",
    "in a single pass",
    (
        Refusal(
            "`cp_size`",
            "context parallelism replaces every attention mask by a causal one, so branches would see each other",
            "Set it to 1, and share rows with `sp_size` instead",
        ),
        Refusal(
            "`tp_size` with `sp_size`",
            "both divide the heads of attention",
            "Set one of them to 1",
            lambda run: (
                run.size("sp_size") > 1 and run.size("tp_size") > 1 and f"{run.shared_by('tp_size')} with sp_size"
            ),
        ),
        Refusal(
            "`pp_size`",
            "a pipeline passes hidden states on without the tree",
            "Leave it out, and shard the model with FSDP or ZeRO-3",
            Situation.pipeline,
        ),
        Refusal(
            "`deepspeed` where the launch switches it off",
            "the run would train with another engine than it asks for",
            _CHECK_THE_LAUNCH,
            Situation.deepspeed_is_off,
        ),
        Refusal(
            "`fsdp` on CPUs",
            "it needs a GPU",
            "To try two processes on a CPU, use DDP: `use_cpu=True`, and no FSDP configuration",
            Situation.fsdp_is_on_a_cpu,
        ),
        Refusal(
            "`fsdp` where the launch switches it off",
            "the run would train with another engine than it asks for",
            _CHECK_THE_LAUNCH,
            Situation.fsdp_is_off,
        ),
        Refusal(
            "`autotp_size` of DeepSpeed",
            "tensor parallelism by DeepSpeed has not been shown to train a tree exactly",
            "Leave `tensor_parallel` out of the DeepSpeed configuration, and shard the model with ZeRO-3",
            Situation.divides_layers_by_deepspeed,
        ),
        Refusal(
            "several processes without `ddp_backend`",
            "each would train alone",
            "Set `ddp_backend`, or `use_cpu=True` if there is no GPU",
            lambda run: (
                run.engine == "NO" and num_launched() > 1 and f"each of {num_launched()} processes without ddp_backend"
            ),
        ),
    ),
)

TENSOR_PARALLELISM = Scope(
    "Tensor parallelism (`tp_size`)",
    "with tensor parallelism (tp_size)",
    (
        Refusal(
            "`save_strategy`, but for `save_only_model=True`",
            "transformers cannot save the optimizer of a model that is loaded with a `DistributedConfig`, and no run "
            "resumes without it",
            "Set `save_only_model=True` or `save_strategy='no'`, or shard with FSDP2 or ZeRO-3, which resume",
            Situation.saves_a_divided_optimizer,
        ),
        Refusal(
            "`transformers` before 5.24",
            "it has no `DistributedConfig` by which ranks share layers",
            "Upgrade to 5.24",
            lambda run: run.tp_size > 1 and run.divided_by_older_transformers(),
        ),
        Refusal(
            "`wave_tokens`",
            "it has not been shown to train a row in waves exactly",
            "Leave it out, and set `activation_checkpointing`",
            lambda run: run.tp_size > 1 and run.args.wave_tokens is not None,
        ),
        Refusal(
            "recurrent layers",
            "their states are not divided among ranks",
            "Shard with FSDP or ZeRO-3",
            lambda run: run.tp_size > 1 and run.recurrent(),
        ),
    ),
)

ULYSSES = Scope(
    "Sequence parallelism (`sp_size`)",
    "with sequence parallelism (sp_size)",
    (
        Refusal(
            "engines other than DeepSpeed",
            "accelerate shares rows on DeepSpeed only",
            "Use DeepSpeed",
            lambda run: run.engine not in ("", "DEEPSPEED") and run.engine,
        ),
        _needs_trl("1.16", "its fused head takes no shifted labels"),
        Refusal("`fp16`", "its loss scale hides wrong gradients", "Use `bf16`"),
        Refusal(
            "models whose configuration has no `num_attention_heads` or `num_key_value_heads`",
            "DeepSpeed divides these among ranks",
            "Train without `sp_size`",
            Situation.heads_are_unnamed,
        ),
    ),
)

GROUPS = Scope(
    "Groups of completions (GRPO, RLOO)",
    "for groups of completions",
    (
        _needs_trl("1.16", "its trainers have other methods"),
        _NEFTUNE,
        *_not_shared("groups", "completions"),
    ),
)
ASYNC = Scope(
    "AsyncGRPO",
    "in a single pass of AsyncGRPO",
    (
        Refusal(
            "`fork_threshold_tokens` above 0",
            "tokens that the model generated would become context, and not be trained",
            "Leave it out",
            lambda run: run.differs("fork_threshold_tokens", 0),
        ),
        Refusal("`max_row_tokens`", "TRL packs the rows of AsyncGRPO", "Set `token_budget`, which bounds them"),
        Refusal(
            "DeepSpeed",
            "TRL sends whole parameters to vLLM, of which a rank of ZeRO-3 has a part",
            "Use FSDP2",
            lambda run: (bool(run.args.deepspeed) or run.engine == "DEEPSPEED") and "deepspeed",
        ),
        *_not_shared("groups", "completions"),
    ),
)
SCOPES = (
    TURNS,
    CONVERSATIONS,
    PAIRS,
    GROUPS,
    ASYNC,
    WEIGHTS,
    OLDER_TRL,
    ADAPTERS,
    IMAGES,
    WAVES,
    PARTS,
    ENGINES,
    TENSOR_PARALLELISM,
    ULYSSES,
    PACKAGES,
)
