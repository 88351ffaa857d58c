"""Tree attention on varlen flash kernels: one call for all branches, keys gathered along each branch's path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interface import AttentionInputs, Gradients, add_sinks_, sink_gradient
from .kv_cache import FetchedSlots, KVCacheView
from .tree_mask import TreeMask
from .varlen_kernels import VarlenInputs, VarlenKernel
from .varlen_plan import VarlenCall, VarlenPass, VarlenPlan, varlen_plan


KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values, each of shape `(num_keys, kv_heads, head_dim)`."""


def varlen_tree_attention(
    inputs: AttentionInputs,
    mask: TreeMask,
    kernel: VarlenKernel,
    deterministic: bool = False,
    cache: KVCacheView | None = None,
) -> Tensor:
    """
    Return attention of a row of trees by a varlen flash kernel, shape `(1, row_length, heads, value_dim)`.

    A deterministic backward adds in a fixed order, and is slower. `cache` has what lies outside the row.
    """
    padded = inputs.with_one_head_dim(8)  # a multiple of 8 is what flash kernels want
    tokens_first = (x.transpose(1, 2).squeeze(0) for x in (padded.query, padded.key, padded.value))
    heads_per_key = inputs.query.shape[1] // inputs.key.shape[1]
    plan = mask.build_once(varlen_plan, heads_per_key, None if cache is None else cache.slots)
    run = _Run(plan, kernel, inputs.scale, inputs.softcap or 0.0, deterministic, cache)
    out: Tensor = VarlenAttention.apply(*tokens_first, inputs.sinks, run)  # type: ignore[no-untyped-call]
    return out[..., : inputs.value.shape[-1]].unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Run:
    """The kernel calls that together cover a row, and their options."""

    plan: VarlenPlan
    kernel: VarlenKernel
    scale: float
    softcap: float
    deterministic: bool
    cache: KVCacheView | None

    def fetch(self, device: torch.device) -> FetchedSlots | None:
        """Bring the ancestors outside the row onto the device of the layer."""
        if self.plan.slots is None:
            return None
        assert self.cache is not None, "only a wave has ancestors outside its row"
        return self.cache.fetch(*self.plan.slots, device)

    def sources(self, key: Tensor, value: Tensor, fetched: FetchedSlots | None) -> KeysAndValues:
        """Return what the passes gather from: the row, followed by ancestors outside it."""
        if fetched is None:
            return key, value
        keys, values = fetched.kv.unbind()
        return torch.cat([key, keys]), torch.cat([value, values])

    def inputs(self, query: Tensor, kv: KeysAndValues, call: VarlenCall) -> VarlenInputs:
        """Return the inputs of a call, from its queries and from its keys and values."""
        return VarlenInputs(query, *kv, call, self.scale, self.softcap)


