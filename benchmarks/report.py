"""
Write the measured tables into README.md and two pages of docs/, from the files under benchmarks/results/ alone.

    python -m benchmarks.report
"""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.freshness import kind_of
from benchmarks.step_time import MEMORY_MODES, NPASS_MODES, OTHERS


RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CHECK = Path(__file__).parents[1] / "docs" / "own_loops.md"
Section = Callable[[dict[str, Any], str], str]
PROFILED = {"single_pass": "single pass", "npass_sequential": "N-pass, one by one"}
OTHERS_HEADER = [
    "turns",
    "single pass",
    "all reasoning kept",
    "last turn only",
    "tokens trained by the last turn only",
]
OTHERS_TITLE = (
    "What people do instead of N-pass, on the same conversations. It is not the same training: it uses contexts that\n"
    "never occur at inference, or trains only some of the tokens.\n\n"
)
SPEED_HEADER = [
    "turns",
    "tokens, N-pass",
    "tokens, row",
    "N-pass",
    "single pass",
    "**speed-up**",
    "predicted",
    "peak memory, N-pass",
    "peak memory, single pass",
]
SUMMARY_HEADER = [
    "one conversation",
    "N-pass",
    "single pass",
    "**speed-up**",
    "peak memory, N-pass",
    "single pass",
    "single pass in waves",
]
WAVES_HEADER = [
    "turns",
    "one row, counted",
    "measured",
    "waves, counted",
    "measured",
    "time of N-pass ÷ row",
    "÷ waves",
]
SUMMARY_TURNS = (8, 16, 32)
SHOWN_RANKS = (8, 64, 1024)
RANK_WAYS = ("as they come", "balanced", "N-pass")
CHOICES = {"as they come": "as rows come", "balanced": "balanced", "grouped": '`"group_by_length"`'}
DATASETS = {
    "llamafactory_reason_tool_use": "tool use",
    "mathchat_follow_up_300": "follow-up math",
    "taubench_gpt4o_airline": "airline agent",
}
SUMMARY_SHAPE = "taubench_gpt4o_airline"


