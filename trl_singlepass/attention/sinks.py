"""Attention sinks: a logit per head that takes part in the softmax without a key or a value (gpt-oss)."""

from __future__ import annotations

import torch


def add_sinks_(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """
    Add a sink to the softmax after the fact: it only scales the output, by `exp(lse - logaddexp(lse, sink))`.

    Scales `out`, `(..., heads, num_queries, value_dim)`, in place. Takes the log-sum-exp of the scores without sinks
    and returns it with them, `(..., heads, num_queries)`; `sinks` has shape `(heads,)`.
    """
    merged = torch.logaddexp(lse, sinks[:, None])
    out *= (lse - merged).exp_()[..., None]
    return merged


def sink_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """
    Return the gradient of the sinks, `-Σ weight · rowsum(grad · out)` with the weight `exp(sink - lse)`.

    Takes the output and its gradient, `(heads, num_queries, value_dim)`, the log-sum-exp, `(heads, num_queries)`, both
    with sinks, and `sinks` of shape `(heads,)`; returns `(heads,)`.
    """
    delta = (grad.to(lse.dtype) * out).sum(-1)
    weight = (sinks[:, None] - lse).exp_()
    # Negated and rounded to the sinks' dtype in one kernel; `torch.neg` takes no `out` of another dtype.
    return torch.mul(torch.einsum("hq,hq->h", weight, delta), -1, out=torch.empty_like(sinks))
