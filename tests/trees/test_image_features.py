"""Trees tell images apart by content: what is shared, what is not, and how features are numbered in each row."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.image_samples import (
    PLACEHOLDER,
    A,
    B,
    C,
    conversation_of,
    image_conversations,
    spelled,
    spelled_row_tokens,
)
from support.prefix_tree_reference import PrefixOracle, prefixes
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.data.packing import pack_rows
from trl_singlepass.images.reading import ImageReader
from trl_singlepass.trees.image_features import ImageReference
from trl_singlepass.trees.prefix_tree import sample_paths
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sharing import merge_rows
from trl_singlepass.trees.splitting import split_samples


# Two actions lead to two screens of one size.
SIBLINGS = conversation_of([([1, 2, A, 3], [7]), ([1, 2, B, 3], [8])])
# A window of the last two screens: the second one moves to the front.
WINDOW = conversation_of([([1, A, 2, B, 3], [7]), ([1, B, 2, C, 3], [8])])
# The same image twice, and an image that later turns no longer show.
TWICE = conversation_of([([1, A, A, 2], [7]), ([1, A, A, 2, 7, B, 2], [8]), ([1, 2, 7, 2, 8, B, 4], [9])])


def row_of(samples):
    return Row.from_tree(PrefixTree.from_samples(samples))


def test_two_images_of_one_size_in_sibling_branches_stay_apart():
    tree = PrefixTree.from_samples(SIBLINGS)
    assert tree.input_ids.tolist() == [1, 2, *[PLACEHOLDER] * 2, 3, 8, *[PLACEHOLDER] * 2, 3, 7]
    assert tree.image_features.tolist() == [-1, -1, 2, 3, -1, -1, 0, 1, -1, -1]
    # By tokens alone, the two screens would be one, and one of the answers trained on the wrong screen.
    by_tokens = [Sample(sample.token_ids, sample.loss_weights, sample.prompt_length) for sample in SIBLINGS]
    assert len(PrefixTree.from_samples(by_tokens)) < len(tree)


@given(samples=image_conversations())
@example(samples=SIBLINGS)
@example(samples=WINDOW)
@example(samples=TWICE)
def test_a_tree_shares_what_its_samples_would_share_if_every_part_of_an_image_were_a_token(samples):
    tree, oracle = PrefixTree.from_samples(samples), PrefixOracle(list(map(spelled, samples)))
    row = Row.from_tree(tree)
    assert len(tree) == oracle.num_tokens
    assert set(prefixes(spelled_row_tokens(row), row.subtree_end)) == set(oracle.multiplicity)
    for sample, path in zip(samples, sample_paths(tree, samples), strict=True):
        assert tree.input_ids[path].tolist() == sample.token_ids.tolist()
        if sample.image_features is not None:
            assert tree.image_features[path].tolist() == sample.image_features.tolist()


@given(sets=st.lists(image_conversations(), min_size=1, max_size=3))
@example(sets=[SIBLINGS, WINDOW, TWICE])
def test_rows_that_stand_side_by_side_or_merge_keep_their_images_and_store_each_once(sets):
    rows = [row_of(samples) for samples in sets]
    joined, merged = Row.join(rows), merge_rows(rows)
    assert spelled_row_tokens(joined) == [token for row in rows for token in spelled_row_tokens(row)]
    assert [token for tree in joined.split() for token in spelled_row_tokens(tree)] == spelled_row_tokens(joined)
    oracle = PrefixOracle([spelled(sample) for samples in sets for sample in samples])
    assert len(merged) == oracle.num_tokens
    assert set(prefixes(spelled_row_tokens(merged), merged.subtree_end)) == set(oracle.multiplicity)
    for row in (joined, merged):
        assert len(set(row.images)) == len(row.images)
        assert set(row.images) == {image for row in rows for image in row.images}


@given(samples=image_conversations())
@example(samples=TWICE)
def test_the_parts_of_a_split_conversation_number_their_own_images_only(samples):
    for part in split_samples(samples, max(map(len, samples))):
        row = row_of(part)
        if row.image_features is not None:
            shown = {feature for feature in row.image_features.tolist() if feature >= 0}
            assert shown == set(range(sum(image.num_features for image in row.images)))
        oracle = PrefixOracle(list(map(spelled, part)))
        assert set(prefixes(spelled_row_tokens(row), row.subtree_end)) == set(oracle.multiplicity)


@pytest.mark.parametrize(
    ("length", "kept"),
    # 1 A A 2 B 5 6 7, where 6 and 7 are trained
    [(9, 9), (8, 8), (7, 6), (6, 6), (5, 5), (4, 3), (3, 3), (2, 1), (1, 1)],
)
def test_truncation_leaves_no_part_of_an_image(length, kept):
    (sample,) = conversation_of([([1, A, A, 2, B, 5], [6, 7])])
    assert len(sample) == 11
    cut = sample.truncated(length)
    assert cut.token_ids.tolist() == sample.token_ids.tolist()[:kept]
    assert cut.image_features.tolist() == sample.image_features.tolist()[:kept]


def test_images_in_completions_are_refused():
    with pytest.raises(ValueError, match="A completion shows an image, which a model that writes text cannot learn"):
        Sample([1, 9, 9, 3], [0, 1, 1, 1], 1, image_features=[-1, 0, 1, -1], images=(A,))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([0, 1], r"got token_ids of shape \(4,\) and image_features of shape \(2,\)"),
        ([-1, 0, 1, 2], "got -1 as the smallest and 2"),
    ],
)
def test_features_that_do_not_fit_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        Sample([1, 9, 9, 3], [0, 0, 0, 1], 3, image_features=features, images=(A,))


def test_packing_shares_an_image_between_conversations_and_counts_another_one_in_full():
    screen, other_screen = ImageReference("screen", 40), ImageReference("other screen", 40)
    conversations = [([1, screen, 5], [6]), ([1, screen, 5], [7]), ([1, other_screen, 5], [8])]
    rows = [row_of(conversation_of([turn])) for turn in conversations]
    packed = pack_rows(rows, 60)
    # Token 5 stands once per target. By tokens alone, all three would seem to fit into a row.
    assert [(row.images, len(row)) for row in packed] == [((screen,), 1 + 40 + 2 + 2), ((other_screen,), 43)]


def test_the_collator_numbers_the_distinct_images_of_a_batch():
    loaded = []
    collator = DataCollatorForSinglePass(
        0,
        8,
        load_images=lambda images: loaded.append(images) or {"pixel_values": len(images)},
        image_reader=ImageReader((), None),
    )
    rows = [row_of(SIBLINGS), row_of(conversation_of([([1, 2], [3])])), row_of(conversation_of([([B, 2], [3])]))]
    batch = collator([row.columns() for row in rows])
    assert loaded == [(A, B)]
    assert batch["pixel_values"] == 2
    assert batch["tree"].images == (A, B)
    expected = [-1, -1, 2, 3, -1, -1, 0, 1, -1, -1, -1, -1, -1, 2, 3, -1, -1]
    assert batch["tree"].image_features.tolist() == [[*expected, *[-1] * (24 - len(expected))]]


def test_a_row_without_images_has_what_it_had_before():
    batch = DataCollatorForSinglePass(0)([row_of(conversation_of([([1, 2], [3])])).columns()])
    assert set(batch) == {"input_ids", "position_ids", "attention_mask", "labels", "tree"}
    assert batch["tree"].image_features is None


def test_rows_with_images_need_a_collator_that_loads_them():
    with pytest.raises(ValueError, match="enable_images"):
        DataCollatorForSinglePass(0)([row_of(SIBLINGS).columns()])
