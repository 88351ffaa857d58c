"""Scripts that `accelerate launch` runs."""
