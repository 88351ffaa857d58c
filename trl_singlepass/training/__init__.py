"""The trainer, its arguments, and what it refuses."""
