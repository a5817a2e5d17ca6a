"""Triton's attention against the reference in fp64: every result, gradient and kernel."""

from __future__ import annotations

import pytest
import torch

from slap_fast.kernels import attention as triton_attention
from tests.helpers import packs
from tests.helpers.packs import DEVICE, KERNELS, Pack, starts

LENGTHS = [1, 63, 0, 130]
CROSS = [9, 0, 7, 70]
WINDOWS = [
    (-1, -1), (48, 48), (0, 0), (5, -1), (-1, 3), (63, 64), (64, 0), (0, -1), (500, 129), (1, 0),
]  # fmt: skip
HEAD_DIMS = [16, 24, 32, 40, 48, 59, 64, 72, 80, 96, 111, 128]
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(kernel, window):
    Pack(LENGTHS, options={"window_size": window}).assert_accurate(packed=True)


@pytest.mark.parametrize("window", [(-1, -1), (5, -1), (63, 64)], ids=str)
def test_causal(kernel, window):
    Pack(LENGTHS, options={"window_size": window, "causal": True}).assert_accurate()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths_k", [CROSS, CROSS[::-1]], ids=["fewer_keys", "more_keys"])
@pytest.mark.parametrize("window", [(-1, -1), (5, 9)], ids=str)
def test_cross(kernel, window, lengths_k, causal):
    options = {"window_size": window, "causal": causal}
    Pack(LENGTHS, lengths_k, heads=(1, 1), options=options).assert_accurate()


@pytest.mark.parametrize("packed", [False, True], ids=["q_k_v", "qkv"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=["gqa", "mqa"])
def test_shared_keys(kernel, heads, packed):
    Pack([1, 0, 65], heads=heads, options={"window_size": (48, 48)}).assert_accurate(packed=packed)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(monkeypatch, head_dim, dtype):
    packs.force(monkeypatch, "tiled" if dtype == torch.float32 else "table")
    Pack([1, 20, 0, 33], None, (1, 1), head_dim, dtype, rope=head_dim % 2 == 0).assert_accurate()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["q_k_v", "qkv"])
@pytest.mark.parametrize("window", [(-1, -1), (48, 48)], ids=["global", "local"])
def test_half_precision(figure, kernel, window, packed, dtype):
    for seed in figure("K2", ci=1, soak=100):
        torch.manual_seed(seed)
        options = {"window_size": window, "softmax_scale": 0.3}
        Pack(LENGTHS, head_dim=64, dtype=dtype, options=options).assert_accurate(packed=packed)


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 127, 129])
def test_lengths_about_a_block(kernel, length):
    Pack([length], heads=(1, 1), options={"window_size": (16, 15)}).assert_accurate()


def test_short_and_long_sequences_in_one_pack(monkeypatch):
    packs.force(monkeypatch, "mixed")
    Pack([70, 3, 0, 64, 31, 130, 1], options={"window_size": (40, 20)}).assert_accurate(packed=True)


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (31, 32), (63, 64), (3, -1)], ids=str)
def test_exact_mask_by_one_hot_values(kernel, window):
    # With equal scores and v the identity, row i of out shows exactly which keys row i sees. In
    # fp32 a sequence of so many columns does not fit in a GPU's shared memory.
    length = 100
    q = torch.zeros(length, 1, length, device=DEVICE, dtype=torch.float16)
    v = torch.eye(length, device=DEVICE, dtype=torch.float16)[:, None]
    cu_seqlens = starts([length])
    out = triton_attention.attention(q, q, v, cu_seqlens, length, window_size=window)
    i = torch.arange(length, device=DEVICE)
    distance = i - i[:, None]
    seen = (distance >= -window[0]) & (distance <= (window[1] if window[1] >= 0 else length))
    assert torch.equal(out[:, 0] > 0, seen)


def test_large_scores_do_not_overflow(kernel):
    pack = Pack([130], head_dim=16, dtype=torch.float16, rope=False)
    pack.values |= {name: pack.values[name] * 30 for name in "qk"}
    pack.options = {"softmax_scale": 1.0, "window_size": (64, 64)}
    actual = pack.assert_accurate()
    assert actual["lse"][:, :130].abs().max() > 5e3
    assert all(x.isfinite().all() for name, x in actual.items() if name != "lse")


@pytest.mark.parametrize(
    "lengths, lengths_k",
    [([6, 3], [2, 0]), ([4], [0]), ([0, 0], [3, 0]), ([70], [3]), ([], [])],
    ids=["some", "no_keys", "no_rows", "long_and_short", "no_sequences"],
)
def test_fully_masked_rows(kernel, lengths, lengths_k):
    # Pack.run gives NaN as the gradient of their lse.
    actual = Pack(lengths, lengths_k, options={"causal": True}).assert_accurate()
    masked = actual["lse"].isneginf().T
    assert masked.any() and not actual["out"][masked].any()


@pytest.mark.parametrize("rows", [0, 7])
def test_no_tokens_or_sequences(kernel, rows):
    for lengths in ([], [0], [0, 0, 0]):
        actual = Pack(lengths, tail=rows).run(triton_attention, Pack(lengths, tail=rows).inputs())
        Pack(lengths, tail=rows).assert_tails(actual)


def test_empty_sequences_anywhere(kernel):
    for lengths in ([0, 0, 20], [20, 0, 0], [7, 0, 13]):
        Pack(lengths, heads=(1, 1)).assert_accurate()


@pytest.mark.parametrize("length", [1, 20])
def test_one_sequence_of_many(kernel, length):
    # Many tiny ones and a long one; the number of programs is bounded by rows and sequences.
    Pack([1, 0, 2] * 6 + [100] + [length] * 3, heads=(1, 1)).assert_accurate()


@pytest.mark.slow(minutes=3)
def test_random_packs(figure, monkeypatch):
    for seed in figure("K1", ci=300, soak=20_000):
        assert_random_pack_is_accurate(seed, monkeypatch)


@pytest.mark.parametrize("seed", [275, 1049], ids=["a score near 0", "a row that sees one key"])
def test_packs_that_failed_before(seed, monkeypatch):
    assert_random_pack_is_accurate(seed, monkeypatch)


def assert_random_pack_is_accurate(seed, monkeypatch):
    torch.manual_seed(seed)
    pack = packs.random_pack(seed)
    kernel = list(KERNELS)[seed % len(KERNELS)]
    if (
        kernel == "whole"
        and DEVICE == "cuda"
        and pack.dtype == torch.float32
        and pack.head_dim > 64
    ):
        kernel = "tiled"  # there is no room for it in shared memory
    with monkeypatch.context() as patch:
        packs.force(patch, kernel)
        try:
            pack.assert_accurate(packed=pack.lengths_k is None and seed % 3 == 0)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {pack.lengths} {pack}") from error
