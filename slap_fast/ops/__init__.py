"""The public operations: what they compute and what they accept.

Everything works on packed sequences: the tokens of B sequences end to end, T rows in all, with
``cu_seqlens`` int32 [B + 1] saying where each begins; an empty sequence is legal. Rows past
``cu_seqlens[-1]`` are never read; in outputs and gradients they are exactly 0 (``lse`` -inf).

``impl`` is None (the best there is for the device), "triton", "cpp", "torch" (fast, of torch's own
operations), "flash" (flash-attn's kernels or torch's varlen) or "reference" (plain, for reading
and for tests). A request that cannot be met raises NotImplementedError: nothing falls back in
silence. :func:`slap_fast.which` tells what runs.

Arguments are checked on every call: dtype, shape, device and a dense last axis. The values of
``cu_seqlens`` and of a schedule are checked on a CPU, and elsewhere with ``SLAP_FAST_DEBUG=1``, as
that syncs. Every mistake is a ValueError that names the argument, what was found and what was
expected.
"""

from slap_fast.ops.attention import attention, attention_qkvpacked, attention_schedule
from slap_fast.ops.map_pool import map_pool
from slap_fast.ops.mel_patches import mel_patches
from slap_fast.ops.packing import pack
from slap_fast.ops.rope import rope_tables

# A submodule and its function share a name: `slap_fast.ops.attention` is the function.
__all__ = [
    "attention",
    "attention_qkvpacked",
    "attention_schedule",
    "map_pool",
    "mel_patches",
    "pack",
    "rope_tables",
]
