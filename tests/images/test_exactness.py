"""
Float64: loss and every gradient, the encoder's too, equal N-pass, where each sample encodes its own images.

`docs/models.md` lists the model types.
"""

import copy

import numpy as np
import pytest

from support.float64_comparison import assert_same_loss_and_gradients
from support.image_chats import CHATS, image_chat
from support.image_models import CODEBOOKS, COMPARED, FAMILIES, image_model, loader
from support.slow import slow_but_for
from support.tree_checks import checked_on_images
from trl_singlepass.attention import Tree
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.images import reading
from trl_singlepass.images.reading import ImageReader, UnsupportedImagesError
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.single_pass import RowImages, leak_probe
from trl_singlepass.trees import prefix_tree, radix
from trl_singlepass.trees.image_features import shown_images


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of models that nobody has looked after for years
]


def expected_and_found(model, samples):
    """Return what N-pass and a single pass compute, and the images that each call of a loader was asked for."""
    calls = {"npass": [], "single pass": []}

    def recorded(name):
        def load(images):
            calls[name].append([image.content for image in images])
            return loader(model)(images)

        return load

    expected = npass_loss_and_gradients(model, samples, load_images=recorded("npass"))
    enable_tree(model)
    images = RowImages(ImageReader.enable(model), recorded("single pass"))
    return expected, single_pass_loss_and_gradients(model, samples, images), calls


def assert_exact(model_type, kind):
    model = image_model(model_type)
    samples = image_chat(model, kind)
    expected, found, calls = expected_and_found(model, samples)
    assert_same_loss_and_gradients(found.loss, found.gradients, expected)
    (encoded,) = calls["single pass"]
    assert sorted(encoded) == sorted({content for call in calls["npass"] for content in call})  # each image once
    encoder = [value for name, value in expected.gradients.items() if "vis" in name or "image_tower" in name]
    trained = sum(bool(value.abs().max() > 0) for value in encoder)
    assert trained >= len(encoder) * (0.8 if model_type in FAMILIES else 0.5) > 0 or model_type in CODEBOOKS


@pytest.mark.parametrize("model_type", slow_but_for(FAMILIES, COMPARED))
def test_reasoning_chat_with_images(model_type):
    assert_exact(model_type, "reasoning")


@pytest.mark.parametrize("model_type", slow_but_for(FAMILIES, COMPARED))
def test_the_check_passes_with_an_image(model_type):
    model = image_model(model_type)
    samples = image_chat(model, "reasoning")
    enable_tree(model)
    report = checked_on_images(model, samples, RowImages(ImageReader.enable(model), loader(model)))
    assert report.ok, report.reason


@pytest.mark.parametrize("kind", [kind for kind in CHATS if kind != "reasoning"])
@pytest.mark.parametrize("family", slow_but_for(["qwen3_vl", "gemma3"], FAMILIES))
def test_other_histories(family, kind):
    assert_exact(family, kind)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("reasoning", ["other small wide", "other small wide last", "other small wide last small"]),
        ("siblings", ["small", "other"]),
        ("window", ["small", "small wide", "wide other", "other last"]),
        ("text beside images", ["", "wide", "wide"]),
    ],
)
def test_each_sample_of_npass_encodes_the_images_of_its_prompt(kind, shown):
    samples = image_chat(image_model("qwen3_vl"), kind)
    of_samples = [shown_images(sample.image_features, sample.images) for sample in samples]
    found = [" ".join(image.content for image in images) for images in of_samples]
    assert found == shown


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "gemma3", "gemma4"])
def test_nothing_leaks_between_branches(family):
    model = image_model(family).eval()
    samples = image_chat(model, "reasoning")
    enable_tree(model)
    report = leak_probe(model, samples, images=RowImages(ImageReader.enable(model), loader(model)))
    assert report.ok, report


# What goes wrong without a rule, so that the tests above are known to see it -----------------------------------------


def difference(family, kind):
    model = image_model(family)
    expected, found, _ = expected_and_found(model, image_chat(model, kind))
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    return max(float((found.gradients[name] - x).abs().max()) for name, x in expected.gradients.items()) / largest


def test_a_tree_of_tokens_alone_merges_two_images_of_one_size(monkeypatch):
    keys = radix.to_keys

    def places_only(tokens, features):  # the place within an image of four features, but not the image
        return keys(tokens, np.where(features >= 0, features % 4, -1))

    assert difference("qwen3_vl", "siblings") < 1e-12
    for module in (radix, prefix_tree):
        monkeypatch.setattr(module, "to_keys", places_only)
    assert difference("qwen3_vl", "siblings") > 1e-3


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_images_read_in_order_are_wrong_where_they_see_themselves(family, monkeypatch):
    monkeypatch.setattr(Tree, "image_plan", property(lambda tree: tree.plan))
    assert difference(family, "reasoning") > 1e-3


def test_features_in_the_order_of_first_use_are_wrong(monkeypatch):
    in_row = reading.ShownFeatures.in_row.__func__

    def in_order(cls, *row):
        shown = in_row(cls, *row)
        return cls(shown.index.sort().values, shown.sizes)

    monkeypatch.setattr(reading.ShownFeatures, "in_row", classmethod(in_order))
    assert difference("llava_onevision", "reasoning") > 1e-3


def test_depths_are_not_the_positions_of_images():
    model = image_model("qwen3_vl")
    samples = image_chat(model, "reasoning")
    expected = npass_loss_and_gradients(model, samples, load_images=loader(model))
    enable_tree(model)
    reader = ImageReader.enable(model)
    depths_only = RowImages(ImageReader(reader.token_types, None), loader(model))
    found = single_pass_loss_and_gradients(model, samples, depths_only)
    assert abs(found.loss - expected.loss) > 1e-3 * abs(expected.loss)


def test_a_copy_of_a_model_shows_images_by_itself():
    model = image_model("gemma3")
    ImageReader.enable(model)
    twin = copy.deepcopy(model)
    assert twin.model.get_image_features.__self__ is twin.model


def test_statistics_over_a_batch_of_images_are_refused(monkeypatch):
    model = image_model("emu3")
    with pytest.raises(UnsupportedImagesError, match="over all images of a batch in its BatchNorm3d"):
        ImageReader.enable(model)
    monkeypatch.setattr(reading, "_faults", lambda model, module: iter(()))
    expected, found, _ = expected_and_found(model, image_chat(model, "reasoning"))
    assert abs(found.loss - expected.loss) > 1e-6 * abs(expected.loss)
