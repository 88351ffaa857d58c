"""Datasets of conversations to datasets of rows, and rows to batches."""
