"""
Each model on each engine, in each way to run a row: cells, what their tests measured, and the page that prints them.

`tests/distributed/test_matrix.py` fills the matrix.
"""

import datetime
import json
import math
from importlib.metadata import version
from itertools import product
from pathlib import Path

from support.survey_pages import write_part
from support.worker_settings import with_config


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
PAGE = ROOT / "docs" / "distributed.md"
TOLERANCE = 1e-12

ENGINES = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
    "ulysses": "Ulysses",
}
NO_ROUTER_LOSS = {"config": {"router_aux_loss_coef": 0.0}}
MODELS = {
    "dense": {},
    "hybrid": {"family": "qwen3_5_text"},
    "hybrid, experts": {"family": "qwen3_5_moe_text", **NO_ROUTER_LOSS},
    "experts, load-balancing loss": {"family": "qwen3-moe"},
    "hybrid, experts, load-balancing loss": {"family": "qwen3_5_moe_text"},
}
WAYS = {
    "rows": {},
    "waves": {"config": {"wave_tokens": 32}},
    "packing": {"config": {"packing": True, "max_length": 256}},
    "LoRA": {"lora": "all-linear"},
}
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft")
CELLS = list(product(ENGINES, MODELS, WAYS))


def settings_of(model, way):
    """Return settings of the worker, for two steps in float64."""
    settings = {**MODELS[model], **WAYS[way], "float64": True}
    config = {"max_steps": 2, "gradient_checkpointing": False, "per_device_train_batch_size": 1}
    return with_config(settings, **config, **MODELS[model].get("config", {}), **WAYS[way].get("config", {}))


def largest_difference(ours, theirs):
    """Return the largest difference between two runs: of losses and gradient norms, relative, and of parameters."""
    assert ours.parameters.keys() == theirs.parameters.keys()
    pairs = [pair for name in ("loss", "grad_norm") for pair in zip(vars(ours)[name], vars(theirs)[name], strict=True)]
    differences = [abs(own - other) / abs(other) for own, other in pairs]
    for name, value in theirs.parameters.items():
        differences.append(float((ours.parameters[name].double() - value.double()).abs().max()))
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value)


# Results -------------------------------------------------------------------------------------------------------------


def read_results():
    """Return the recorded columns by engine: when, with which versions, and the largest difference of each cell."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_results(differences):
    """Write the columns of engines all of whose cells have run, and print the whole matrix on the page."""
    columns = read_results()
    for engine in ENGINES:
        cells = {cell: differences.get((engine, *cell)) for cell in product(MODELS, WAYS)}
        if None not in cells.values():
            columns[engine] = {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "versions": {name: version(name) for name in LIBRARIES},
                "cells": [{"model": model, "way": way, "difference": cells[model, way]} for model, way in cells],
            }
    ordered = {engine: columns[engine] for engine in ENGINES if engine in columns}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    write_part(PAGE, "engines", table(ordered))


def table(columns):
    """Return the matrix as the page prints it: of each model and engine, the largest difference of all ways."""
    found = {(engine, cell["model"], cell["way"]): cell for engine in columns for cell in columns[engine]["cells"]}

    def largest(engine, model):
        return f"{max(found[engine, model, way]['difference'] for way in WAYS):.0e}".replace("0e+00", "0")

    rows = [["model", *(ENGINES[engine] for engine in columns)], ["---"] * (len(columns) + 1)]
    rows += [[model, *(largest(engine, model) for engine in columns)] for model in MODELS]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    versions = {", ".join(map(" ".join, column["versions"].items())) for column in columns.values()}
    tested = f"With {'; '.join(sorted(versions))}."
    return "\n".join(["", *lines, "", tested, "", ""])
