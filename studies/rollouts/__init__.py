"""What training in served contexts is worth for GRPO, on a task whose reasoning is stripped between turns."""
