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
    heads_per_key = inputs.query.shape[1] // inputs.key.shape[1]
    plan = mask.build_once(varlen_plan, heads_per_key, None if cache is None else cache.slots)
    run = _Run(plan, kernel, inputs.scale, inputs.softcap or 0.0, deterministic, cache)
    tensors = padded.query, padded.key, padded.value, inputs.sinks
    out: Tensor = VarlenAttention.apply(*tensors, run)  # type: ignore[no-untyped-call]
    value_dim = inputs.value.shape[-1]
    return out if out.shape[-1] == value_dim else out[..., :value_dim]


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

    Shapes: query `(1, heads, row_length, head_dim)`, key and value `(1, kv_heads, row_length, head_dim)`, sinks
    `(heads,)`, output `(1, row_length, heads, head_dim)`. Inside, tensors have the layout of kernels, without the 1.

    Keys and values are gathered along the paths for the call only, and gathered again for backward instead of kept.
    Shared beginnings of paths and sinks enter after the kernel: backward takes the merged output and log-sum-exp,
    which makes every gradient of each call exact (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, run: _Run) -> Tensor:
        """Return the output."""
        query, key, value = (_tokens_first(x) for x in (query, key, value))
        if run.cache is not None:
            run.cache.store(key, value)
        sources = run.sources(key, value, run.fetch(key.device))
        own: list[tuple[Tensor, Tensor]] = []
        shared: list[tuple[VarlenCall, Tensor, Tensor]] = []
        for part in run.plan.passes:
            path_kv, shared_kv = _gather(sources, part)
            if part.path is not None:
                own.append(run.kernel.forward(run.inputs(_of_call(query, part.path), path_kv, part.path)))
            if part.shared is not None:
                (packed,) = _pack([query], part.shared, key.shape[1])
                shared.append((part.shared, *run.kernel.forward(run.inputs(packed, shared_kv, part.shared))))
        out, lse = _join(own)
        for call, shared_out, shared_lse in shared:
            _merge_(out, lse, call, shared_out, shared_lse, sinks)
        if sinks is not None:
            for first, last in run.plan.alone:
                add_sinks_(_cut(out, first, last).transpose(0, 1), _cut(lse, first, last, dim=1), sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.run = run
        return out.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `query`, `key`, `value` and `sinks`, and `None` for the rest."""
        query, key, value, sinks, out, lse = ctx.saved_tensors
        run: _Run = ctx.run
        grad = grads[0].contiguous().squeeze(0)
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
            in_row = _in_packed_order(grad_query, call, key.shape[1])
            in_row.add_(dq.view(in_row.shape))
        grad_sinks = None
        if sinks is not None:
            grad_sinks = sink_gradient(grad.transpose(0, 1), out.transpose(0, 1), lse, sinks)
        kv = total.finish(run.cache, fetched, run.plan.cached_for_later).to(key.dtype)
        grad_key, grad_value = torch.split(kv.transpose(1, 2), 1)
        return _heads_first(grad_query), grad_key, grad_value, grad_sinks, None


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
        """Return the gradients of a call of shared beginnings; that of queries packed."""
        kv_heads = kv[0].shape[1]
        packed = _pack([self.query, self.grad, self.out], call, kv_heads)
        lse = _in_packed_order(self.lse, call, kv_heads, (2, 0, 1, 3)).flatten(1)
        return self._call(call, kv, *packed, lse)

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


def _tokens_first(x: Tensor) -> Tensor:
    """Shape `(row_length, heads, dim)` from `(1, heads, row_length, dim)`, in one view."""
    _, heads, length, dim = x.shape
    _, head_stride, token_stride, dim_stride = x.stride()
    return x.as_strided((length, heads, dim), (token_stride, head_stride, dim_stride))


def _heads_first(x: Tensor) -> Tensor:
    """The inverse of `_tokens_first`."""
    length, heads, dim = x.shape
    token_stride, head_stride, dim_stride = x.stride()
    return x.as_strided((1, heads, length, dim), (x.numel(), head_stride, token_stride, dim_stride))


def _cut(x: Tensor, first: int, last: int, dim: int = 0) -> Tensor:
    """A range of queries; the same tensor where these are the whole row."""
    return x if last - first == x.shape[dim] else x.narrow(dim, first, last - first)


def _of_call(x: Tensor, call: VarlenCall, dim: int = 0) -> Tensor:
    """The queries of a call."""
    return _cut(x, call.start, call.end, dim)


def _in_packed_order(
    x: Tensor, call: VarlenCall, kv_heads: int, order: tuple[int, int, int, int] = (0, 1, 2, 3)
) -> Tensor:
    """
    The queries of a call as `_pack` orders them, in one view of shape `(num_queries, groups, kv_heads, dim)`.

    Takes a tensor of the row, `(row_length, heads, dim)`, or its log-sum-exp, `(heads, row_length)`, whose `dim` is 1.
    `order` permutes the dimensions of the view.
    """
    if x.dim() == 2:
        heads, dim, head_stride, query_stride, dim_stride = len(x), 1, *x.stride(), 1
    else:
        heads, dim, query_stride, head_stride, dim_stride = *x.shape[1:], *x.stride()
    groups = heads // kv_heads
    size = (call.end - call.start, groups, kv_heads, dim)
    stride = (query_stride, head_stride, groups * head_stride, dim_stride)
    start = x.storage_offset() + call.start * query_stride
    return x.as_strided([size[i] for i in order], [stride[i] for i in order], start)


def _pack(row: list[Tensor], call: VarlenCall, kv_heads: int) -> Sequence[Tensor]:
    """
    Heads that read one key-value head as queries one after the other, shape `(num_queries · groups, kv_heads, dim)`.

    Queries without a causal order may be repeated. With four heads, of which two read each key-value head, a query
    becomes two: one with its heads 0 and 2, one with its heads 1 and 3.
    """
    views = [_in_packed_order(x, call, kv_heads) for x in row]
    if len(views) == 1 or views[0].shape[1] == 1:
        return [x.flatten(0, 1) for x in views]  # no copies if each head has its own keys
    return torch.stack(views).flatten(1, 2).unbind()


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of calls that follow one another."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def _merge_(
    out: Tensor, lse: Tensor, call: VarlenCall, shared_out: Tensor, shared_lse: Tensor, sinks: Tensor | None
) -> None:
    """Merge what packed queries found in shared beginnings into output and log-sum-exp of the row, in place."""
    kv_heads, num_packed = shared_lse.shape
    own_out, own_lse = (_in_packed_order(x, call, kv_heads) for x in (out, lse))
    groups = own_lse.shape[1]
    other_lse = shared_lse.as_strided(own_lse.shape, (groups, 1, num_packed, 1))
    if call.without_keys is not None:  # kernels return infinity for queries without keys, of either sign
        other_lse = other_lse.masked_fill(call.without_keys, -torch.inf)
    weights = torch.stack([own_lse, other_lse])
    torch.logaddexp(own_lse, other_lse, out=own_lse)
    if sinks is not None:
        torch.logaddexp(own_lse, sinks.view(kv_heads, groups).T[..., None], out=own_lse)
    own_weight, shared_weight = weights.sub_(own_lse).exp_()
    own_out.mul_(own_weight).addcmul_(shared_out.view(own_out.shape), shared_weight)


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
