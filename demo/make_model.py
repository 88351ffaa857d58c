"""
Write the demo's model, a small Qwen3 with random weights, to a folder that loads like any other model:

    python -m demo.make_model [FOLDER]
"""

import sys
from pathlib import Path

from demo.load import load_model, load_tokenizer


FOLDER = Path("out/demo-model")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    tokenizer = load_tokenizer(None)
    load_model(None, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
