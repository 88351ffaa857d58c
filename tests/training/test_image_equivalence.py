"""With images: a step moves parameters as stock `SFTTrainer` does on the expanded samples, with a real processor."""

import copy

import pytest
from trl import SFTConfig

from support.paired_trainers import Expanded, InOrder
from support.screen_conversations import expand_images, screen_chat, text_chat
from support.tiny_vision import FAMILIES, tiny_vision_model
from support.trainers import SETTINGS, as_dataset, largest_difference, parameters
from trl_singlepass import SinglePassSFTConfig, to_npass


TOLERANCE = 1e-6

# Stock training gives these as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def examples_of(family):
    """One to three turns each, and one example without an image."""
    reasoning = family == "qwen3_5"
    return [screen_chat(3 - seed % 3, seed, reasoning) for seed in range(7)] + [text_chat(7, reasoning)]


def as_messages(examples, processor):
    """Samples as messages, which TRL renders; independent of how a single pass renders them."""
    return as_dataset([row for example in examples for row in expand_images(example)])


def as_text(examples, processor):
    """Samples as text: the prompt as a server sends it."""
    return to_npass(as_dataset(examples), processor)


def train_both(tmp_path, family, expanded, batch_size, accumulation=1, **settings):
    """Train copies of a model both ways on the same conversations per step; return both trainers and the start."""
    model, processor = tiny_vision_model(family)
    examples = examples_of(family)
    settings = {**SETTINGS, "max_length": None, "gradient_accumulation_steps": accumulation, **settings}
    turns = [len(expand_images(example)) for example in examples]
    stock = Expanded(
        copy.deepcopy(model),
        SFTConfig(str(tmp_path / "stock"), per_device_train_batch_size=batch_size, **settings),
        train_dataset=expanded(examples, processor),
        processing_class=processor,
        turns_per_batch=[sum(turns[start : start + batch_size]) for start in range(0, len(turns), batch_size)],
    )
    stock.model_accepts_loss_kwargs = True  # else, the stock trainer averages the means of the batches of a step
    single_pass = InOrder(
        copy.deepcopy(model),
        SinglePassSFTConfig(str(tmp_path / "single"), per_device_train_batch_size=batch_size, **settings),
        train_dataset=as_dataset(examples),
        processing_class=processor,
    )
    start = parameters(stock)
    stock.train()
    single_pass.train()
    return stock, single_pass, start


def assert_equal(stock, single_pass, start):
    assert largest_difference(stock, single_pass) <= TOLERANCE
    moved = {name: float((value - start[name]).abs().max()) for name, value in parameters(stock).items()}
    assert max(moved.values()) > 1000 * TOLERANCE
    tower = [change for name, change in moved.items() if "vis" in name]
    assert sum(change > 0 for change in tower) >= len(tower) // 2 > 0  # LLaVA reads the last layer but one


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_of_every_family(tmp_path, family):
    assert_equal(*train_both(tmp_path, family, as_text, batch_size=4))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 4), (2, 2)])
def test_one_step_over_batch_size_and_accumulation(tmp_path, batch_size, accumulation):
    assert_equal(*train_both(tmp_path, "qwen3_vl", as_messages, batch_size, accumulation))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 4), (2, 2), (8, 1)])
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "llava_onevision"]
)  # TRL renders another
def test_one_step_of_every_family_over_batch_size_and_accumulation(tmp_path, family, batch_size, accumulation):
    assert_equal(*train_both(tmp_path, family, as_messages, batch_size, accumulation))
