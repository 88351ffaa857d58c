"""Scripts for `accelerate launch`."""

SCRIPTS = {"train": "trl_singlepass.scripts.sft", "dpo": "trl_singlepass.scripts.dpo"}
"""The script of each command that trains."""
