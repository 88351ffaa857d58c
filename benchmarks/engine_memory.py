"""
Measure how many bytes per parameter each engine keeps on each of two ranks in a training step with AdamW, on a CPU.

    python -m benchmarks.engine_memory

Two numbers: the size of all tensors that Python knows before and after the optimizer step (parameters, gradients,
moments and buffers, but no activations), and the growth of the process since before the model was built, which
includes what libraries keep for themselves and excludes memory that was never written. The DeepSpeed configurations
are those of the recipes.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import TrainerCallback

from benchmarks.machine import anonymous_bytes, describe


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "engine_memory.json"
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
MODEL = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "head_dim": 64,
}


class LiveTensors(TrainerCallback):
    """Largest size of all tensors around optimizer steps, except the first, which creates the optimizer's state."""

    def __init__(self) -> None:
        self.most = self.resident = self.steps = 0
        self.start = anonymous_bytes()
        step = deepspeed.DeepSpeedEngine.step

        def look_and_step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            self.look()
            return step(engine, *args, **kwargs)

        deepspeed.DeepSpeedEngine.step = look_and_step  # runs inside the backward pass, before any callback

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step + 1
        self.look()

    def look(self) -> None:
        if self.steps == 0:
            return
        storages = {}
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                local = one.to_local() if hasattr(one, "to_local") else one
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        self.most = max(self.most, sum(storages.values()))
        self.resident = max(self.resident, anonymous_bytes() - self.start)


def train_one(engine: str, bf16: bool, folder: Path) -> None:
    """Train two steps as one of two ranks, and write how many bytes this rank keeps."""
    sys.path.insert(0, str(ROOT / "tests"))  # the tests can run all engines without a GPU
    from support import worker
    from support.worker_settings import on_engine, with_config

    torch.set_num_threads(1)
    config = {"max_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-4, "bf16": bf16}
    settings, environment = on_engine(engine, {"result": str(folder / "result"), "model": MODEL, "config": config})
    if engine.startswith("zero"):
        settings = with_config(settings, deepspeed=f"recipes/deepspeed/{engine}.json")
    if engine == "fsdp2":
        os.environ.update(environment, ACCELERATE_MIXED_PRECISION="bf16" if bf16 else "no")
        settings = with_config(settings, bf16=False)
        worker.offer_fsdp_on_cpu()
    worker.without_compiled_communication()
    callback = LiveTensors()
    trainer = worker.build_trainer(settings)
    trainer.add_callback(callback)
    num_parameters = sum(getattr(one, "ds_numel", one.numel()) for one in trainer.model.parameters())
    trainer.train()
    if trainer.accelerator.is_main_process:
        result = {"parameters": num_parameters, "bytes": callback.most, "resident": callback.resident}
        (folder / "bytes.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def measure(engine: str, bf16: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
        arguments = ["benchmarks.engine_memory", "--engine", engine, "--folder", folder, *(["--bf16"] if bf16 else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, env=environment, check=True)
        result = json.loads((Path(folder) / "bytes.json").read_text())
    per_parameter = {f"{name}_per_parameter": result[name] / result["parameters"] for name in ("bytes", "resident")}
    return {"engine": engine, "bf16": bf16, **result, **per_parameter}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        train_one(arguments.engine, arguments.bf16, arguments.folder)
    measured = [measure(engine, bf16) for bf16 in (False, True) for engine in ENGINES]
    RESULTS.write_text(
        json.dumps({**describe("cpu", "engine_memory"), "ranks": 2, "measured": measured}, indent=1) + "\n"
    )
    for one in measured:
        numbers = f"{one['bytes_per_parameter']:.2f} {one['resident_per_parameter']:.2f}"
        print(f"{one['engine']:6} {'bf16' if one['bf16'] else 'float32':8} {numbers}")


if __name__ == "__main__":
    main()
