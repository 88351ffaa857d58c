"""The check on a thousand random small models of all families that are exact: none is refused."""

import numpy as np
import pytest
import torch
import transformers

from support.model_survey import TEXT_MODELS, read_page
from support.tiny_models import model_of_type
from support.tree_checks import PRECISIONS, checked


FAMILIES = sorted(
    name for (table, name), outcome in read_page()[1].items() if table == TEXT_MODELS and outcome.status == "exact"
)
SCALES = [None, 0.02, 0.1, 0.3]
"""Standard deviations of the weights; `None` leaves them as the family draws them."""
# Transformers' own code mixes its float32 router with weights in bfloat16.
FLOAT32_ONLY = ("inkling2_loop_text", "inkling2_text")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_a_family_pass(family, precision):
    if precision is torch.bfloat16 and family in FLOAT32_ONLY:
        pytest.skip("transformers does not run it in bfloat16")
    for seed, scale in enumerate(SCALES):
        transformers.set_seed(seed)
        model = model_of_type(family)
        for parameter in model.parameters():
            if scale is not None and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=scale)
        report = checked(model, precision, np.random.default_rng(seed).integers(3, 90, 200))
        assert report.ok, f"seed {seed}: {report.reason}; {report}"
