"""Samples with images as text: stock trainers process them into the same tokens, labels and pixels."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from support.image_forms import CHAT, in_column
from support.tiny_vision import FAMILIES, tiny_processor
from trl_singlepass import SinglePassSFTConfig
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.images.loading import image_loader_of
from trl_singlepass.reference.export import to_npass
from trl_singlepass.trees.image_features import shown_images


def config(tmp_path, **settings):
    return SinglePassSFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_trainers_get_the_tokens_labels_and_pixels_of_the_samples(family):
    processor = tiny_processor(family)
    exported = to_npass(in_column([CHAT]), processor)
    assert set(exported.column_names) == {"prompt", "completion", "images"}
    samples = example_to_samples({"messages": CHAT}, 0, processor, RowSettings()).samples
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for row, sample in zip(exported, samples, strict=True):
        batch = collate([row])
        assert batch["input_ids"][0].tolist() == sample.token_ids.tolist()
        trained = sample.loss_weights > 0
        assert (batch["labels"][0] != -100).tolist() == trained.tolist()
        for name, value in image_loader_of(processor)(shown_images(sample.image_features, sample.images)).items():
            assert torch.equal(batch[name], value)


def test_a_stream_is_expanded_alike():
    processor, dataset = tiny_processor("qwen3_vl"), in_column([CHAT])
    stored, stream = to_npass(dataset, processor), to_npass(dataset.to_iterable_dataset(), processor)
    assert [row["prompt"] for row in stream] == stored["prompt"][:]
    assert [len(row["images"]) for row in stream] == [1, 3, 3]


def test_what_text_cannot_say_is_refused(tmp_path):
    processor = tiny_processor("qwen3_vl")
    last = example_to_samples({"messages": CHAT}, 0, processor, RowSettings()).samples[-1]
    for settings, reason in (
        ({"max_length": len(last) - 1}, "it is given as tokens, or cut by max_length"),
        ({"max_length": None, "loss_reduction": "turn"}, "its loss weights are not all 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            to_npass(in_column([CHAT]), processor, config(tmp_path, **settings))
