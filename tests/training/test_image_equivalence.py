"""With images: a step moves parameters as stock `SFTTrainer` does on the expanded samples, with a real processor."""

import pytest
from trl import SFTConfig

from support.paired_trainers import Expanded
from support.screen_conversations import examples_of, expand_images, screen_trainer, settings_of
from support.slow import slow_but_for
from support.tiny_vision import FAMILIES, tiny_vision_model
from support.trainers import as_dataset, parameters
from trl_singlepass import to_npass


TOLERANCE = 1e-6
DEFAULT = ["qwen3_vl", "gemma3"]

# Stock training gives these as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def as_messages(examples, processor):
    """Samples as messages, which TRL renders; independent of how a single pass renders them."""
    return as_dataset([row for example in examples for row in expand_images(example)])


def as_text(examples, processor):
    """Samples as text: the prompt as a server sends it."""
    return to_npass(as_dataset(examples), processor)


def stock_trainer(tmp_path, family, expanded, batch_size, accumulation=1):
    """Return stock `SFTTrainer` on the expanded samples, whose batches hold all samples of as many conversations."""
    model, processor = tiny_vision_model(family)
    examples = examples_of(family)
    turns = [len(expand_images(example)) for example in examples]
    trainer = Expanded(
        model,
        SFTConfig(str(tmp_path / "stock"), **settings_of(batch_size, accumulation)),
        train_dataset=expanded(examples, processor),
        processing_class=processor,
        turns_per_batch=[sum(turns[start : start + batch_size]) for start in range(0, len(turns), batch_size)],
    )
    trainer.model_accepts_loss_kwargs = True  # else, it averages the means of the batches of a step
    return trainer


def train_both(tmp_path, family, expanded, batch_size, accumulation=1):
    """Train a model both ways on the same conversations per step; return the parameters of both, and the start."""
    stock = stock_trainer(tmp_path, family, expanded, batch_size, accumulation)
    start = parameters(stock)
    stock.train()
    single_pass = screen_trainer(tmp_path, family, batch_size, accumulation)
    single_pass.train()
    return parameters(stock), parameters(single_pass), start


def assert_equal(stock, single_pass, start):
    assert max(float((stock[name] - value).abs().max()) for name, value in single_pass.items()) <= TOLERANCE
    moved = {name: float((value - start[name]).abs().max()) for name, value in stock.items()}
    assert max(moved.values()) > 1000 * TOLERANCE
    tower = [change for name, change in moved.items() if "vis" in name]
    assert sum(change > 0 for change in tower) >= len(tower) // 2 > 0  # LLaVA reads the last layer but one


@pytest.mark.parametrize("family", slow_but_for(DEFAULT, FAMILIES))
def test_one_step_of_every_family(tmp_path, family):
    assert_equal(*train_both(tmp_path, family, as_text, batch_size=4))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2)])
def test_one_step_over_batch_size_and_accumulation(tmp_path, batch_size, accumulation):
    assert_equal(*train_both(tmp_path, "qwen3_vl", as_messages, batch_size, accumulation))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 4), (2, 2), (8, 1)])
# TRL renders another prompt for one, and adds no stop token for the other, whose template writes none.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llava_onevision", "llava")])
def test_one_step_of_every_family_over_batch_size_and_accumulation(tmp_path, family, batch_size, accumulation):
    assert_equal(*train_both(tmp_path, family, as_messages, batch_size, accumulation))
