"""What a model saves per token is measured without a tree, and is what it saves in a row of branches."""

import pytest
import torch

from support.row_training import batch_of
from support.tiny_models import HYBRIDS, model_of_type, tiny_model
from trl_singlepass.attention.context import running_on
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.pieces import measure_activation_bytes
from trl_singlepass.recurrent.decoder import get_decoder
from trl_singlepass.reference.timing import Sizes, conversation


def saved_in_row(model, samples):
    """Return the bytes per token that the decoder saves in a row, without weights."""
    batch, held = batch_of([samples]), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tree = as_tree(batch["tree"])
    names = ("input_ids", "position_ids", "attention_mask")
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), running_on(tree):
        get_decoder(model)(**{name: batch[name] for name in names}, use_cache=False)
    saved = sum(tensor.untyped_storage().nbytes() for address, tensor in held.items() if address not in weights)
    return saved / batch["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("model_type", "tolerance"), [("qwen3", 0.01), ("qwen3_5_text", 0.1), ("bamba", 0.1), ("lfm2", 0.1)]
)
def test_a_row_of_branches_saves_what_is_measured(model_type, tolerance):
    model = model_of_type(model_type).float().train() if model_type in HYBRIDS else tiny_model(model_type)
    enable_tree(model)
    samples = conversation(4, 90, 0, Sizes((50, 100), (200, 300), (50, 100), 50))
    measured = measure_activation_bytes(model, torch.device("cpu"), checkpointing=False)
    assert measured == pytest.approx(saved_in_row(model, samples), rel=tolerance)


def test_checkpointing_leaves_the_input_of_each_layer_and_all_of_one():
    model = tiny_model("qwen3")
    whole, checkpointed = (
        measure_activation_bytes(model, torch.device("cpu"), checkpointing=on) for on in (False, True)
    )
    itemsize = next(model.parameters()).element_size()
    inputs = model.config.num_hidden_layers * model.config.hidden_size * itemsize
    assert inputs < checkpointed < inputs + whole / model.config.num_hidden_layers


def test_the_model_trains_on_as_before():
    model = model_of_type("qwen3_5_text").float().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    measure_activation_bytes(model, torch.device("cpu"), checkpointing=True)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.model.layers)
