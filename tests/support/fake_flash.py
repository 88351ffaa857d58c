"""Stand-ins with the entry points of real flash packages, backed by the reference, to test how they are called."""

from types import SimpleNamespace

import torch

from support import varlen_reference


def flash2():
    """flash-attn 2.8: `_flash_attn_varlen_forward` and `_backward`, which writes gradients into given tensors."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, seqused_k, return_softmax) == (0.0, None, None, False)
        window = sizes(window_size_left, window_size_right)
        out, lse = varlen_reference.varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, softmax_scale, softcap
        )
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes) == (0.0, None)
        assert isinstance(deterministic, bool)
        window = sizes(window_size_left, window_size_right)
        write(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
              causal, window, softmax_scale, softcap)  # fmt: skip

    return SimpleNamespace(**locals())


def flash3():
    """flash-attn-3: one entry point for all layouts, `is_causal` in backward."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
        num_splits=1,
    ):  # fmt: skip
        assert (attention_chunk, num_splits) == (0, 1)
        window = sizes(window_size_left, window_size_right)
        out, lse = varlen_reference.varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, softmax_scale, softcap
        )
        return out, lse, torch.tensor([]), torch.tensor([])

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        window = sizes(window_size_left, window_size_right)
        write(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
              is_causal, window, softmax_scale, softcap)  # fmt: skip

    return SimpleNamespace(**locals())


def hub_flash3():
    """An older FlashAttention 3 from the Hub: no defaults, `window_size` as a pair, `causal` in backward."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, s_aux=None,
    ):  # fmt: skip
        assert (k_new, out, cu_seqlens_k_new, seqused_q, s_aux) == (None,) * 5
        result, lse = varlen_reference.varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, sizes(*window_size),
            softmax_scale, softcap,
        )  # fmt: skip
        return result, lse

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert (sequed_q, sequed_k) == (None, None)
        write(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
              causal, sizes(*window_size), softmax_scale, softcap)  # fmt: skip

    return SimpleNamespace(**locals())


def torch_library():
    """Return a library that implements PyTorch's two varlen operators on CPU for as long as it exists."""
    library = torch.library.Library("aten", "IMPL")

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None, **unused,
    ):  # fmt: skip
        assert dropout_p == 0.0
        # The kernel expresses causal as (-1, 0), and takes a two-sided window if `is_causal` is off.
        assert is_causal == ((window_size_left, window_size_right) == (-1, 0))
        out, lse = varlen_reference.varlen_forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, window_size_right == 0,
            sizes(window_size_left, window_size_right), scale, 0.0,
        )  # fmt: skip
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert is_causal == ((window_size_left, window_size_right) == (-1, 0))
        return varlen_reference.varlen_backward(
            grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, window_size_right == 0,
            sizes(window_size_left, window_size_right), scale, 0.0,
        )  # fmt: skip

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library


def sizes(left, right):
    """Return the size of a window that flash kernels take as tokens before and after."""
    assert right == 0 or left == right == -1
    return None if left == -1 else left + 1


def write(dout, q, k, v, out, lse, dq, dk, dv, *rest):
    grads = varlen_reference.varlen_backward(dout, q, k, v, out, lse, *rest)
    for given, computed in zip((dq, dk, dv), grads, strict=True):
        assert given.is_contiguous()
        given.copy_(computed)


def varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """The public function that transformers calls on padded batches."""
    window = None if window_size[0] == -1 else window_size[0] + 1
    out, _ = varlen_reference.varlen_forward(
        q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k), causal, window,
        softmax_scale or q.shape[-1] ** -0.5, softcap,
    )  # fmt: skip
    return out


def func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """The public function that transformers calls on batches without padding."""
    batch, lengths = q.shape[0], (q.shape[1], k.shape[1])
    borders = [torch.arange(0, batch * length + 1, length, dtype=torch.int32) for length in lengths]
    out = varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *borders, *lengths, softmax_scale, causal,
                      window_size, softcap)  # fmt: skip
    return out.view(q.shape)
