"""
From datasets of conversations to datasets of rows, and from rows to batches.

`preparation` (a dataset on disk) and `streaming` (a stream) take each example through `conversations`, then `packing`
and `packed_dataset` join rows, `sampler` orders them and `collator` makes batches.
"""
