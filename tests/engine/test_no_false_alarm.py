"""The check on a thousand random small models of all families that are exact: none is refused."""

import numpy as np
import pytest
import torch
import transformers

from support.model_survey import TEXT_MODELS, read_page
from support.tiny_models import model_of_type
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.check.tree_check import TreeCheck
from trl_singlepass.engine.enable import enable_tree


FAMILIES = sorted(
    name for (table, name), outcome in read_page()[1].items() if table == TEXT_MODELS and outcome.status == "exact"
)
SCALES = [None, 0.02, 0.1, 0.3]
"""Standard deviations of the weights; `None` leaves them as the family draws them."""
# Transformers' own code mixes its float32 router with weights in bfloat16.
FLOAT32_ONLY = ("inkling2_loop_text", "inkling2_text")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_a_family_pass(family, dtype):
    if dtype is torch.bfloat16 and family in FLOAT32_ONLY:
        pytest.skip("transformers does not run it in bfloat16")
    for seed, scale in enumerate(SCALES):
        transformers.set_seed(seed)
        model = model_of_type(family)
        for parameter in model.parameters():
            if scale is not None and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=scale)
        model = model.to(dtype)
        enable_tree(model)
        text = np.random.default_rng(seed).integers(3, 90, 200)
        report = TreeCheck(model, DataCollatorForSinglePass(0)).run(text)
        assert report.ok, f"seed {seed}: {report.reason}; {report}"
