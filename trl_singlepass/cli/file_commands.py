"""The commands that write files, and load no model: `recipes`, `demo-model`, `demo-data` and `import`."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path


_INSTALLED = Path(__file__).with_name("recipes")
# The wheel has a copy of the repository's folder; an editable installation reads the folder itself.
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "recipes"


def recipes(args: Namespace) -> str:
    """List the recipes, or return the text of one, or write all to a folder and say so."""
    if args.name is not None and args.output is not None:
        raise ValueError("give NAME to print a recipe, or --output to write all, not both")
    if args.output is not None:
        return write_recipes(args.output)
    return list_recipes() if args.name is None else read_recipe(args.name).rstrip("\n")


def find_recipes() -> dict[str, Path]:
    """Return all recipes by name, those of training runs first: `cpu-smoke`, …, `accelerate/fsdp2`, …."""
    paths = [path for path in RECIPES.rglob("*") if path.is_file() and path.suffix != ".md"]
    paths.sort(key=lambda path: (len(path.relative_to(RECIPES).parts), path.with_suffix("")))
    return {path.relative_to(RECIPES).as_posix().removesuffix(".yaml"): path for path in paths}


def list_recipes() -> str:
    """Return a line for each recipe: its name and what its first comment says."""
    recipes = find_recipes()
    width = max(map(len, recipes))
    return "\n".join(f"{name:{width}}  {_first_sentence(path)}".rstrip() for name, path in recipes.items())


def read_recipe(name: str) -> str:
    """Return the text of a recipe, given its name or its path in the folder of recipes."""
    recipes = find_recipes()
    path = recipes.get(name.removesuffix(".yaml"))
    if path is None:
        raise ValueError(f"There is no recipe '{name}', only {', '.join(recipes)}.")
    return path.read_text(encoding="utf-8")


def write_recipes(folder: str) -> str:
    """Write all recipes to a folder, and say so; if a file there differs, raise `ValueError` and write none."""
    files = {Path(folder) / path.relative_to(RECIPES): path.read_bytes() for path in find_recipes().values()}
    changed = [str(file) for file, content in files.items() if file.exists() and file.read_bytes() != content]
    if changed:
        raise ValueError(f"{', '.join(changed)} would be overwritten. Move it, or choose another folder.")
    missing = {file: content for file, content in files.items() if not file.exists()}
    for file, content in missing.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return f"Wrote {len(missing)} files to {folder}"


def _first_sentence(path: Path) -> str:
    """Return the first sentence of a file's comments; of DeepSpeed's settings, which have none, their stage."""
    if path.suffix == ".json":
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        offloads = any(name.startswith("offload_") for name in zero)
        return f"DeepSpeed's ZeRO, stage {zero['stage']}{', with offload to the CPU' if offloads else ''}"
    comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return re.split(r"(?<=\w[.?]) ", " ".join(comments), maxsplit=1)[0].rstrip(".")


def write_demo(args: Namespace) -> str:
    """Write the demo's model, conversations, pairs or logs, and say so."""
    from . import demo

    write = {"model": demo.write_demo_model, "pairs": demo.write_demo_pairs, "logs": demo.write_demo_logs}
    return write.get(args.kind, demo.write_demo_data)(args.path)


def import_logs(args: Namespace) -> str:
    """Write the dataset of a log and return the report."""
    from ..data.bad_rows import BadRows  # imports transformers, which `--help` does not need
    from ..data.logs import LogSource, importer

    examples, report = importer.import_logs(
        LogSource(args.source),
        args.files,
        bad_lines=BadRows(args.bad_lines),
        system_prompt=None if args.system_prompt is None else _existing(args.system_prompt).read_text("utf-8"),
        tools=None if args.tools is None else importer.read_tools(_existing(args.tools)),
        skip_attachments=args.skip_attachments,
    )
    importer.write_examples(examples, Path(args.output))
    return f"{report}\nWrote {args.output}"


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file {name}.")
    return path
