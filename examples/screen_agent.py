"""
Train an agent that looks at screens: every turn of an episode, with the screens that it saw, each encoded once.

    python examples/screen_agent.py
    python examples/screen_agent.py --turns 20 --window 3

An agent presses the buttons of a grid in the order of its task. In each turn it sees a screen, thinks, clicks, and
gets the next screen. N separate samples encode a screen once per turn that shows it; a single pass encodes each screen
once per step, even where a window over the history moves it. Both run here on the same model, and the table compares
them. Without `--model`, the model is a small Qwen3-VL with random weights. Takes about a minute on a CPU.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    set_seed,
)

from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.cli.demo import TOKENIZER
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.engine.check.tree_check import enable_tree
from trl_singlepass.images.loading import ImageLoader
from trl_singlepass.images.reading import ImageReader
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.single_pass import RowImages
from trl_singlepass.reference.timing import peak, reset_peak


ROWS, COLUMNS, CELL = 2, 3, 32
NPASS, SINGLE_PASS = "npass", "single_pass"
COLORS = ["#fca5a5", "#fdba74", "#fde047", "#86efac", "#93c5fd", "#d8b4fe"]

# Reasoning of earlier turns is dropped, as by Qwen3, and so are all screens but the last `window`.
TEMPLATE = """\
{%- set screens = namespace(left=0) -%}
{%- for message in messages -%}
    {%- set images = message.content | selectattr('type', 'equalto', 'image') | list -%}
    {%- set screens.left = screens.left + (images | length) -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.reasoning_content and loop.last -%}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
            {{- part.text -}}
        {%- else -%}
            {%- set hidden = window and screens.left > window -%}
            {{- ('[earlier screen]' if hidden else '<|vision_start|><|image_pad|><|vision_end|>') + '\\n' -}}
            {%- set screens.left = screens.left - 1 -%}
        {%- endif -%}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def draw_screen(numbers: list[int], pressed: set[int]) -> Image.Image:
    """Return a screen with a grid of numbered buttons; those that were pressed are grey."""
    image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
    draw = ImageDraw.Draw(image)
    for place, number in enumerate(numbers):
        x, y = place % COLUMNS * CELL, place // COLUMNS * CELL
        color = "#9ca3af" if number in pressed else COLORS[number % len(COLORS)]
        draw.rectangle((x + 2, y + 2, x + CELL - 3, y + CELL - 3), fill=color, outline="black")
        draw.text((x + CELL // 2 - 3, y + CELL // 2 - 6), str(number), fill="black")
    return image


def make_episode(seed: int, turns: int) -> dict[str, Any]:
    """Return an episode as a dataset holds it: `messages` with placeholders, and the `images` that fill them."""
    shuffle = random.Random(seed)
    task = [shuffle.randrange(ROWS * COLUMNS) for _ in range(turns)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": text("Click the buttons of a task in its order.")}]
    images, pressed = [], set[int]()
    for turn, wanted in enumerate(task):
        numbers = shuffle.sample(range(ROWS * COLUMNS), ROWS * COLUMNS)
        images.append(draw_screen(numbers, pressed))
        request = "Press " + ", ".join(map(str, task)) + "." if turn == 0 else "The next screen."
        messages.append({"role": "user", "content": [{"type": "image"}, *text(request)]})
        row, column = divmod(numbers.index(wanted), COLUMNS)
        thought = f"Button {wanted} is next. It is in row {row + 1}, column {column + 1} of this screen."
        click = f"click({row + 1}, {column + 1})"
        messages.append({"role": "assistant", "reasoning_content": thought, "content": text(click)})
        pressed.add(wanted)
    return {"messages": messages, "images": images}


def text(words: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": words}]


def make_model() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a Qwen3-VL with random weights and a processor for it; a screen of 96 × 64 pixels has 24 tokens."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER, extra_special_tokens=names)
    tokenizer.chat_template = TEMPLATE
    sizes: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=TEMPLATE
    )
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 8, 8]},
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": 8,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
        vision_start_token_id=ids["vision_bos_token_id"],
        vision_end_token_id=ids["vision_eos_token_id"],
    )
    set_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32), processor


