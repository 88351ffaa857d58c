"""
Recurrent layers on rows that ranks share: each rank has a part of the tokens, and its layers need all of them.

A convolution runs over the whole row with a share of the channels, a scan with a share of the heads, and parameters of
either are divided alike. A layer that runs piece by piece as a whole cannot be divided: its inputs are gathered, every
rank runs it over the row, and keeps its part of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention.row_group import RowGroup


Call = Callable[..., Any]


def on_share_of_channels(run: Call, group: RowGroup | None) -> Call:
    """
    Return a convolution that takes this rank's part of a row; `run` itself if no ranks share the row.

    `run` convolves a whole row, `(1, channels, row_length)`, by channel. It also takes the weight,
    `(channels, kernel_size)`, and further arguments, such as a bias of shape `(channels,)`.
    """
    if group is None:
        return run

    def convolve(hidden_states: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        channels = hidden_states.shape[1]

        def share(value: object) -> object:
            is_per_channel = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == channels
            return group.share_of_heads(value) if is_per_channel else value  # type: ignore[arg-type]

        row = group.to_heads(hidden_states.transpose(1, 2), channels).transpose(1, 2)
        shared = {name: share(value) for name, value in options.items()}
        output = run(row, *map(share, args), **shared)
        return group.to_tokens(output.transpose(1, 2), channels).transpose(1, 2)

    return convolve


def on_share_of_heads(run: Call, group: RowGroup | None, length: int) -> Call:
    """
    Return a scan that takes this rank's part of a row; `run` itself if no ranks share the row.

    `run` scans a whole row head by head. It takes per-token tensors of shape `(1, row_length, heads, ...)`, where
    groups of heads may share one (`num_groups` of Mamba-2), parameters of shape `(heads, ...)` and others. It returns
    its output, shape `(1, row_length, heads, ...)`, or a tuple that begins with it.
    """
    if group is None:
        return run
    num_tokens = length // group.size

    def scan(*args: object, **options: object) -> Any:
        values: list[Any] = [*args, *options.values()]
        heads = max(value.shape[2] for value in values if _is_per_token(value, num_tokens))

        def share(value: Any) -> Any:
            if _is_per_token(value, num_tokens):
                return group.to_heads(value, heads)
            is_per_head = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == heads
            return group.share_of_heads(value) if is_per_head else value

        output = run(*map(share, args), **{name: share(value) for name, value in options.items()})
        if isinstance(output, tuple):
            return (group.to_tokens(output[0], heads), *output[1:])
        return group.to_tokens(output, heads)

    return scan


def _is_per_token(value: Any, num_tokens: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[:2] == (1, num_tokens)


def gather_argument(value: Any, group: RowGroup, num_tokens: int) -> Any:
    """
    Return an argument of a layer for the whole row, from this rank's part.

    The argument is a tensor of shape `(1, num_tokens, ...)`, or a tuple or dictionary of such. Other values are the
    same on all ranks, and returned as they are.
    """
    if isinstance(value, dict):
        return {name: gather_argument(part, group, num_tokens) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(gather_argument(part, group, num_tokens) for part in value)
    is_per_token = isinstance(value, torch.Tensor) and value.shape[:2] == (1, num_tokens)
    return group.gather(value) if is_per_token else value


def part_of_output(output: Any, length: int, group: RowGroup) -> Any:
    """
    Return this rank's part of what a layer returned for a row.

    The output is a tensor of shape `(1, row_length, ...)`, or a tuple of such; others stay.
    """
    if isinstance(output, tuple):
        return tuple(part_of_output(part, length, group) for part in output)
    is_per_token = isinstance(output, torch.Tensor) and output.shape[:2] == (1, length)
    return group.part(output) if is_per_token else output
