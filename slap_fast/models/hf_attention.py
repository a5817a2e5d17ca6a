"""transformers' attention on the packed operation, for the text tower and for patched models.

transformers 5 looks two functions up by name. The mask interface runs once per forward pass and
gives which tokens may see which: here a :class:`PackedMask` instead of a [B, 1, L, L] mask. The
attention interface runs once per layer, unpads by that mask and pads again; a batch that comes
with ``cu_seq_lens_q`` is packed already and needs no mask. No value is read back from the device,
except for batches that are packed by ``position_ids`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from slap_fast import ops
from slap_fast.models.dense_attention import dense_attention, dropout_attention
from slap_fast.models.packed_view import PackedMask, PackedView
from slap_fast.precision import compute_dtype


class _Name(str):
    """A name in transformers' interfaces, also of the process where its pickle is read."""

    def __deepcopy__(self, memo: Any) -> _Name:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, ()


NAME = _Name("slap_fast")

_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")
_SUPPORTED_MASKS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
)
"""Mask functions, besides padding and packing, that the attention's own arguments express."""

counts_tokens: ContextVar[bool] = ContextVar("counts_tokens", default=False)
"""Whether masks count their real tokens, for blocks that run on those alone; this reads a number
back from the device."""


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device,
    **_: Any,
) -> PackedMask:
    """transformers' mask interface.

    Raises ValueError for a mask that is more than padding, packing, causal and sliding window, and
    for a cache with room that is not filled yet.
    """
    # Dynamo cannot inspect a function made inside its graph.
    compiling = torch.compiler.is_compiling()
    parts = {} if compiling else dict(_mask_parts(mask_function))
    unknown = parts.keys() - {*_SUPPORTED_MASKS, "packed_sequence_mask_function"}
    if unknown:
        raise ValueError(
            f"attention mask: found one made by {', '.join(sorted(unknown))}, expected padding, "
            "packing, causal or a sliding window; patch(..., attention=False) leaves it alone"
        )
    causal = None if compiling else "causal_mask_function" in parts
    # Without it, keys may be another sequence's: those of an encoder.
    if causal is not False and not isinstance(q_offset, Tensor):
        if q_offset + q_length != kv_offset + kv_length:
            raise ValueError(
                f"past_key_values: found {kv_offset + kv_length} keys for the queries up to "
                f"{q_offset + q_length}, expected as many: a cache that grows, not a static one"
            )
    same = q_length == kv_length
    num_tokens = None
    if attention_mask is not None:
        # A cache of a sliding window holds fewer keys than the mask has positions.
        mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        keys = PackedView.from_mask(mask)
        queries = keys if same else PackedView.from_mask(mask[:, -q_length:])
        if same and not compiling and counts_tokens.get():
            num_tokens = keys.num_tokens()
    elif "packed_sequence_mask_function" in parts:
        queries = keys = PackedView.from_sequence_numbers(parts["packed_sequence_mask_function"])
    else:
        keys = PackedView.unpadded(batch_size, kv_length, device)
        queries = keys if same else PackedView.unpadded(batch_size, q_length, device)
    windowed = any(name.startswith("sliding") for name in parts)
    return PackedMask(queries, keys, causal, windowed, num_tokens)


def _mask_parts(mask_function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yields the functions that a mask is the intersection of: (name, first closed-over value)."""
    name = mask_function.__qualname__.split(".")[0]
    closure = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    if name == "and_masks":
        for function in closure[0]:
            yield from _mask_parts(function)
    elif name == "remap_positions_for_packed_sequence":
        yield from _mask_parts(next(value for value in closure if callable(value)))
    else:
        yield name, closure[0] if closure else None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    query [B, H, L, D], key and value [B, Hkv, Lk, D], already rotated; ``sliding_window`` counts
    the token itself. With ``cu_seq_lens_q`` (and ``_k``) the batch is one packed row, B = 1, and
    the mask is not needed. Returns ([B, L, H, D], None); what padded tokens get is of no use.

    With ``dropout``, or a mask that is a tensor [B, 1 or H, L, Lk], torch's own attention runs.

    Raises ValueError for what the packed operation does not do: soft caps, sinks, biases.
    """
    for name in _UNSUPPORTED:
        found = options.get(name)
        if found is not None and found is not False:
            if isinstance(found, Tensor):
                found = f"a tensor of shape {list(found.shape)}"
            raise ValueError(f"{name}: found {found}, which packed attention has not")
    if isinstance(attention_mask, Tensor):
        mask = attention_mask
        return dense_attention(query, key, value, mask, dropout=dropout, scale=scaling), None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None:
        if attention_mask.causal is not None:
            is_causal = attention_mask.causal
        elif is_causal and attention_mask.queries.order is None and cu_seq_lens_q is None:
            raise ValueError(
                "attention_mask: found none under torch.compile, expected one, or cu_seq_lens_q: "
                "position_ids might pack a causal batch, unseen"
            )
        if attention_mask.windowed and sliding_window is None:
            raise ValueError("sliding_window: found None, expected the window of the layer's mask")
    if cu_seq_lens_q is not None:
        queries = PackedView(None, cu_seq_lens_q, max_length_q)
        keys = queries if cu_seq_lens_k is None else PackedView(None, cu_seq_lens_k, max_length_k)
    elif attention_mask is not None:
        queries, keys = attention_mask.queries, attention_mask.keys
        if not is_causal and not attention_mask.windowed and keys.order is not None:
            # Perhaps an encoder's padding, of keys alone: it says nothing of the queries.
            queries = PackedView.unpadded(len(query), query.shape[2], query.device)
    else:
        keys = PackedView.unpadded(len(key), key.shape[2], key.device)
        same = query.shape[2] == key.shape[2]
        queries = keys if same else PackedView.unpadded(len(query), query.shape[2], query.device)
    window = -1 if sliding_window is None else sliding_window - 1
    if dropout:
        out = dropout_attention(
            query,
            key,
            value,
            queries,
            keys,
            dropout=dropout,
            window=window,
            causal=is_causal,
            scale=scaling,
        )
        return out, None
    # Under autocast a rotation in fp32 leaves q and k in fp32, beside v in the autocast dtype.
    query, key, value = (x.to(compute_dtype(x)) for x in (query, key, value))
    same = queries.cu_seqlens is keys.cu_seqlens
    out = ops.attention(
        queries.unpad(query),
        keys.unpad(key),
        keys.unpad(value),
        queries.cu_seqlens,
        queries.max_seqlen,
        cu_seqlens_k=None if same else keys.cu_seqlens,
        max_seqlen_k=None if same else keys.max_seqlen,
        window_size=(window, window),
        causal=is_causal,
        softmax_scale=scaling,
    )
    return queries.pad(out, len(query)), None


@contextmanager
def recorded() -> Iterator[list[nn.Module]]:
    """The modules whose calls reach the packed operation, while it lasts."""
    from transformers import AttentionInterface

    reached: list[nn.Module] = []

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        mask = kwargs.get("attention_mask", args[3] if len(args) > 3 else None)
        if not isinstance(mask, Tensor):
            reached.append(module)
        return packed_attention(module, *args, **kwargs)

    AttentionInterface.register(NAME, attention)
    try:
        yield reached
    finally:
        AttentionInterface.register(NAME, packed_attention)


def register() -> None:
    """Makes ``set_attn_implementation("slap_fast")`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)


def _registered() -> str:
    register()
    return NAME