@dataclass
class Pass:
    """Forward and backward of all episodes, one way or the other: what they took, and what came out."""

    seconds: float = 0.0
    tokens: int = 0
    encodings: int = 0
    peak_bytes: int = 0
    loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def run_pass(way: str, model: PreTrainedModel, processor: ProcessorMixin, episodes: list[dict[str, Any]]) -> Pass:
    """Run forward and backward of every episode; losses and gradients are added up."""
    load, total = Counting(ImageLoader(processor)), Pass()
    images = None
    if way == SINGLE_PASS:
        enable_tree(model)
        images = RowImages(ImageReader.enable(model), load)
    before = reset_peak()
    for index, episode in enumerate(episodes):
        samples = example_to_samples(episode, index, processor, RowSettings()).samples
        start = time.process_time()  # of the processor: on a busy machine, waiting is not work
        if images is None:
            result = npass_loss_and_gradients(model, samples, load_images=load)
        else:
            result = single_pass_loss_and_gradients(model, samples, images)
        total.seconds += time.process_time() - start
        total.tokens += result.num_tokens
        total.loss += result.loss / len(episodes)
        for name, gradient in result.gradients.items():
            total.gradients[name] = total.gradients.get(name, 0) + gradient
    total.encodings, total.peak_bytes = load.count, peak() - before
    return total


class Counting:
    """A loader of images that counts what it loads."""

    def __init__(self, load: ImageLoader) -> None:
        self.load, self.count = load, 0

    def __call__(self, images: Any) -> dict[str, torch.Tensor]:
        self.count += len(images)
        return self.load(images)


def compare(arguments: list[str]) -> tuple[Pass, Pass, float]:
    """
    Run N-pass and a single pass, each in a process of its own, so that neither works in memory that the other left.

    Returns both, and the largest difference of a gradient between them, relative to its size.
    """
    passes = []
    for way in (NPASS, SINGLE_PASS):
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            subprocess.run([sys.executable, __file__, *arguments, "--way", way, "--result", file.name], check=True)
            passes.append(Pass(**torch.load(file.name)))
    npass, single_pass = passes
    largest = max(float(gradient.norm()) for gradient in npass.gradients.values())
    difference = max(
        float((single_pass.gradients[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
        for name, gradient in npass.gradients.items()
    )
    return npass, single_pass, difference


def table_of(npass: Pass, single_pass: Pass, difference: float) -> Table:
    table = Table(title="Forward and backward of all episodes", title_justify="left")
    for name in ("", "N-pass", "single pass", "N-pass ÷ single pass"):
        table.add_column(name, justify="right" if name else "left")
    for name, values, form in (
        ("images encoded", (npass.encodings, single_pass.encodings), "{:,}"),
        ("tokens", (npass.tokens, single_pass.tokens), "{:,}"),
        ("seconds of CPU", (npass.seconds, single_pass.seconds), "{:.2f}"),
        ("peak memory, MB", (npass.peak_bytes / 1e6, single_pass.peak_bytes / 1e6), "{:.0f}"),
    ):
        table.add_row(name, *map(form.format, values), f"{values[0] / max(values[1], 1e-9):.2f}")
    table.add_row("loss", f"{npass.loss:.6f}", f"{single_pass.loss:.6f}", "")
    table.caption = f"Gradients differ by at most {difference:.0e} of their size, in float32."
    return table


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint that reads images (default: a small one with random weights)")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--turns", type=int, help="turns of every episode (default: 3 to 12)")
    parser.add_argument("--window", type=int, help="screens that the history keeps, without --model (default: all)")
    parser.add_argument("--max_steps", type=int, default=16)
    parser.add_argument("--data", help="only write the episodes to this Parquet file, for recipes/qwen3-vl-8b.yaml")
    parser.add_argument("--way", choices=(NPASS, SINGLE_PASS), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_episodes(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [make_episode(seed, options.turns or 3 + 3 * seed % 10) for seed in range(options.episodes)]


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin, list[dict[str, Any]]]:
    """Return model, processor and episodes."""
    episodes = make_episodes(options)
    if options.model:
        model = AutoModelForImageTextToText.from_pretrained(options.model)
        return model, AutoProcessor.from_pretrained(options.model), episodes
    model, processor = make_model()
    processor.chat_template = "{%- set window = " + str(options.window or 0) + " -%}" + processor.chat_template
    return model, processor, episodes


def main() -> None:
    options = parse(sys.argv[1:])
    if options.data:
        Path(options.data).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(make_episodes(options)).to_parquet(options.data)
        return
    model, processor, episodes = load(options)
    if options.way:
        torch.save(asdict(run_pass(options.way, model, processor, episodes)), options.result)
        return
    Console().print(table_of(*compare(sys.argv[1:])))
    trainer = SinglePassSFTTrainer(
        model=model,
        args=SinglePassSFTConfig(
            output_dir="out/screen-agent",
            max_length=None,
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=4,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(episodes),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
