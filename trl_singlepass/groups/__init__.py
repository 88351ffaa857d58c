"""Groups of completions of one prompt: TRL's GRPO and RLOO with one prefix tree per batch of completions."""
