"""
Functions and methods of other libraries whose behaviour this project relies on, beyond what they document.

Names are those of the places where they are defined. `tests/project/test_versions.py` compares lists with the code.
"""

# Classes above the trainers, from the nearest: the first that defines an overridden method counts.
BASES = {
    "SinglePassSFTTrainer": (
        "trl.trainer.sft_trainer.SFTTrainer",
        "trl.trainer.base_trainer._BaseTrainer",
        "transformers.trainer.Trainer",
    ),
    "SinglePassDPOTrainer": (
        "trl.trainer.dpo_trainer.DPOTrainer",
        "trl.trainer.base_trainer._BaseTrainer",
        "transformers.trainer.Trainer",
    ),
}

# Private names that the package reads on objects of these libraries, with the code that gives them their meaning.
PRIVATE = {
    "_attn_implementation": "transformers.configuration_utils.PreTrainedConfig._attn_implementation",
    "_can_set_attn_implementation": "transformers.modeling_utils.PreTrainedModel._can_set_attn_implementation",
    "_compile_jinja_template": "transformers.utils.chat_template_utils._compile_jinja_template",
    "_encode_plus": "transformers.tokenization_utils_tokenizers.TokenizersBackend._encode_plus",
    "_experts_implementation": "transformers.integrations.moe.use_experts_implementation",
    "_flash_attention_forward": "transformers.modeling_flash_attention_utils._flash_attention_forward",
    "_global_mapping": "transformers.utils.generic.GeneralInterface",
    "_metrics": "trl.trainer.sft_trainer.SFTTrainer.log",
    "_no_split_modules": "accelerate.utils.dataclasses.FullyShardedDataParallelPlugin.set_auto_wrap_policy",
    "_orig_mod": "torch._dynamo.eval_frame.OptimizedModule",
    "_set_sync_gradients": "accelerate.state.GradientState._set_sync_gradients",
    "_total_train_tokens": "trl.trainer.sft_trainer.SFTTrainer.compute_loss",
    "_train_batch_size": "transformers.trainer.Trainer.get_train_dataloader",
}

# Code that is neither imported nor overridden, but that the package is written for.
ASSUMED = [
    # Ulysses: which groups share rows, where attention is taken over, and why accelerate refuses recurrent layers.
    "accelerate.big_modeling._refuse_recurrent_layers_under_sequence_parallelism",
    "deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF",
    "deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPDataLoaderAdapter",
    # ZeRO-3: when a leaf is gathered, and when its gradients are reduced.
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module",
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.fetch_sub_module",
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.reset_step",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks",
    # The fused head, whose outputs weights and waves read.
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction",
    "trl.trainer.utils.add_fused_lm_head",
    # The order in which a checkpoint is written.
    "transformers.trainer.Trainer._save_checkpoint",
    # How recurrent layers use a cache, which `recurrent/states.py` stands in for.
    "transformers.cache_utils.Cache",
    "transformers.modeling_layers.GradientCheckpointingLayer",
]
