"""Float64: loss and every gradient, the encoder's too, equal N-pass, where each sample encodes its own images."""

import copy

import pytest

from support.float64_comparison import assert_same_loss_and_gradients
from support.image_chats import CHATS, image_chat
from support.image_models import FAMILIES, image_model, loader
from support.tree_checks import checked_on_images
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.images.reading import ImageReader
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.single_pass import RowImages, leak_probe


pytestmark = pytest.mark.usefixtures("float64")


def expected_and_found(family, samples, model):
    """Return what N-pass and a single pass compute, and the images that each call of a loader was asked for."""
    calls = {"npass": [], "single pass": []}

    def recorded(name):
        def load(images):
            calls[name].append([image.content for image in images])
            return loader(family)(images)

        return load

    expected = npass_loss_and_gradients(model, samples, load_images=recorded("npass"))
    enable_tree(model)
    images = RowImages(ImageReader.enable(model), recorded("single pass"))
    return expected, single_pass_loss_and_gradients(model, samples, images), calls


def assert_exact(family, kind, model=None):
    model = model or image_model(family)
    samples = image_chat(model, family, kind)
    expected, found, calls = expected_and_found(family, samples, model)
    assert_same_loss_and_gradients(found.loss, found.gradients, expected)
    (encoded,) = calls["single pass"]
    assert sorted(encoded) == sorted({content for call in calls["npass"] for content in call})  # each image once
    assert encoder_is_trained(expected)


def encoder_is_trained(result):
    names = [name for name in result.gradients if "vis" in name]
    trained = sum(bool(result.gradients[name].abs().max() > 0) for name in names)
    return trained > 0.8 * len(names) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_chat_with_images(family):
    assert_exact(family, "reasoning")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes_with_an_image(family):
    model = image_model(family)
    samples = image_chat(model, family, "reasoning")
    enable_tree(model)
    report = checked_on_images(model, samples, RowImages(ImageReader.enable(model), loader(family)))
    assert report.ok, report.reason


@pytest.mark.parametrize("kind", [kind for kind in CHATS if kind != "reasoning"])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_other_histories(family, kind):
    assert_exact(family, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CHATS if kind != "reasoning"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("qwen3_vl", "gemma3")])
def test_other_histories_of_all_families(family, kind):
    assert_exact(family, kind)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "gemma3", "gemma4"])
def test_nothing_leaks_between_branches(family):
    model = image_model(family).eval()
    samples = image_chat(model, family, "reasoning")
    enable_tree(model)
    report = leak_probe(model, samples, images=RowImages(ImageReader.enable(model), loader(family)))
    assert report.ok, report


def test_a_copy_of_a_model_shows_images_by_itself():
    model = image_model("gemma3")
    ImageReader.enable(model)
    twin = copy.deepcopy(model)
    assert twin.model.get_image_features.__self__ is twin.model
