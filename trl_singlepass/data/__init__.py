"""
From datasets of conversations or pairs to datasets of rows, and from rows to batches.

`preparation` takes each example of a dataset, on disk or as a stream, through `conversations` or `pairs` and `rows`;
`packing` joins rows of conversations, `sampler` orders rows and `collator` makes batches.
"""
