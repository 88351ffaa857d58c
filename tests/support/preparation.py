"""Prepared datasets and rows of the tests: with their report, of pairs, and as a collator gets them."""

from trl_singlepass.data.arrow import to_columns
from trl_singlepass.data.pairs import SIDES
from trl_singlepass.data.preparation import CONVERSATION_KIND, PAIR_KIND, examples_to_rows, prepare


def conversations_to_rows(dataset, tokenizer, settings, **kwargs):
    """Return the rows of a dataset of conversations, with what is counted of each, and their report."""
    return examples_to_rows(dataset, CONVERSATION_KIND, tokenizer, settings, **kwargs)


def prepare_pairs(dataset, tokenizer, settings, **kwargs):
    """Return a dataset of pairs as rows."""
    return prepare(dataset, PAIR_KIND, tokenizer, settings, **kwargs)


def pair_to_columns(pair, max_row_tokens=None):
    """Return a rendered pair as a row of a dataset."""
    columns = to_columns([pair.to_row(max_row_tokens=max_row_tokens)], SIDES, has_images=False)
    return {name: values[0] for name, values in columns.items()}