def fastest(measured: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest measurement of every mode."""
    best = {}
    for one in sorted(measured, key=lambda one: one["seconds"], reverse=True):
        best[one["mode"]] = one
    return best


def check_equal(best: dict[str, dict[str, Any]], precision: float) -> None:
    reference_mode = "npass_sequential" if "npass_sequential" in best else "single_pass"
    for mode, one in best.items():
        if mode in OTHERS:
            continue  # they train something else
        for name in ("loss", "norm"):
            reference = best[reference_mode][name]
            if abs(one[name] - reference) > precision * abs(reference):
                raise ValueError(
                    f"{mode} computed {name} {one[name]}, {reference_mode} {reference}: not the same training step."
                )


def by_conversation(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """For each conversation, its counted costs and the fastest measurement of each mode."""
    groups = [list(measured) for _, measured in groupby(result["measured"], key=_conversation)]
    counted = {_conversation(count): count for count in result["counted"]}
    pairs = [(counted[_conversation(measured[0])], fastest(measured)) for measured in groups]
    for _, best in pairs:
        check_equal(best, 1e-4 if result["dtype"] == "float32" else 2e-2)
    return pairs


def _conversation(one: dict[str, Any]) -> tuple[int, str, int]:
    return one["turns"], one.get("shape", ""), one.get("index", 0)


def speed_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for count, best in by_conversation(result):
        single = best["single_pass"]
        npass = fastest_npass(best)
        speedup, predicted = npass["seconds"] / single["seconds"], count["predicted_speedup"]
        rows.append(
            [
                str(count["turns"]),
                f"{count['npass_tokens']:,}",
                f"{count['row_tokens']:,}",
                seconds(npass["seconds"]),
                seconds(single["seconds"]),
                f"**{speedup:.2f}**",
                f"{predicted:.2f}",
                mebibytes(npass["bytes"]),
                mebibytes(single["bytes"]),
            ]
        )
    return rows


def others_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(count["turns"]),
            *(seconds(best[mode]["seconds"]) for mode in ("single_pass", "keep_reasoning", "last_turn")),
            f"{count['last_turn_trained_tokens'] / count['trained_tokens']:.0%}",
        ]
        for count, best in by_conversation(result)
        if set(OTHERS) <= set(best)
    ]


def fastest_npass(best: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return min((one for mode, one in best.items() if mode in NPASS_MODES), key=lambda one: one["seconds"])


def summary_row(name: str, best: dict[str, dict[str, Any]]) -> list[str]:
    npass, single, waves = fastest_npass(best), best["single_pass"], best.get("waves")
    return [
        name,
        f"{npass['seconds']:.1f} s",
        f"{single['seconds']:.1f} s",
        f"**{npass['seconds'] / single['seconds']:.2f}×**",
        gibibytes(npass["bytes"]),
        gibibytes(single["bytes"]),
        gibibytes(waves["bytes"]) if waves else "not measured",
    ]


def summary(speed: dict[str, Any], shapes: dict[str, Any]) -> str:
    """The README's table: chats of several lengths, and the longest agent conversation."""
    by_turns = {count["turns"]: best for count, best in by_conversation(speed)}
    rows = [summary_row(f"chat, {turns} turns", by_turns[turns]) for turns in SUMMARY_TURNS]
    agents = [(count, best) for count, best in by_conversation(shapes) if count["shape"] == SUMMARY_SHAPE]
    count, best = max(agents, key=lambda pair: pair[0]["turns"])
    return table(SUMMARY_HEADER, [*rows, summary_row(f"agent (τ-bench), {count['turns']} turns", best)])


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_section(result: dict[str, Any], name: str) -> str:
    others = OTHERS_TITLE + table(OTHERS_HEADER, others_rows(result))
    return "\n\n".join([table(SPEED_HEADER, speed_rows(result)), others, provenance(result, name)])


def shapes_section(result: dict[str, Any], name: str) -> str:
    """The table of conversations in the shape of real ones, with the file that each shape is from."""
    files = [count["shape"] for count, _ in by_conversation(result)]
    rows = [[f"`{file}`", *row] for file, row in zip(files, speed_rows(result), strict=True)]
    title = "The same for conversations in the shape of public ones (lengths and what turns share; random tokens):\n\n"
    return "\n\n".join([title + table(["like", *SPEED_HEADER], rows), waves_ratios(result), provenance(result, name)])


def waves_ratios(result: dict[str, Any]) -> str:
    """How long rows take in waves, relative to rows at once, by kind of conversation."""
    ratios: dict[str, list[str]] = {}
    for count, best in by_conversation(result):
        if "waves" in best:
            ratio = best["waves"]["seconds"] / best["single_pass"]["seconds"]
            ratios.setdefault(count["shape"], []).append(f"{ratio:.2f} ({count['row_tokens']:,} tokens)")
    title = "In the smallest waves that keep the history next to any branch, time ÷ that of the row:\n\n"
    return title + "\n".join(f"- `{shape}`: {', '.join(of_shape)}." for shape, of_shape in ratios.items())


def waves_table(speed: dict[str, Any]) -> str:
    """Memory of rows and of waves, counted and measured, and the time of N-pass over that of both."""
    rows = []
    for count, best in by_conversation(speed):
        if count["turns"] in SUMMARY_TURNS and "waves" in best:
            cells = [str(count["turns"])]
            for mode, name in (("single_pass", "row_bytes"), ("waves", "waves_bytes")):
                cells += [mebibytes(count[name]), mebibytes(best[mode]["bytes"])]
            npass = fastest_npass(best)["seconds"]
            rows.append([*cells, *(f"{npass / best[mode]['seconds']:.2f}" for mode in ("single_pass", "waves"))])
    return table(WAVES_HEADER, rows)


def memory_section(result: dict[str, Any], name: str) -> str:
    used = {mode: [one["bytes"] for one in result["measured"] if one["mode"] == mode] for mode in MEMORY_MODES}
    best = {mode: median(values) for mode, values in used.items()}
    ratio = best["single_pass"] / best["causal_row"]
    text = (
        f"Peak memory of one row of {result['counted'][0]['row_tokens']:,} tokens, forward and backward: "
        f"{mebibytes(best['single_pass'])} as a tree, {mebibytes(best['causal_row'])} as a plain causal row "
        f"(ratio {ratio:.2f})."
    )
    return text + "\n\n" + provenance(result, name)


def self_check_section(result: dict[str, Any], name: str) -> str:
    """What the check before the first step costs, beside one forward of 128 tokens."""
    rows = [
        [
            one["model"],
            one["dtype"],
            one["engine"],
            str(one["forwards"]),
            str(one["forward_tokens"]),
            f"{one['seconds']:.2f} s",
            f"{one['forward_seconds']:.2f} s",
        ]
        for one in result["results"]
    ]
    header = ["parameters", "dtype", "engine", "forwards", "their tokens", "check", "one forward of 128 tokens"]
    machine, versions = result["machine"], result["versions"]
    source = (
        f"<sub>`benchmarks/results/{name}`, {result['date']}, commit {result['commit'][:7]}: {machine['processor']}, "
        f"{machine['cores']} cores, two threads in all; "
        + ", ".join(f"{package} {number}" for package, number in versions.items())
        + ".</sub>"
    )
    return table(header, rows) + "\n\n" + source


def profile_section(result: dict[str, Any], name: str) -> str:
    """Which operations take the time of one step, and what Linux spends on its memory."""
    rows, memory = [], []
    for mode, seconds_of in result["operations"].items():
        whole = sum(seconds_of.values())
        rows.append([PROFILED[mode], *(f"{part / whole:.0%}" for part in seconds_of.values())])
        parts = []
        for kept, used in result["memory"][mode].items():
            system = used["system_seconds"]
            whole_step = seconds(used["user_seconds"] + system)
            parts.append(f"{seconds(system)} of {whole_step} where freed memory is {kept}")
        memory.append(f"- {PROFILED[mode]}: {', '.join(parts)}.")
    kinds = list(next(iter(result["operations"].values())))
    title = f"Where a step of {result['turns']} turns spends its time, by PyTorch's profiler:\n\n"
    between = "What Linux spends on clearing and mapping memory:\n\n"
    return "\n\n".join([title + table(["step", *kinds], rows), between + "\n".join(memory), provenance(result, name)])


def preparation_section(result: dict[str, Any], name: str) -> str:
    """Time of preparation per conversation, of small datasets and of larger ones."""
    rows = [
        [
            str(one["turns"]),
            f"{one['conversations']:,}",
            *(f"{one['milliseconds'][way]:.1f}" for way in ("single_pass", "trl_samples", "trl_one_sequence")),
            f"{one['cpu_milliseconds']['single_pass']:.1f}",
            *(f"{one['tokens'][way]:,.0f}" for way in ("single_pass", "trl_one_sequence")),
            f"**{one['speedup']:.1f}**",
        ]
        for one in result["results"]
    ]
    header = ["turns", "conversations", "single pass", "TRL, samples", "TRL, one sequence"]
    header += ["CPU time of single pass", "tokens of the tree", "of one sequence", "**samples ÷ single pass**"]
    largest = max(result["results"], key=lambda one: one["conversations"])
    hours = largest["milliseconds"]["single_pass"] * 1e6 / 3.6e6
    estimate = (
        f"So one process on two cores prepares a million chats of {largest['turns']} turns in about {hours:.1f} hours"
        "; with more cores, `dataset_num_proc` divides that."
    )
    return "\n\n".join([table(header, rows), estimate, source(result, name)])


def long_section(result: dict[str, Any], name: str) -> str:
    """What one long conversation takes before it is trained."""
    rows = [
        [
            f"{one['turns']:,}",
            f"{one['tree_tokens']:,}",
            f"{one['sample_tokens'] / 1e6:.1f} million",
            f"{one['preparation_seconds']:.1f} s",
            f"{one['template_seconds']:.1f} s",
            seconds(one["packing_seconds"] + one["plan_seconds"]),
            mebibytes(max(one[of] for of in ("preparation_bytes", "packing_bytes", "plan_bytes"))),
        ]
        for one in result["results"]
    ]
    header = ["turns", "tokens of the tree", "tokens of all samples", "preparation", "of it the template"]
    return table([*header, "packing, plan and waves", "peak memory"], rows) + "\n\n" + source(result, name)


def long_steps_section(result: dict[str, Any], name: str) -> str:
    """What a step on one long conversation takes in waves."""
    rows = [
        [
            "a window of 1,024" if one["window"] else "full",
            f"{one['tree_tokens']:,}",
            str(one["waves"]),
            f"{one['step_seconds']:.0f} s",
            mebibytes(one["step_bytes"]),
        ]
        for one in result["results"]
    ]
    return table(["attention", "tokens", "waves", "step", "peak memory"], rows) + "\n\n" + source(result, name)


def ranks_section(result: dict[str, Any], name: str) -> str:
    """The share of time that ranks work, by their number."""
    rows = []
    for dataset, measured in result["datasets"].items():
        shares = [dict(zip(measured["ranks"], measured["efficiency"][way], strict=True)) for way in RANK_WAYS]
        cells = [" / ".join(percent(share[ranks]) for share in shares) for ranks in SHOWN_RANKS]
        rows.append([DATASETS.get(dataset, dataset), *cells])
    header = ["as rows come / balanced / N-pass packed", *(f"{ranks:,} ranks" for ranks in SHOWN_RANKS)]
    return table(header, rows) + "\n\n" + source(result, name)


def choice_section(result: dict[str, Any], name: str) -> str:
    """The share of time that 64 ranks work, by the number of conversations that they choose from."""
    (choice,) = (one for one in result["by_rows_per_step"] if one["ranks"] == 64)
    rows = [[shown, *map(percent, choice["efficiency"][way])] for way, shown in CHOICES.items()]
    return table(["conversations per rank and step", *map(str, choice["rows_per_rank_and_step"])], rows)


def percent(share: float) -> str:
    """`0.9612` -> `"96"`; what would be rounded to 100 keeps a decimal."""
    return f"{100 * share:.0f}" if share < 0.995 else f"{100 * share:.1f}"


def source(result: dict[str, Any], name: str) -> str:
    return f"<sub>`benchmarks/results/{name}`, {result['date']}, commit {result['commit'][:7]}.</sub>"


def provenance(result: dict[str, Any], name: str) -> str:
    machine = result["machine"]
    return (
        f"<sub>`benchmarks/results/{name}`, {result['date']}, commit {result['commit'][:7]}: {machine['processor']}, "
        f"{machine['device']}, {result['dtype']}.</sub>"
    )


# What each kind of results becomes, on docs/performance.md and docs/own_loops.md.
PAGE_SECTIONS: dict[str, Section] = {
    "step_time": speed_section,
    "step_time_shapes": shapes_section,
    "step_profile": profile_section,
    "row_memory": memory_section,
}
CHECK_SECTIONS: dict[str, Section] = {"self_check": self_check_section}
# Those between markers of their own on docs/performance.md, by the name of the markers.
PLACED_SECTIONS: dict[str, tuple[str, Section]] = {
    "preparation": ("preparation", preparation_section),
    "long conversation": ("long_conversation", long_section),
    "steps on a long conversation": ("long_conversation_steps", long_steps_section),
    "many ranks": ("balance_at_scale", ranks_section),
    "choice of rows": ("balance_at_scale", choice_section),
}


def read(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """All results of one kind with their file names, in alphabetical order."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if kind_of(path) == kind]
    return [(path.name, json.loads(path.read_text())) for path in paths]


def report(sections: dict[str, Section] = PAGE_SECTIONS) -> str:
    """All tables of a page."""
    return "\n\n".join(section(result, name) for kind, section in sections.items() for name, result in read(kind))


def replace_between_markers(path: Path, text: str, name: str = "benchmarks") -> None:
    """Write a text between the lines that mark the beginning and the end of a part of a page."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, begin, rest = path.read_text().partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"Expected the lines {first} and {last} in {path}: the tables go between them.")
    path.write_text(f"{head}{first}\n\n{text}\n\n{last}{tail}")


def main() -> None:
    speed, shapes = (read(kind)[-1][1] for kind in ("step_time", "step_time_shapes"))
    replace_between_markers(README, summary(speed, shapes))
    replace_between_markers(PAGE, waves_table(speed), "waves")
    replace_between_markers(PAGE, report())
    replace_between_markers(CHECK, report(CHECK_SECTIONS))
    for marker, (kind, section) in PLACED_SECTIONS.items():
        replace_between_markers(PAGE, report({kind: section}), marker)


if __name__ == "__main__":
    main()
