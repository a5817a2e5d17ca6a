"""The public operations: validation, choice of implementation, and arguments passed on."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.ops import dispatch, torch_attention, validation
from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.packed import PackedPatches
from slap_fast.reference import attention as reference_attention
from slap_fast.reference import map_pool as reference_map_pool
from slap_fast.reference import mel_patches as reference_mel_patches
from slap_fast.reference import packing as reference_pack
from slap_fast.reference import rope as reference_rope

T, TK, H, HKV, D, C = 9, 6, 4, 2, 8, 12


def starts(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def tables(rows: int = T, width: int = D // 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, width), torch.randn(rows, width)


def attention_arguments(**changes):
    arguments = {
        "q": torch.randn(T, H, D),
        "k": torch.randn(T, HKV, D),
        "v": torch.randn(T, HKV, D),
        "cu_seqlens": starts(0, 4, 4, 7),
        "max_seqlen": 4,
    }
    return arguments | changes


def cross_arguments(**changes):
    arguments = attention_arguments(
        k=torch.randn(TK, HKV, D),
        v=torch.randn(TK, HKV, D),
        cu_seqlens_k=starts(0, 1, 2, 6),
        max_seqlen_k=4,
    )
    return arguments | changes


def qkv_arguments(**changes):
    arguments = {
        "qkv": torch.randn(T, H + 2 * HKV, D),
        "num_heads_kv": HKV,
        "cu_seqlens": starts(0, 4, 4, 7),
        "max_seqlen": 4,
    }
    return arguments | changes


def pool_arguments(**changes):
    x, score_weight = torch.randn(T, C), torch.randn(H, C)
    return {"x": x, "score_weight": score_weight, "cu_seqlens": starts(0, 4, 7)} | changes


def mel_arguments(**changes):
    cu_samples = starts(0, 1600, 4000, dtype=torch.int64)
    return {"waveform": torch.randn(4000), "cu_samples": cu_samples} | changes


def test_attention_passes_all_arguments_on():
    options = {
        "rope": tables(),
        "window_size": (1, 2),
        "causal": True,
        "softmax_scale": 0.7,
        "return_lse": True,
    }
    arguments = attention_arguments()
    engine = {**options, "schedule": None}
    for function, arguments in (
        ("attention", attention_arguments()),
        ("attention_qkvpacked", qkv_arguments()),
    ):
        public, exact = getattr(ops, function), getattr(reference_attention, function)
        default = public(**arguments, **engine)
        torch_engine = getattr(torch_attention, function)
        expected = torch_engine(*arguments.values(), AttentionOptions(**options))
        assert all(torch.equal(a, b) for a, b in zip(default, expected, strict=True))
        dense = public(**arguments, **engine, impl="reference")
        expected = exact(**arguments, **options)
        assert all(torch.equal(a, b) for a, b in zip(dense, expected, strict=True))
    arguments = cross_arguments(causal=True)
    expected = reference_attention.attention(**arguments)
    assert torch.equal(ops.attention(**arguments, impl="reference"), expected)
    torch.testing.assert_close(ops.attention(**arguments), expected)


def test_using_an_implementation():
    q = torch.zeros(1)
    with dispatch.using({"attention": "reference"}):
        assert dispatch.choose("attention", None, q.device, q.dtype) == "reference"
        assert dispatch.choose("attention", "torch", q.device, q.dtype) == "torch"
        assert dispatch.which("attention")["attention"] == "reference: asked for by dispatch.using"
        with dispatch.using({"map_pool": "cpp"}), pytest.raises(NotImplementedError):
            CALLS["map_pool"](None)
        CALLS["map_pool"](None)
    assert dispatch.choose("attention", None, q.device, q.dtype) == "torch"
    with pytest.raises(ValueError, match="impls: found 'conv', expected some of mel_patches"):
        dispatch.using({"conv": "torch"}).__enter__()


def test_the_other_operations_pass_all_arguments_on():
    arguments = pool_arguments()
    assert torch.equal(ops.map_pool(**arguments), reference_map_pool.map_pool(**arguments))

    coords = torch.randint(0, 99, (T, 2), dtype=torch.int32)
    actual, expected = (
        ops.rope_tables(coords, D, 500.0),
        reference_rope.rope_tables(coords, D, 500.0),
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    for config in (MelConfig(), MelConfig(preset="torchaudio")):
        arguments = mel_arguments(config=config)
        actual = ops.mel_patches(**arguments, impl="reference")
        expected = reference_mel_patches.mel_patches(**arguments)
        assert isinstance(actual, PackedPatches)
        assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))
        assert actual.max_seqlen == expected[3]
    default = ops.mel_patches(arguments["waveform"], arguments["cu_samples"])
    assert default.patches.shape == (8, 256) and default.cu_seqlens.tolist() == [0, 4, 8]


NOT_DENSE = torch.zeros(D, T, HKV).permute(1, 2, 0)
BAD_ATTENTION = {
    "q_list": ({"q": [1.0]}, "q: found list, expected a tensor"),
    "q_int": ({"q": torch.zeros(T, H, D, dtype=torch.int64)}, "q: found torch.int64, expected"),
    "q_2d": ({"q": torch.zeros(T, D)}, r"q: found shape \[9, 8\], expected \[T, H, D\]"),
    "q_batched": ({"q": torch.zeros(1, T, H, D)}, "q: found shape"),
    "k_dtype": ({"k": torch.zeros(T, HKV, D).half()}, "k: found torch.float16, expected torch.f"),
    "k_head_dim": ({"k": torch.zeros(T, HKV, D + 1)}, "k: found shape"),
    "k_rows": ({"k": torch.zeros(TK, HKV, D), "v": torch.zeros(TK, HKV, D)}, "k: found 6 rows"),
    "k_heads": ({"k": torch.zeros(T, 3, D), "v": torch.zeros(T, 3, D)}, "k: found 3 heads"),
    "k_device": ({"k": torch.zeros(T, HKV, D, device="meta")}, "k: found device meta, expected"),
    "v_shape": ({"v": torch.zeros(T, 1, D)}, r"v: found shape \[9, 1, 8\], expected k's"),
    "v_not_dense": ({"v": NOT_DENSE}, "v: found stride 18 on the last axis, expected 1"),
    "cu_int64": ({"cu_seqlens": starts(0, 7).long()}, "cu_seqlens: found torch.int64, expected"),
    "cu_2d": ({"cu_seqlens": starts(0, 7)[None]}, "cu_seqlens: found shape"),
    "cu_none": ({"cu_seqlens": starts()}, "cu_seqlens: found no entries"),
    "cu_strided": ({"cu_seqlens": starts(0, 9, 7, 9)[::2]}, "cu_seqlens: found stride 2"),
    "cu_first": ({"cu_seqlens": starts(1, 7)}, "cu_seqlens: found 1 first, expected 0"),
    "cu_falls": ({"cu_seqlens": starts(0, 4, 3)}, r"cu_seqlens\[2\]: found 3 after 4, expected no"),
    "cu_beyond": ({"cu_seqlens": starts(0, 4, 10)}, "cu_seqlens: found 10 last, expected at most"),
    "max_low": ({"max_seqlen": 3}, "max_seqlen: found 3, expected at least 4"),
    "max_float": ({"max_seqlen": 4.0}, "max_seqlen: found 4.0, expected an integer"),
    "max_k": ({"max_seqlen_k": 4}, "max_seqlen_k: found 4, expected None without"),
    "schedule_k": ({"schedule_k": starts(0, 0)[None]}, "schedule_k: found tiles, expected None"),
    "window_low": ({"window_size": (-2, 0)}, r"window_size: found \(-2, 0\), expected"),
    "window_one": ({"window_size": (5,)}, "window_size: found"),
    "window_half": ({"window_size": (0.5, 1)}, "window_size: found"),
    "rope_one": ({"rope": tables()[:1]}, "rope: found 1 tables, expected"),
    "rope_width": ({"rope": tables(width=D)}, "rope cos: found shape"),
    "rope_rows": ({"rope": tables(T + 1)}, "rope cos: found shape"),
    "rope_sin": ({"rope": (tables()[0], tables()[0].double())}, "rope sin: found torch.float64"),
    "impl": ({"impl": "cuda"}, "impl: found 'cuda', expected None or one of triton, cpp, torch"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_ATTENTION.values(), ids=BAD_ATTENTION)
def test_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(**attention_arguments(**change))


BAD_CROSS = {
    "max_missing": ({"max_seqlen_k": None}, "max_seqlen_k: found None, expected an integer"),
    "count": ({"cu_seqlens_k": starts(0, 4, 6)}, "cu_seqlens_k: found 3 entries, expected 4"),
    "beyond": ({"cu_seqlens_k": starts(0, 1, 2, 7)}, "cu_seqlens_k: found 7 last, expected at"),
    "max_low": ({"max_seqlen_k": 3}, "max_seqlen_k: found 3, expected at least 4"),
    "rope": ({"rope": tables()}, "rope: found tables, expected None with cu_seqlens_k"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_CROSS.values(), ids=BAD_CROSS)
def test_cross_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(**cross_arguments(**change))


def test_rope_needs_an_even_head_dim():
    q = torch.zeros(T, 1, 7)
    ops.attention(q, q, q, starts(0, T), T)
    with pytest.raises(ValueError, match="rope: found tables with head_dim 7"):
        ops.attention(q, q, q, starts(0, T), T, rope=tables(width=3))


BAD_QKV = {
    "2d": ({"qkv": torch.zeros(T, D)}, "qkv: found shape"),
    "no_queries": ({"num_heads_kv": 4}, "num_heads_kv: found 4"),
    "not_a_multiple": ({"num_heads_kv": 3}, "num_heads_kv: found 3"),
    "zero": ({"num_heads_kv": 0}, "num_heads_kv: found 0"),
    "schedule": ({"schedule": [1]}, "schedule: found list, expected a tensor"),
    "cu_beyond": ({"cu_seqlens": starts(0, 4, 10)}, "cu_seqlens: found 10 last"),
    "window": ({"window_size": (1, -3)}, "window_size: found"),
    "rope": ({"rope": tables(T + 1)}, "rope cos: found shape"),
}


@pytest.mark.parametrize("change, message", BAD_QKV.values(), ids=BAD_QKV)
def test_attention_qkvpacked_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention_qkvpacked(**qkv_arguments(**change))


BAD_POOL = {
    "x_3d": ({"x": torch.zeros(T, 2, C)}, "x: found shape"),
    "width": ({"score_weight": torch.zeros(H, C + 1)}, "score_weight: found shape"),
    "dtype": ({"score_weight": torch.zeros(H, C).double()}, "score_weight: found torch.float64"),
    "cu_beyond": ({"cu_seqlens": starts(0, 10)}, "cu_seqlens: found 10 last, expected at most x"),
}


@pytest.mark.parametrize("change, message", BAD_POOL.values(), ids=BAD_POOL)
def test_map_pool_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.map_pool(**pool_arguments(**change))


BAD_MEL = {
    "float64": ({"waveform": torch.zeros(4000).double()}, "waveform: found torch.float64"),
    "2d": ({"waveform": torch.zeros(1, 4000)}, "waveform: found shape"),
    "strided": ({"waveform": torch.zeros(8000)[::2]}, "waveform: found stride 2"),
    "int32": ({"cu_samples": starts(0, 4000)}, "cu_samples: found torch.int32"),
    "beyond": ({"cu_samples": starts(0, 4001, dtype=torch.int64)}, "cu_samples: found 4001 last"),
    "masks_dtype": ({"masks": torch.zeros(1, 4)}, "masks: found torch.float32, expected torch.int"),
    "masks_shape": ({"masks": starts(0, 0, 1, 2)}, r"masks: found shape \[4\], expected \[M, 4\]"),
    "masks_clip": ({"masks": starts(2, 0, 1, 2)[None]}, r"masks\[0\]: found \[2, 0, 1, 2\], exp"),
    "masks_axis": ({"masks": starts(0, 2, 1, 2)[None]}, r"masks\[0\]: found .* axis 0 or 1"),
    "masks_span": ({"masks": starts(0, 0, 3, 2)[None]}, r"masks\[0\]: found .* 0 <= start <= stop"),
}


@pytest.mark.parametrize("change, message", BAD_MEL.values(), ids=BAD_MEL)
def test_mel_patches_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.mel_patches(**mel_arguments(**change))


def test_rope_tables_refuses():
    with pytest.raises(ValueError, match="coords: found 3 axes, expected 1 or 2"):
        ops.rope_tables(torch.zeros(T, 3, dtype=torch.int32), 12)
    with pytest.raises(ValueError, match="coords: found torch.float32, expected torch.int32"):
        ops.rope_tables(torch.zeros(T, 2), 12)
    with pytest.raises(ValueError, match="head_dim: found 10, expected a positive multiple of 4"):
        ops.rope_tables(torch.zeros(T, 2, dtype=torch.int32), 10)


CALLS = {
    "attention": lambda impl: ops.attention(**attention_arguments(impl=impl)),
    "attention_qkvpacked": lambda impl: ops.attention_qkvpacked(**qkv_arguments(impl=impl)),
    "map_pool": lambda impl: ops.map_pool(**pool_arguments(impl=impl)),
}


@pytest.mark.parametrize(
    "name, impl, message",
    [
        ("attention", "cpp", "has no 'cpp' implementation; use impl=None"),
        ("attention", "flash", "'flash', which runs on a GPU, not on cpu; use impl=None"),
        ("attention", "triton", "'triton', which runs on a GPU, not on cpu; use impl=None"),
        ("attention_qkvpacked", "cpp", "has no 'cpp' implementation; use impl=None"),
        ("attention_qkvpacked", "flash", "'flash', which runs on a GPU, not on cpu"),
        ("attention_qkvpacked", "triton", "'triton', which runs on a GPU, not on cpu"),
        ("map_pool", "cpp", "has no 'cpp' implementation; use impl=None"),
        ("map_pool", "flash", "has no 'flash' implementation; use impl=None"),
        ("map_pool", "torch", "has no 'torch' implementation; use impl=None"),
        ("map_pool", "triton", "'triton', which runs on a GPU, not on cpu; use impl=None"),
    ],
)
def test_nothing_falls_back_silently(monkeypatch, name, impl, message):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match=message):
        CALLS[name](impl)


def test_values_are_not_read_where_that_would_sync(monkeypatch):
    # On a GPU reading them syncs; a meta tensor has none to read, so reading would raise.
    meta = torch.zeros(3, dtype=torch.int32, device="meta")
    x = torch.zeros(T, C, device="meta")
    monkeypatch.setenv("SLAP_FAST_DEBUG", "1")
    assert validation.check_starts("cu_seqlens", meta, torch.int32, x, "x") is None


def test_pack():
    lengths = [5, 3, 5, 0, 2]
    expected = reference_pack.pack(lengths, 8)
    assert expected == [[0, 1, 3], [2, 4]]
    for form in (lengths, tuple(lengths), np.array(lengths, np.int32), torch.tensor(lengths)):
        assert ops.pack(form, 8) == expected
    assert ops.pack([], 8) == []
    with pytest.raises(ValueError, match=r"lengths\[1\]: found 9, expected 0 .. max_tokens = 8"):
        ops.pack([1, 9], 8)
    with pytest.raises(ValueError, match=r"lengths\[0\]: found -1, expected"):
        ops.pack([-1], 8)
    for bad in ([1.5], [[1]], ["1"]):
        with pytest.raises(ValueError, match="lengths: found .* expected integers"):
            ops.pack(bad, 8)


def test_pack_without_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "EXTENSION", None)
    assert ops.pack([5, 3, 5, 0, 2], 8) == [[0, 1, 3], [2, 4]]


def test_which_names_the_implementation():
    answers = dispatch.which()
    assert set(answers) == {"mel_patches", "attention", "map_pool", "pack"}
    assert answers["attention"] == "torch: triton runs on a GPU, not on cpu"
    assert dispatch.which("attention", device="cuda")["attention"].startswith("triton: ")
    assert dispatch.which("attention") == {"attention": answers["attention"]}
    assert "cuda" in dispatch.which("map_pool", device="cuda")["map_pool"]
    assert dispatch.which("map_pool", device="cuda", hidden_size=2048)["map_pool"] == (
        "reference: triton has no kernels for C = 2048 and H = 1, at most 768 and 16"
    )
    assert answers["pack"] == (
        "reference: cpp is not built (no slap_fast._C)"
        if dispatch.EXTENSION is None
        else "cpp: the best there is for cpu"
    )
    with pytest.raises(ValueError, match="op: found 'conv', expected one of mel_patches"):
        dispatch.which("conv")


def test_obstacles(monkeypatch):
    cpu, cuda, f32 = torch.device("cpu"), torch.device("cuda"), torch.float32
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "map_pool", ("triton", "reference"))
    assert dispatch.choose("map_pool", None, cuda, f32) == "triton"
    assert dispatch.choose("map_pool", None, cuda, torch.float64) == "reference"
    assert dispatch.choose("map_pool", None, cpu, f32) == "reference"
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert dispatch.choose("map_pool", "triton", cpu, f32) == "triton"
    assert dispatch.choose("map_pool", None, cpu, f32) == "reference"
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="'triton', which runs on a GPU, not on cpu"):
        dispatch.choose("map_pool", "triton", cpu, f32)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.which("map_pool", device="cuda") == {
        "map_pool": "reference: triton is not installed"
    }
    monkeypatch.setattr(dispatch, "EXTENSION", None)
    with pytest.raises(NotImplementedError, match="'cpp', which is not built"):
        dispatch.choose("pack", "cpp", cpu, f32)


@pytest.mark.parametrize("head_dim, dtype", [(129, torch.bfloat16), (64, torch.float64)], ids=str)
def test_heads_without_a_kernel_run_on_torch(head_dim, dtype):
    message = dispatch.which("attention", device="cuda", dtype=dtype, head_dim=head_dim)
    assert message["attention"].startswith("torch: triton has no kernels for ")
    cuda, limits = torch.device("cuda"), dispatch.head_limits(head_dim)
    with pytest.raises(NotImplementedError, match="'triton', which has no kernels for .*impl=None"):
        dispatch.choose("attention", "triton", cuda, dtype, limits)


@pytest.mark.parametrize("hidden_size, num_heads", [(1025, 1), (64, 17)])
def test_pools_without_a_kernel_run_on_the_reference(monkeypatch, hidden_size, num_heads):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    x, weight = torch.randn(T, hidden_size), torch.randn(num_heads, hidden_size)
    with pytest.raises(
        NotImplementedError, match=f"kernels for C = {hidden_size} and H = {num_heads}"
    ):
        ops.map_pool(x, weight, starts(0, 4), impl="triton")
    cuda = torch.device("cuda")
    for dtype, widest in ((torch.float32, 768), (torch.bfloat16, 1024)):
        limits = dispatch.pool_limits(hidden_size, num_heads, dtype)
        assert dispatch.choose("map_pool", None, cuda, dtype, limits) == "reference"
        limits = dispatch.pool_limits(widest, 16, dtype)
        assert dispatch.choose("map_pool", None, cuda, dtype, limits) == "triton"
    assert dispatch.pool_limits(769, 1, torch.float32) != dispatch.NO_LIMITS


def test_signatures_are_the_contract():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(ops.attention)[:5] == ["q", "k", "v", "cu_seqlens", "max_seqlen"]
    assert names(ops.attention_qkvpacked)[:4] == ["qkv", "num_heads_kv", "cu_seqlens", "max_seqlen"]
    assert names(ops.map_pool) == ["x", "score_weight", "cu_seqlens", "impl"]
    assert names(ops.mel_patches) == ["waveform", "cu_samples", "config", "masks", "impl"]
    assert names(ops.rope_tables) == ["coords", "head_dim", "theta"]
    assert PackedPatches._fields == ("patches", "coords", "cu_seqlens", "max_seqlen")


def test_import_is_light():
    script = "import slap_fast.ops, sys; print({'triton', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_no_tokens_or_sequences_are_legal():
    none = starts(0)
    out, lse = ops.attention(*torch.zeros(3, 2, H, D), none, 0, return_lse=True)
    assert out.shape == (2, H, D) and not out.any()
    assert lse.shape == (H, 2) and lse.eq(-math.inf).all()
    assert ops.attention(*torch.zeros(3, 0, H, D), none, 0).shape == (0, H, D)
    assert ops.map_pool(torch.zeros(2, C), torch.zeros(H, C), none).shape == (0, H, C)
    actual = ops.mel_patches(torch.zeros(0), none.long())
    assert actual.patches.shape == (0, 256) and actual.max_seqlen == 0
    assert [x.shape for x in ops.rope_tables(torch.zeros(0, 2, dtype=torch.int32), D)] == [
        (0, 4)
    ] * 2
