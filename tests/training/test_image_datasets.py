"""A step on images is the same however the dataset holds them, and however its rows are packed, streamed or read."""

import datasets
import pytest

from support.image_forms import CHAT, IMAGES, answer, in_column, user
from support.tiny_vision import tiny_vision_model
from support.trainers import largest_difference, parameters, single_pass_trainer


CHATS = [
    CHAT,
    [user(IMAGES[3], "Now?"), answer("Yes yes.")],
    [user(IMAGES[0], "What do you see?"), answer("A cat.")],
]


def trained(tmp_path, dataset, **settings):
    model, processor = tiny_vision_model("qwen3_vl")
    settings = {"per_device_train_batch_size": 3, "max_length": None, **settings}
    trainer = single_pass_trainer(tmp_path, processor, dataset, model, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("expected"), in_column(CHATS))


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        (lambda: in_column(CHATS), {"packing": True, "max_row_tokens": 2000}),
        (lambda: datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]), {}),
        (lambda: in_column(CHATS).to_iterable_dataset(), {}),
        (
            lambda: in_column(CHATS).to_iterable_dataset(),
            {"packing": True, "max_row_tokens": 2000, "per_device_train_batch_size": 1},
        ),
        (lambda: in_column(CHATS), {"dataloader_num_workers": 2}),
    ],
    ids=["packed", "in parts", "streamed", "streamed and packed", "in workers"],
)
def test_one_step(dataset, settings, expected, tmp_path):
    trainer = trained(tmp_path, dataset(), **settings)
    assert largest_difference(trainer, expected) <= 1e-6
    start = dict(tiny_vision_model("qwen3_vl")[0].named_parameters())
    moved = max(float((value - start[name].detach()).abs().max()) for name, value in parameters(trainer).items())
    assert moved > 1e-3


def test_evaluate_and_predict_read_raw_images(expected):
    loss = expected.evaluate(in_column(CHATS))["eval_loss"]
    assert expected.predict(in_column(CHATS)).metrics["test_loss"] == pytest.approx(loss, abs=1e-6)
