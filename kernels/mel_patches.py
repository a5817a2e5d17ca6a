"""Packed waveforms to log-mel patches in one launch: the transform is four tensor-core products.

With y the windowed frame in the middle of 512 samples, power[k] = C[k]^2 + S[k]^2, where

    C[k] = sum_m e[m] cos(2 pi k (m + 1/2) / 512)    e[m] = y[256 + m] + y[255 - m]    m = 0 .. 255
    S[k] = sum_m o[m] sin(2 pi k (m + 1/2) / 512)    o[m] = y[256 + m] - y[255 - m]

and the cosine at 255 - m is that at m times (-1)^k, the sine times -(-1)^k. So m and 255 - m fold
once more, with one sign for the even k and the other for the odd, and four products [frames x 128]
. [128 x 128] are left: 131 k FLOP a frame. Bin 256 is left out: its weight is 0, as no filter
reaches beyond half the sample rate.

Precision: a factor is the sum of two fp16, 22 bits, and a product is three, all but the smallest.
Each frame is scaled by a power of 2 so that its folded samples lie just below 2^15, which puts what
fp16 cannot hold 2^-39 below them. The powers span more than fp16 can, and their product with the
filterbank takes six products of three bf16 parts. A single tf32 or fp16, or bf16x3, is not accurate
enough for the transform.

A program takes BLOCK_F frames of one clip, whole columns of patches. Clip b owns programs from
cu_columns[b] // COLUMNS + b on, as many as it needs at least, so no table of tiles is needed: a
program finds its clip in cu_seqlens. No value depends on another clip.

Shapes: waveform [num_samples] fp32 or int16, B clips, T patches; window fp32 [512]; basis fp16 [2
(even, odd k), 2 (cos, sin), 2 (high, low), 128 m, 128 k]; filterbank bf16 [3 parts, 2
(even, odd k), 128, n_mels]; masks int32 [M, 4] in the order of clips, mask_starts int32 [B + 1].

Sources: slap_fast.reference.mel_patches is the definition; a factor as a sum of parts as in
CUTLASS's 3xTF32 and Ootomo and Yokota, arXiv 2203.03341.

No GPU has run this file yet: the settings come from registers and shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from slap_fast.kernels._compile import CompileCase
from slap_fast.kernels._packed import dot
from slap_fast.registration import register

N_FFT = 512
MAX_MELS = 128
PREEMPHASIS = tl.constexpr(0.97)
FAR = tl.constexpr(2**29)
"""Samples; no tile is that long, so borders further away are set to it and offsets fit int32."""


@triton.jit
def _samples(ptr, at, inside, left, right, last, KALDI: tl.constexpr):
    """Samples at offsets ``at`` from the tile's start, of a clip at left .. right - 1.

    torchaudio: reflected at the clip's ends, ``last`` being the sample that the right end mirrors.
    """
    if not KALDI:
        at = last - tl.abs(last - left - tl.abs(at - left))
    x = tl.load(ptr + at, mask=inside & (at >= left) & (at < right), other=0).to(tl.float32)
    if ptr.dtype.element_ty == tl.int16:
        x = x * (1.0 / 32768)
    return x


@triton.jit
def _windowed(ptr, window_ptr, first, n, left, right, last, mean, scale, KALDI: tl.constexpr):
    """y[n] of the frames whose sample 0 of 512 is at offset ``first``; [frames, n]."""
    at = first[:, None] + n[None, :]
    window = tl.load(window_ptr + n)[None, :]
    inside = window != 0  # what the window hides may be another frame's NaN
    x = _samples(ptr, at, inside, left, right, last, KALDI)
    if KALDI:
        before = _samples(ptr, at - 1, inside, left, right, last, KALDI)
        x = (x - mean) - PREEMPHASIS * (before - mean)
    return x * window * scale


@triton.jit
def _product(acc, x, basis_ptrs):
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    basis_high = tl.load(basis_ptrs)
    basis_low = tl.load(basis_ptrs + 128 * 128)
    acc = tl.dot(low, basis_high, acc)
    acc = tl.dot(high, basis_low, acc)
    return tl.dot(high, basis_high, acc)


@triton.jit
def _filtered(acc, power, ptrs, mask, PART: tl.constexpr):
    """Adds power . filterbank, each the sum of three bf16, of whose products six are counted."""
    weights_high = tl.load(ptrs, mask=mask, other=0.0)
    weights_middle = tl.load(ptrs + PART, mask=mask, other=0.0)
    part = power.to(tl.bfloat16)
    acc = dot(part, tl.load(ptrs + 2 * PART, mask=mask, other=0.0), acc)
    acc = dot(part, weights_middle, acc)
    acc = dot(part, weights_high, acc)
    power -= part.to(tl.float32)
    part = power.to(tl.bfloat16)
    acc = dot(part, weights_middle, acc)
    acc = dot(part, weights_high, acc)
    power -= part.to(tl.float32)
    return dot(power.to(tl.bfloat16), weights_high, acc)


@triton.jit
def _clip_of(program, cu_seqlens_ptr, num_clips, TOKENS: tl.constexpr):
    """The last clip b with cu_seqlens[b] // TOKENS + b <= program."""
    low, high = 0, num_clips
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // TOKENS + middle <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_samples", "num_clips", "total"])
def _mel_kernel(
    waveform_ptr,
    cu_samples_ptr,
    cu_seqlens_ptr,
    window_ptr,
    basis_ptr,
    filterbank_ptr,
    masks_ptr,
    mask_starts_ptr,
    patches_ptr,
    coords_ptr,
    num_samples,
    num_clips,
    total,
    log_mean,
    inverse_std,
    KALDI: tl.constexpr,
    FLOOR: tl.constexpr,
    WIN: tl.constexpr,
    HOP: tl.constexpr,
    MELS: tl.constexpr,
    PATCH_TIME: tl.constexpr,
    PATCH_FREQ: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    BANDS: tl.constexpr = MELS // PATCH_FREQ
    COLUMNS: tl.constexpr = BLOCK_F // PATCH_TIME
    PAD: tl.constexpr = (512 - WIN) // 2
    OFFSET: tl.constexpr = PAD if KALDI else 256
    program = tl.program_id(0)
    clip = _clip_of(program, cu_seqlens_ptr, num_clips, BANDS * COLUMNS)
    token = tl.load(cu_seqlens_ptr + clip)
    num_columns = (tl.load(cu_seqlens_ptr + clip + 1) - token) // BANDS
    first_column = (program - token // (BANDS * COLUMNS) - clip) * COLUMNS
    if first_column >= num_columns:
        return

    begin = tl.minimum(tl.maximum(tl.load(cu_samples_ptr + clip), 0), num_samples)
    end = tl.minimum(tl.load(cu_samples_ptr + clip + 1), num_samples)
    length = end - begin
    row = tl.arange(0, BLOCK_F)
    frame = first_column * PATCH_TIME + row
    num_frames = tl.maximum(length - WIN, 0) // HOP + 1 if KALDI else length // HOP + 1
    exists = (row < COLUMNS * PATCH_TIME) & (frame < num_frames)
    start = tl.cast(first_column, tl.int64) * (PATCH_TIME * HOP)
    ptr = waveform_ptr + begin + start
    left = tl.maximum(-start, -FAR).to(tl.int32)
    right = tl.minimum(length - start, FAR).to(tl.int32)
    last = tl.minimum(tl.maximum(length, 257) - 1 - start, FAR).to(tl.int32)
    # With the missing ones moved out of the clip here, not by their border, Triton 3.6 spills.
    first = row * HOP - OFFSET
    right = tl.where(exists, right, -FAR)[:, None]  # of a frame that does not exist: zeros

    # The mean, and a bound of what the window sees: its power of 2 is the frame's scale.
    sample_sum = tl.zeros([BLOCK_F], tl.float32)
    highest = tl.full([BLOCK_F], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK_F], float("inf"), tl.float32)
    for j in range(0, WIN, BLOCK_K):
        n = j + tl.arange(0, BLOCK_K)
        inside = (n < WIN)[None, :]
        x = _samples(ptr, first[:, None] + PAD + n[None, :], inside, left, right, last, KALDI)
        sample_sum += tl.sum(x, 1)
        highest = tl.maximum(highest, tl.max(tl.where(inside, x, float("-inf")), 1))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, x, float("inf")), 1))
    mean = tl.div_rn(sample_sum, tl.full([BLOCK_F], WIN, tl.float32))[:, None]
    bound = tl.maximum(highest, -lowest)
    if KALDI:  # what remains of a constant is the rounding of its mean
        bound = (highest - lowest) + bound * (1.0 / (1 << 20))
    # Four samples of at most 1.97 times the bound, which is below 2^(exponent - 126): below 2^15.
    exponent = bound.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 12), 254)
    scale = ((265 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    unscale = ((exponent - 11) << 23).to(tl.float32, bitcast=True)[:, None]

    bin_ = tl.arange(0, BLOCK_M)
    is_bin = (bin_ < MELS)[None, :]
    mel = tl.zeros([BLOCK_F, BLOCK_M], tl.float32)
    for k0 in range(0, 256, BLOCK_N):
        parity = k0 // 128
        sign = 1.0 - 2.0 * parity
        k = k0 % 128 + tl.arange(0, BLOCK_N)
        cos = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        sin = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for m0 in range(0, 128, BLOCK_K):
            m = m0 + tl.arange(0, BLOCK_K)
            y0 = _windowed(ptr, window_ptr, first, m, left, right, last, mean, scale, KALDI)
            y1 = _windowed(ptr, window_ptr, first, 255 - m, left, right, last, mean, scale, KALDI)
            y2 = _windowed(ptr, window_ptr, first, 256 + m, left, right, last, mean, scale, KALDI)
            y3 = _windowed(ptr, window_ptr, first, 511 - m, left, right, last, mean, scale, KALDI)
            offsets = (parity * 512 + m[:, None]) * 128 + k[None, :]
            cos = _product(cos, (y2 + y1) + sign * (y3 + y0), basis_ptr + offsets)
            sin = _product(sin, (y2 - y1) - sign * (y3 - y0), basis_ptr + 2 * 128 * 128 + offsets)
        weights = filterbank_ptr + (parity * 128 + k[:, None]) * MELS + bin_[None, :]
        mel = _filtered(mel, cos * cos + sin * sin, weights, is_bin, 256 * MELS)
    mel = tl.where(exists[:, None], mel * unscale * unscale, 0.0)
    mel = tl.maximum(mel, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    value = (tl.log(mel) - log_mean) * inverse_std
    if MASKED:
        in_time = tl.zeros([BLOCK_F], tl.int32)
        in_freq = tl.zeros([BLOCK_M], tl.int32)
        for i in range(tl.load(mask_starts_ptr + clip), tl.load(mask_starts_ptr + clip + 1)):
            mask_ptr = masks_ptr + 4 * tl.cast(i, tl.int64)
            axis = tl.load(mask_ptr + 1)
            mask_begin = tl.load(mask_ptr + 2)
            mask_end = tl.load(mask_ptr + 3)
            in_time |= ((axis == 0) & (frame >= mask_begin) & (frame < mask_end)).to(tl.int32)
            in_freq |= ((axis == 1) & (bin_ >= mask_begin) & (bin_ < mask_end)).to(tl.int32)
        value = tl.where((in_time[:, None] | in_freq[None, :]) != 0, 0.0, value)

    column = first_column + row // PATCH_TIME
    written = (row < COLUMNS * PATCH_TIME) & (column < num_columns)
    patch = token + column[:, None] * BANDS + (bin_ // PATCH_FREQ)[None, :]
    stored = written[:, None] & is_bin & (patch >= 0) & (patch < total)
    inside_patch = (row % PATCH_TIME)[:, None] * PATCH_FREQ + (bin_ % PATCH_FREQ)[None, :]
    offsets = patch.to(tl.int64) * (PATCH_TIME * PATCH_FREQ) + inside_patch
    tl.store(patches_ptr + offsets, value, mask=stored)
    # The first value of a patch brings its coordinates.
    stored = stored & (inside_patch == 0)
    band = tl.broadcast_to((bin_ // PATCH_FREQ)[None, :], [BLOCK_F, BLOCK_M])
    tl.store(
        coords_ptr + patch.to(tl.int64) * 2,
        tl.broadcast_to(column[:, None], [BLOCK_F, BLOCK_M]),
        mask=stored,
    )
    tl.store(coords_ptr + patch.to(tl.int64) * 2 + 1, band, mask=stored)


class Launch(NamedTuple):
    """How the kernel is launched."""

    block_f: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


# By widest n_mels. Wider blocks spill on sm_90; and on sm_100 each product of a chain has tensor
# memory of its own, of which there is too little for them: the compiled kernel would only trap.
LAUNCH = {64: Launch(64, 16, 64, 4, 1), MAX_MELS: Launch(64, 16, 32, 4, 1)}


def _launch(n_mels: int) -> Launch:
    return LAUNCH[min(width for width in LAUNCH if n_mels <= width)]


@functools.lru_cache(maxsize=4)
def _basis(device: torch.device) -> Tensor:
    """fp16 [2, 2, 2, 128, 128], made in fp64: the formula's bases, each in two parts."""
    m, k = torch.meshgrid(
        torch.arange(128, dtype=torch.float64) + 0.5,
        torch.arange(0, 256, 2, dtype=torch.float64),
        indexing="ij",
    )
    even, odd = m * k * (2 * torch.pi / N_FFT), m * (k + 1) * (2 * torch.pi / N_FFT)
    basis = torch.stack([even.cos(), even.sin(), odd.cos(), odd.sin()]).view(2, 2, 128, 128)
    high = basis.half()
    return torch.stack([high, (basis - high).half()], dim=2).to(device)


Constants = Callable[[Any, torch.dtype, torch.device], tuple[Tensor, Tensor]]


@functools.lru_cache(maxsize=16)
def _tables(config: Any, constants: Constants, device: torch.device) -> tuple[Tensor, Tensor]:
    """The window in the middle of 512, and the filterbank of the even and of the odd bins."""
    window, filterbank = constants(config, torch.float32, device)
    window = window.clone()
    if config.preset == "kaldi":
        window[0] = 0  # as the symmetric Hann window is, save one of a single sample
    pad = (N_FFT - config.win_length) // 2
    padded = torch.zeros(N_FFT, device=device)
    padded[pad : pad + config.win_length] = window
    remainder, parts = torch.cat([filterbank[:-1:2], filterbank[1::2]]), []
    for _ in range(3):
        parts.append(remainder.bfloat16())
        remainder = remainder - parts[-1].float()
    return padded, torch.stack(parts)


def _constexprs(
    kaldi: bool,
    floor: float,
    win_length: int,
    hop_length: int,
    n_mels: int,
    patch_time: int,
    patch_freq: int,
    masked: bool,
) -> dict[str, Any]:
    launch = _launch(n_mels)
    return {
        "KALDI": kaldi,
        "FLOOR": floor,
        "WIN": win_length,
        "HOP": hop_length,
        "MELS": n_mels,
        "PATCH_TIME": patch_time,
        "PATCH_FREQ": patch_freq,
        "MASKED": masked,
        "BLOCK_F": launch.block_f,
        "BLOCK_K": launch.block_k,
        "BLOCK_N": launch.block_n,
        "BLOCK_M": max(16, triton.next_power_of_2(n_mels)),
    }


def _front_end(config: Any) -> tuple[bool, float, int, int, int, int, int]:
    """The constexprs of the kernel."""
    return (
        config.preset == "kaldi",
        config.floor,
        config.win_length,
        config.hop_length,
        config.n_mels,
        config.patch_time,
        config.patch_freq,
    )


def _forward(
    waveform: Tensor,
    cu_samples: Tensor,
    cu_seqlens: Tensor,
    window: Tensor,
    basis: Tensor,
    filterbank: Tensor,
    masks: Tensor,
    mask_starts: Tensor,
    total: int,
    log_mean: float,
    inverse_std: float,
    kaldi: bool,
    floor: float,
    win_length: int,
    hop_length: int,
    n_mels: int,
    patch_time: int,
    patch_freq: int,
) -> tuple[Tensor, Tensor]:
    patches = waveform.new_empty(total, patch_time * patch_freq, dtype=torch.float32)
    coords = cu_seqlens.new_empty(total, 2)
    front_end = (kaldi, floor, win_length, hop_length, n_mels, patch_time, patch_freq)
    launch = _launch(n_mels)
    tokens = launch.block_f // patch_time * (n_mels // patch_freq)
    num_clips = len(cu_seqlens) - 1
    with torch.cuda.device_of(waveform):
        _mel_kernel[(total // tokens + num_clips,)](
            waveform,
            cu_samples,
            cu_seqlens,
            window,
            basis,
            filterbank,
            masks,
            mask_starts,
            patches,
            coords,
            len(waveform),
            num_clips,
            total,
            log_mean,
            inverse_std,
            **_constexprs(*front_end, masked=len(masks) > 0),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return patches, coords


def _forward_fake(waveform: Tensor, cu_samples: Tensor, cu_seqlens: Tensor, *arguments: Any):
    total, (patch_time, patch_freq) = arguments[5], arguments[-2:]
    patches = waveform.new_empty(total, patch_time * patch_freq, dtype=torch.float32)
    return patches, cu_seqlens.new_empty(total, 2)


_forward_op = register(
    "mel_patches(Tensor waveform, Tensor cu_samples, Tensor cu_seqlens, Tensor window, "
    "Tensor basis, Tensor filterbank, Tensor masks, Tensor mask_starts, SymInt total, "
    "float log_mean, float inverse_std, bool kaldi, float floor, int win_length, int hop_length, "
    "int n_mels, int patch_time, int patch_freq) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def compile_cases() -> Iterator[CompileCase]:
    """Every setting, for a compiler without a GPU."""
    for preset in ("kaldi", "torchaudio"):
        for dtype in ("fp32", "i16"):
            for hop_length, n_mels, masked in ((160, 64, False), (160, 64, True), (320, 128, True)):
                floor = 2.0**-23 if preset == "kaldi" else 1e-10
                constants = _constexprs(
                    preset == "kaldi", floor, 400, hop_length, n_mels, 16, 16, masked
                )
                types = dict.fromkeys(_mel_kernel.arg_names, "*i32")
                types |= {"waveform_ptr": f"*{dtype}", "cu_samples_ptr": "*i64"}
                types |= {
                    "basis_ptr": "*fp16",
                    "filterbank_ptr": "*bf16",
                    "num_clips": "i32",
                    "total": "i32",
                }
                types |= dict.fromkeys(("window_ptr", "patches_ptr"), "*fp32")
                types |= {"num_samples": "i64", "log_mean": "fp32", "inverse_std": "fp32"}
                types |= dict.fromkeys(constants, "constexpr")
                name = f"mel_patches-{preset}-{dtype}-{hop_length}-{n_mels}"
                name += "-masked" if masked else ""
                *_, num_warps, num_stages = _launch(n_mels)
                yield CompileCase(name, _mel_kernel, types, constants, num_warps, num_stages)


def mel_patches(
    waveform: Tensor,
    cu_samples: Tensor,
    config: Any,
    constants: Constants,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``slap_fast.reference.mel_patches.mel_patches``, for an n_fft of 512.

    Args:
        waveform: [num_samples] fp32 or int16, with a dense axis.
        cu_samples: int64 [B + 1].
        config: a ``slap_fast.config.MelConfig``.
        constants: makes the window and the filterbank of a config, dtype and device.
        masks: int32 [M, 4] = (clip, axis, start, stop), or None.

    Syncs once: the number of patches, which sizes the result, and the longest clip are read from
    the device.
    """
    device, bands = waveform.device, config.patches_per_column
    lengths = cu_samples.diff()
    if config.preset == "kaldi":
        frames = (lengths - config.win_length).clamp_min(0) // config.hop_length + 1
    else:
        frames = lengths // config.hop_length + 1
    frames = torch.where(lengths > 0, frames, 0)
    tokens = (frames + config.patch_time - 1) // config.patch_time * bands
    starts = F.pad(tokens.cumsum(0), (1, 0))
    cu_seqlens = starts.int()
    longest = F.pad(tokens, (1, 0)).max()
    total, max_seqlen = torch.stack([starts[-1], longest]).tolist()

    if masks is None:
        masks = torch.empty(0, 4, dtype=torch.int32, device=device)
    masks = masks[masks[:, 0].argsort()]
    clips = torch.arange(len(cu_seqlens), dtype=torch.int32, device=device)
    mask_starts = torch.searchsorted(masks[:, 0].contiguous(), clips, out_int32=True)
    window, filterbank = _tables(config, constants, device)
    patches, coords = _forward_op(
        waveform,
        cu_samples,
        cu_seqlens,
        window,
        _basis(device),
        filterbank,
        masks,
        mask_starts,
        total,
        config.mean,
        1 / config.std,
        *_front_end(config),
    )
    return patches, coords, cu_seqlens, max_seqlen
