"""`trl-singlepass import`: agent logs as a dataset."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..data.logs import LogSource


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `import` to its parser."""
    sources = list(map(str, LogSource))
    parser.add_argument("source", metavar="SOURCE", choices=sources, help=f"format of the logs: {', '.join(sources)}")
    parser.add_argument("files", metavar="FILES", nargs="+", help="files of the log, or folders that hold them")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="JSON Lines file to write")
    parser.add_argument(
        "--bad_lines",
        choices=["error", "drop"],
        default="error",
        help="what happens to lines that cannot be trained as they were sent: one error names them all, or they are "
        "left out and counted",
    )
    parser.add_argument(
        "--system_prompt",
        metavar="FILE",
        help="text file with the system prompt of requests that have none, as in a transcript",
    )
    parser.add_argument(
        "--tools", metavar="FILE", help="JSON file with the tools of requests that have none, as in a transcript"
    )
    parser.add_argument(
        "--skip_attachments",
        action="store_true",
        help="leave attachments in transcripts of Claude Code out of contexts: how they were worded is not in there",
    )


def import_logs(args: Namespace) -> str:
    """Write the dataset of a log and return the report."""
    from ..data.bad_rows import BadRows  # imports transformers, which `--help` does not need
    from ..data.logs import importer

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