class VarlenAttention(torch.autograd.Function):
    """
    Attention of a row of trees by a varlen kernel.

    Shapes: query and output `(row_length, heads, head_dim)`, key and value `(row_length, kv_heads, head_dim)`, sinks
    `(heads,)`.

    Keys and values are gathered along the paths for the call only, and gathered again for backward instead of kept.
    Shared beginnings of paths and sinks enter after the kernel: backward takes the merged output and log-sum-exp,
    which makes every gradient of each call exact (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, run: _Run) -> Tensor:
        """Return the output."""
        if run.cache is not None:
            run.cache.store(key, value)
        sources = run.sources(key, value, run.fetch(key.device))
        own, shared = [], []
        for part in run.plan.passes:
            path_kv, shared_kv = _gather(sources, part)
            if part.path is not None:
                own.append(run.kernel.forward(run.inputs(_of_call(query, part.path), path_kv, part.path)))
            if part.shared is not None:
                packed = _pack(_of_call(query, part.shared), key.shape[1])
                shared.append(run.kernel.forward(run.inputs(packed, shared_kv, part.shared)))
        out, lse = _join(own)
        if shared:
            lse = _merge(out, lse, _join(shared), run.plan.without_shared, sinks)
        elif sinks is not None:
            lse = add_sinks_(out.transpose(0, 1), lse, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.run = run
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `query`, `key`, `value` and `sinks`, and `None` for the rest."""
        query, key, value, sinks, out, lse = ctx.saved_tensors
        run: _Run = ctx.run
        grad = grads[0].contiguous()
        fetched = run.fetch(key.device)
        sources = run.sources(key, value, fetched)
        row = _Backward(run, query, grad, out, lse)
        total = PathGradients(key, 0 if fetched is None else fetched.kv.shape[1], run.deterministic)
        own: list[Tensor] = []
        shared: list[tuple[VarlenCall, Tensor]] = []
        for part in run.plan.passes:
            (path_kv, shared_kv), found = _gather(sources, part), []
            if part.path is not None:
                found.append(row.path(part.path, path_kv))
                own.append(found[-1][0])
            if part.shared is not None:
                found.append(row.shared(part.shared, shared_kv))
                shared.append((part.shared, found[-1][0]))
            total.add([dk for _, dk, _ in found], [dv for _, _, dv in found], part.key_index)
        grad_query = own[0] if len(own) == 1 else torch.cat(own)
        for call, dq in shared:
            _of_call(grad_query, call).view(dq.shape).add_(dq)
        grad_sinks = None
        if sinks is not None:
            grad_sinks = sink_gradient(grad.transpose(0, 1), out.transpose(0, 1), lse, sinks)
        grad_key, grad_value = total.finish(run.cache, fetched, run.plan.cached_for_later).to(key.dtype)
        return grad_query, grad_key, grad_value, grad_sinks, None


@dataclass(frozen=True, slots=True, eq=False)
class _Backward:
    """Gradients of single calls, from the merged output and log-sum-exp of the row."""

    run: _Run
    query: Tensor
    grad: Tensor
    out: Tensor
    lse: Tensor

    def path(self, call: VarlenCall, kv: KeysAndValues) -> Gradients:
        """Return the gradients of a call of paths."""
        query, grad, out = (_of_call(x, call) for x in (self.query, self.grad, self.out))
        return self._call(call, kv, query, grad, out, _of_call(self.lse, call, dim=1).contiguous())

    def shared(self, call: VarlenCall, kv: KeysAndValues) -> Gradients:
        """Return the gradients of a call of shared beginnings; that of queries as the row has them."""
        kv_heads = kv[0].shape[1]
        query, grad, out = (_pack(_of_call(x, call), kv_heads) for x in (self.query, self.grad, self.out))
        lse = _of_call(self.lse, call, dim=1).view(kv_heads, -1, call.end - call.start).transpose(1, 2).flatten(1)
        dq, dk, dv = self._call(call, kv, query, grad, out, lse)
        return _unpack(dq, call.end - call.start), dk, dv

    def _call(self, call: VarlenCall, kv: KeysAndValues, query: Tensor, *rest: Tensor) -> Gradients:
        grad, out, lse = rest
        inputs = self.run.inputs(query, kv, call)
        return self.run.kernel.backward(grad, inputs, out, lse, deterministic=self.run.deterministic)


def _gather(sources: KeysAndValues, part: VarlenPass) -> tuple[KeysAndValues, KeysAndValues]:
    """Keys and values of the calls of a pass: of its paths, and of the beginnings that they share."""
    keys, values = sources
    if part.key_index is not None:
        keys, values = keys.index_select(0, part.key_index), values.index_select(0, part.key_index)
    if part.path is None or part.shared is None:
        return (keys, values), (keys, values)
    sizes = [part.path.num_keys, part.shared.num_keys]
    (own_keys, shared_keys), (own_values, shared_values) = torch.split(keys, sizes), torch.split(values, sizes)
    return (own_keys, own_values), (shared_keys, shared_values)


def _of_call(x: Tensor, call: VarlenCall, dim: int = 0) -> Tensor:
    """The queries of a call; the same tensor where these are the whole row."""
    num_queries = call.end - call.start
    return x if num_queries == x.shape[dim] else x.narrow(dim, call.start, num_queries)


