"""Varlen attention in plain PyTorch, sequence by sequence, in place of flash kernels where there is no GPU."""

import torch

from trl_singlepass.attention.varlen_kernels import VarlenKernel
from trl_singlepass.engine.enable import enable_tree


def scores(q, k, causal, window, scale, softcap):
    """Return the scores of one sequence, `(heads, num_queries, num_keys)`, aligned at the end, -inf where hidden."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))  # from each query back
    visible = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    if window is not None:
        visible &= behind < window
    return s.masked_fill(~visible, -torch.inf)


def sequences(cu_q, cu_k):
    q, k = cu_q.tolist(), cu_k.tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale, softcap):
    """Return output `(num_queries, heads, head_dim)` and log-sum-exp `(heads, num_queries)`."""
    check_arguments(q, k, v, cu_q, cu_k, max_q, max_k, causal)
    outs, lses = [], []
    for here, there in sequences(cu_q, cu_k):
        s = scores(q[here], k[there], causal, window, scale, softcap)
        value = v[there].repeat_interleave(q.shape[1] // v.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", s.softmax(-1), value))
        # Without keys, FlashAttention 2 returns plus infinity.
        lses.append(s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], torch.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, window, scale, softcap):
    """Return the gradients that a flash kernel computes from the output and log-sum-exp that it is given."""
    check_arguments(q, k, v, cu_q, cu_k, max_q, max_k, causal)
    groups = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for here, there in sequences(cu_q, cu_k):
        s = scores(q[here], k[there], causal, window, scale, softcap)
        weights = (s - lse[:, here, None]).exp()
        value = v[there].repeat_interleave(groups, 1)
        delta = (grad[here] * out[here]).sum(-1).T[..., None]
        ds = weights * (torch.einsum("qhd,khd->hqk", grad[here], value) - delta)
        if softcap:
            ds = ds * (1 - (s.nan_to_num(neginf=0.0) / softcap) ** 2)
        ds = ds * scale
        dq[here] = torch.einsum("hqk,khd->qhd", ds, k[there].repeat_interleave(groups, 1))
        dk[there] = torch.einsum("hqk,qhd->khd", ds, q[here]).unflatten(1, (-1, groups)).sum(2)
        dv[there] = torch.einsum("hqk,qhd->khd", weights, grad[here]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


def check_arguments(q, k, v, cu_q, cu_k, max_q, max_k, causal):
    """Assert what flash kernels require; without it, they would read past the end of a tensor."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert cu_k.is_contiguous()
    assert (int(cu_q[0]), int(cu_k[0]), int(cu_q[-1]), int(cu_k[-1])) == (0, 0, len(q), len(k))
    assert len(v) == len(k)
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert isinstance(max_q, int)
    if causal:
        assert bool((cu_k.diff() >= cu_q.diff()).all()), "a query would see no key"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


class ReferenceKernel(VarlenKernel):
    """The functions above as a kernel that counts its calls."""

    dtypes = (torch.float64, torch.float32)

    def __init__(self, has_softcap=True):
        self.has_softcap = has_softcap
        self.calls = []

    def forward(self, x):
        self.calls.append(x.call)
        return varlen_forward(x.query, x.key, x.value, *arguments(x))

    def backward(self, grad, x, out, lse, *, deterministic):
        return varlen_backward(grad, x.query, x.key, x.value, out, lse, *arguments(x))


def arguments(x):
    call = x.call
    borders = call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k
    return *borders, call.is_causal, call.window, x.scale, x.softcap


def switch(model, implementation="flash_attention_2"):
    """What loading with `attn_implementation` does where the package is installed."""
    model.set_attn_implementation("eager")
    model.config._attn_implementation_internal = implementation
    enable_tree(model)
