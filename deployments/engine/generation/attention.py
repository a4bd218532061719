"""Attention over the paged cache on a CPU: each sequence's queries against its own keys only.

transformers' own way on a CPU is one masked product of all queries of a step with the keys of all sequences, most of
which is thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "slowlens_paged"


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for a packed step.

    Args:
        module: the attention layer.
        query: ``[1, heads, queries of all sequences, size]``.
        key, value: ``[1, key heads, queries of all sequences, size]``; those before are read from the cache.
        attention_mask: not read; the bounds of the sequences say more.
        scaling: of the scores.
        kwargs: ``cache``, its indices, and ``cu_seq_lens_q`` and ``cu_seq_lens_k``, the bounds of each sequence.

    Returns:
        ``[1, queries of all sequences, heads, size]``, and no weights.
    """
    cache = kwargs.pop("cache")
    layer: Any = module
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer.layer_idx, kwargs=kwargs)
    groups: int = query.shape[1] // key.shape[1]
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    output = torch.empty_like(query)
    for i in range(len(queries) - 1):
        begin, end, first, last = queries[i], queries[i + 1], keys[i], keys[i + 1]
        own = query[:, :, begin:end]
        own_key, own_value = key[:, :, first:last], value[:, :, first:last]
        if end - begin == 1:
            # The heads that share keys as the rows of one product.
            packed = own.reshape(1, key.shape[1], groups, -1)
            result = scaled_dot_product_attention(packed, own_key, own_value, scale=scaling)
            output[:, :, begin:end] = result.reshape(own.shape)
            continue
        if groups > 1:
            own_key, own_value = (x.repeat_interleave(groups, dim=1) for x in (own_key, own_value))
        if last - first == end - begin:
            result = scaled_dot_product_attention(own, own_key, own_value, is_causal=True, scale=scaling)
        else:
            mask = torch.ones(end - begin, last - first, dtype=torch.bool).tril(last - first - (end - begin))
            result = scaled_dot_product_attention(own, own_key, own_value, attn_mask=mask, scale=scaling)
        output[:, :, begin:end] = result
    return output.transpose(1, 2), None


def register() -> None:
    """Make it known to transformers under ``NAME``."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