def _pack(x: Tensor, kv_heads: int) -> Tensor:
    """
    Heads that read one key-value head as queries one after the other, shape `(num_queries · groups, kv_heads, dim)`.

    Queries without a causal order may be repeated. With four heads, of which two read each key-value head, a query
    becomes two: one with its heads 0 and 2, one with its heads 1 and 3.
    """
    return x.reshape(len(x), kv_heads, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)


def _unpack(x: Tensor, num_queries: int) -> Tensor:
    """The inverse of `_pack` as a view of shape `(num_queries, kv_heads, groups, dim)`."""
    return x.view(num_queries, -1, *x.shape[1:]).transpose(1, 2)


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of calls that follow one another."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def _merge(
    out: Tensor, lse: Tensor, shared: tuple[Tensor, Tensor], without_shared: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Add what packed queries found in the shared beginnings to the output, in place; return the log-sum-exp."""
    length = len(out)
    shared_out, shared_lse = _unpack(shared[0], length), shared[1].view(len(shared[1]), length, -1).transpose(1, 2)
    kv_heads, groups = shared_out.shape[1:3]
    if without_shared is not None:  # kernels return infinity for queries without keys, of either sign
        shared_lse = shared_lse.masked_fill(without_shared, -torch.inf)
    own_lse = lse.view(kv_heads, groups, length)
    merged = torch.logaddexp(own_lse, shared_lse)
    if sinks is not None:
        merged = torch.logaddexp(merged, sinks.view(kv_heads, groups, 1))
    # From `(kv_heads, groups, num_queries)` to the order of outputs.
    weights = (torch.stack([own_lse, shared_lse]) - merged).exp_()
    own_weight, shared_weight = weights.permute(0, 3, 1, 2).unsqueeze(-1)
    out.view(length, kv_heads, groups, -1).mul_(own_weight).addcmul_(shared_out, shared_weight)
    return merged.flatten(0, 1)


class PathGradients:
    """
    Sum of the gradients of gathered keys and values: history gets one from every branch, added up in float32 at least.

    Takes the keys of the row, `(row_length, kv_heads, head_dim)`, and the number of keys gathered from outside the
    row. A deterministic sum adds in a fixed order, which is slower.
    """

    def __init__(self, key: Tensor, num_slots: int, deterministic: bool) -> None:
        self.length = len(key)
        # `torch.promote_types` would dispatch one more operator in every layer.
        self.dtype, self.deterministic = max(key.dtype, torch.float32, key=lambda dtype: dtype.itemsize), deterministic
        self._shape = (2, len(key) + num_slots, *key.shape[1:])
        self._total: Tensor | None = None

    def add(self, grad_keys: Sequence[Tensor], grad_values: Sequence[Tensor], index: Tensor | None) -> None:
        """
        Add the gradients of a pass, each of shape `(num_keys, kv_heads, head_dim)`, one per call.

        `index` has the positions of the keys of all calls, `None` if they are the row as it is.
        """
        joined = torch.cat([*grad_keys, *grad_values]).view(2, -1, *self._shape[2:]).to(self.dtype)
        if index is None:
            self._total = joined
            return
        if self._total is None:
            self._total = joined.new_zeros(self._shape)
        if self.deterministic:  # sorts the index; `index_add_` adds in whatever order threads come
            self._total.transpose(0, 1).index_put_((index.long(),), joined.transpose(0, 1), accumulate=True)
        else:
            self._total.index_add_(1, index, joined)

    def finish(
        self, cache: KVCacheView | None, fetched: FetchedSlots | None, cached_for_later: Tensor | None
    ) -> Tensor:
        """
        Return the gradients of the row's keys and values, and send back those of ancestors outside it.

        The cache gives what later rows sent back; `cached_for_later` has the positions of the tokens that they attend
        to, if these do not lie together. Returns shape `(2, row_length, kv_heads, head_dim)`.
        """
        assert self._total is not None, "a row has at least one call"
        own = self._total
        if cache is not None:
            if fetched is not None:
                own, outside = torch.split(own, [self.length, fetched.kv.shape[1]], dim=1)
                cache.add_gradients(fetched, outside)
            cache.add_gradients_from_later_rows(own, cached_for_later)
        return own
