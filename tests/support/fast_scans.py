"""Kernels in the place of fla's, which need a GPU: the same arguments, on any device."""

from itertools import pairwise

import torch


class ScanWithoutNumbers(torch.autograd.Function):
    """Outputs and gradients of the right shapes without a launch, so that a count has everything but the scan."""

    @staticmethod
    def forward(ctx, query, key, value, g, beta, state, num_sequences):
        """Return the output and the final states."""
        ctx.save_for_backward(query, key, value, g, beta)
        ctx.has_state = state is not None
        return torch.empty_like(value), value.new_empty(
            num_sequences, value.shape[2], query.shape[-1], value.shape[-1]
        )

    @staticmethod
    def backward(ctx, grad, grad_state):
        """Return the gradients."""
        inputs = tuple(map(torch.empty_like, ctx.saved_tensors))
        return *inputs, torch.empty_like(grad_state) if ctx.has_state else None, None


def scan_without_numbers(
    query, key, value, g, beta, initial_state=None, output_final_state=False, cu_seqlens=None, **options
):
    """Take the place of `fla.ops.gated_delta_rule.chunk_gated_delta_rule` on meta tensors."""
    num_sequences = len(query) if cu_seqlens is None else len(cu_seqlens) - 1
    return ScanWithoutNumbers.apply(query, key, value, g, beta, initial_state, num_sequences)


def packing(scan):
    """Let one of transformers' scans keep packed sequences apart as fla's do: sequence by sequence."""

    def packed_scan(query, key, value, g, beta, initial_state=None, cu_seqlens=None, **options):
        if cu_seqlens is None:
            return scan(query, key, value, g=g, beta=beta, initial_state=initial_state, **options)
        assert len(query) == 1
        ends = cu_seqlens.tolist()
        assert initial_state is None or len(initial_state) == len(ends) - 1
        outputs, states = [], []
        for index, (start, end) in enumerate(pairwise(ends)):
            state = None if initial_state is None else initial_state[index : index + 1]
            parts = (x[:, start:end] for x in (query, key, value))
            output, state = scan(*parts, g=g[:, start:end], beta=beta[:, start:end], initial_state=state, **options)
            outputs.append(output)
            states.append(state)
        packed_scan.num_packed_calls += 1
        return torch.cat(outputs, dim=1), torch.cat(states)

    packed_scan.num_packed_calls = 0
    return packed_scan
