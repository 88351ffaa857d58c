"""A scan in the place of fla's, which needs a GPU: the same arguments, on any device."""

from itertools import pairwise

import torch


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
        return torch.cat(outputs, dim=1), None if state is None else torch.cat(states)

    packed_scan.num_packed_calls = 0
    return packed_scan
