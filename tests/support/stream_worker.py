"""Train two processes on a stream whose parts are of unequal length; each writes down what it ended with."""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.training import as_dataset, logged, parameters, single_pass_trainer


def main():
    """Train, and write what one rank holds at the end."""
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    chats = [chat(1 + seed % 3, seed=seed) for seed in range(9)]
    rows = []
    trainer = single_pass_trainer(
        output / "out",
        make_tokenizer("qwen3"),
        as_dataset(chats).to_iterable_dataset(num_shards=3),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=5,
        dataloader_pin_memory=False,
    )
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: rows.append(len(examples[0]["input_ids"])) or collate(examples)
    trainer.train()
    result = {
        "parameters": {name: float(value.double().sum()) for name, value in parameters(trainer).items()},
        "num_trained_tokens": logged(trainer, "num_trained_tokens") or float(trainer._counts._trained),
        "rows": rows,
    }
    (output / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort the interpreter's end now and then


if __name__ == "__main__":
    main()
