"""Scripts for `accelerate launch`."""

SCRIPTS = {
    "train": "trl_singlepass.scripts.sft",
    "dpo": "trl_singlepass.scripts.dpo",
    "grpo": "trl_singlepass.scripts.grpo",
    "rloo": "trl_singlepass.scripts.rloo",
}
"""The script of each command that trains."""
