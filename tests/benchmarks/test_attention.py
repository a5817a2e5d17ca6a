"""The attention benchmark's peers compute the same as ours, and a failure becomes a note.

Their packages need a GPU: stubs with the published arguments call the reference instead.
"""

from __future__ import annotations

import contextlib
import inspect
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import cases
from benchmarks.ops import attention as benchmark
from benchmarks.ops import attention_peers as peers
from slap_fast import ops
from slap_fast.ops import dispatch

CPU = torch.device("cpu")
UNEQUAL = [250, 1, 63, 300, 25]
WINDOWS = pytest.mark.parametrize("window", [(48, 48), (-1, -1)], ids=["local", "global"])


def problem(lengths=UNEQUAL, window=(48, 48), num_heads=2):
    return benchmark.problem_of(list(lengths), window, num_heads, CPU)


def errors(attend, work):
    qkv = torch.randn(sum(work.lengths), 3 * work.num_heads, cases.HEAD_DIM).requires_grad_()
    dout = torch.randn(len(qkv), work.num_heads, cases.HEAD_DIM)
    with torch.compiler.set_stance("force_eager"):
        return benchmark.errors(attend, benchmark.reference(work, qkv, dout), qkv, dout)


def attention(q, k, v, starts, longest, window):
    assert q.shape == k.shape == v.shape
    return ops.attention(q, k, v, starts, longest, window_size=window)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, -1)
):
    assert cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q
    return attention(q, k, v, cu_seqlens_q, max_seqlen_q, window_size)


def cute_varlen_func(q, k, v, qv=None, window_size=(None, None), **packed):
    assert -1 not in window_size
    window = tuple(-1 if side is None else side for side in window_size)
    return flash_attn_varlen_func(q, k, v, **packed, window_size=window), None


def varlen_attn(*arguments, **options):
    bound = inspect.signature(varlen.varlen_attn).bind(*arguments, **options).arguments
    q, k, v = (bound[name] for name in ("query", "key", "value"))
    assert bound["cu_seq_k"] is bound["cu_seq_q"] and bound["max_k"] == bound["max_q"]
    return attention(q, k, v, bound["cu_seq_q"], bound["max_q"], bound["window_size"])


STAND_INS = {
    "torch.nn.attention.varlen": {"varlen_attn": varlen_attn},
    "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
    "flash_attn_interface": {"flash_attn_varlen_func": flash_attn_varlen_func},
    "flash_attn.cute": {"flash_attn_varlen_func": cute_varlen_func},
    "torch.nn.attention": {
        "sdpa_kernel": lambda backend: contextlib.nullcontext(),
        "SDPBackend": SDPBackend,
    },
}


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(peers, "load", lambda name: types.SimpleNamespace(**STAND_INS[name]))


@WINDOWS
@pytest.mark.parametrize("name", ["FA2 in torch", "FA2 (flash-attn)", "FA3", "FA4", "SDPA, padded"])
def test_a_peer_computes_the_same(stand_ins, name, window):
    work = problem(window=window)
    assert max(errors(peers.VARIANTS[name](work), work)) < 1e-5


def test_padding_equal_lengths_needs_no_mask():
    work = problem([63, 63], (-1, -1))
    assert max(errors(peers.padded(work), work)) < 1e-5


def test_cudnn_takes_equal_lengths_and_no_window(stand_ins):
    work = problem([63, 63], (-1, -1))
    assert max(errors(peers.cudnn(work), work)) < 1e-5
    with pytest.raises(peers.NotInstalled, match="equal lengths"):
        peers.cudnn(problem(window=(-1, -1)))
    with pytest.raises(peers.NotInstalled, match="no window"):
        peers.cudnn(problem([63, 63]))


@WINDOWS
def test_ours_runs_the_triton_kernel_on_a_shared_schedule(monkeypatch, window):
    from slap_fast.kernels import attention as kernels

    if not dispatch.INTERPRETED:
        pytest.skip("compiled on a GPU: the benchmark itself checks it")
    monkeypatch.setattr(
        ops, "attention_schedule", lambda starts, _, total: kernels.schedule_tiles(starts, total)
    )
    work = problem([63, 0, 70], window)
    assert max(errors(peers.ours(work, impl="triton"), work)) < 1e-5


@WINDOWS
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("lengths", [UNEQUAL, [250] * 4, [512]], ids=str)
def test_flex_attentions_mask_is_that_of_the_pack(lengths, size, window):
    work = problem(lengths, window)
    mask = peers.block_mask(work, size)
    total = sum(lengths)
    expected = create_block_mask(mask.mask_mod, None, None, total, total, "cpu", size)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    assert torch.equal(mask.to_dense(), expected.to_dense())


def test_flex_attention_computes_the_same(monkeypatch):
    monkeypatch.setattr(
        peers, "load", lambda *_: types.SimpleNamespace(flex_attention=flex_attention)
    )
    work = problem()
    qkv = torch.randn(sum(work.lengths), 6, cases.HEAD_DIM)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        out, expected = peers.flex(work)(qkv), peers.ours(work)(qkv)
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_an_absent_wrong_or_broken_peer_has_a_note(monkeypatch):
    def broken(qkv):
        raise ValueError("no kernel image")

    def forward_only(work):
        return lambda qkv: peers.ours(work)(qkv.detach())

    variants = {
        "slap-fast": peers.ours,
        "FA3": forward_only,
        "FA4": lambda work: broken,
        "cuDNN dense": peers.cudnn,
        "FlexAttention": lambda work: peers.ours(work._replace(window=(5, 5))),
    }
    monkeypatch.setattr(benchmark, "VARIANTS", variants)
    case = cases.packs(0.002)[0]
    rows = list(benchmark.rows_of(case, cases.WINDOW, rounds=2))
    notes = {row["variant"]: row["note"] for row in rows if "note" in row}
    assert notes["FA4"] == "fails: no kernel image"
    assert notes["cuDNN dense"] == "needs a GPU"
    assert notes["FlexAttention"].startswith("fails: wrong, error")
    timed = [(row["variant"], row["direction"]) for row in rows if "ms" in row]
    assert timed == [
        ("slap-fast", "forward"),
        ("FA3", "forward"),
        ("slap-fast", "backward"),
        ("slap-fast", "both"),
    ]
    forward = next(row for row in rows if row.get("direction") == "forward")
    # 2 clips of 250 tokens: 2 * 2 * 12 * 64 * the pairs inside +-48.
    assert forward["TFLOP/s"] == pytest.approx(
        4 * 768 * 2 * (250 * 97 - 48 * 49) / forward["ms"] / 1e9
    )


class CudnnTensor:
    """A graph's description of a tensor; every setter returns it."""

    def __init__(self, **fields):
        self.__dict__ |= fields

    def __getattr__(self, name):
        def setter(value):
            self.__dict__[name.removeprefix("set_")] = value
            return self

        if not name.startswith("set_"):
            raise AttributeError(name)
        return setter


class CudnnGraph:
    """Attention on tensors that are read and written as the graph describes them."""

    def __init__(self, **types):
        pass

    def tensor(self, **fields):
        return CudnnTensor(**fields)

    def sdpa(self, q, k, v, generate_stats, **options):
        self.inputs, self.outputs, self.options = [q, k, v], [CudnnTensor(), CudnnTensor()], options
        return self.outputs

    def sdpa_backward(self, q, k, v, out, dout, stats, **options):
        self.inputs, self.options = [q, k, v, dout], options
        self.outputs = [CudnnTensor() for _ in range(3)]
        return self.outputs

    def execute(self, tensors, workspace, handle):
        lengths = tensors[self.options["seq_len_q"]]

        def sequence(tensor, number):
            _, heads, longest, width = tensor.dim
            assert longest == lengths.max()
            base = tensors[tensor]
            start = int(tensors[tensor.ragged_offset][number]) + base.storage_offset()
            shape = (int(lengths[number]), heads, width)
            return base.as_strided(shape, (tensor.stride[2], tensor.stride[1], 1), start)

        left, right = (self.options[f"diagonal_band_{side}_bound"] for side in ("left", "right"))
        window = -1 if left is None else left - 1, -1 if right is None else right
        for number, length in enumerate(lengths.tolist()):
            q, k, v, *dout = (sequence(tensor, number) for tensor in self.inputs)
            starts = torch.tensor([0, length], dtype=torch.int32)
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                results = [attention(*leaves, starts, length, window)]
            if dout:
                results = torch.autograd.grad(results[0], leaves, dout[0])
            for tensor, value in zip(self.outputs, results, strict=False):
                sequence(tensor, number).copy_(value.detach())

    def get_workspace_size(self):
        return 0

    def __getattr__(self, name):  # validate, build_plans, ...
        return lambda *_: None


@WINDOWS
def test_cudnns_graphs_describe_the_pack(monkeypatch, window):
    names = types.SimpleNamespace
    cudnn = names(
        pygraph=CudnnGraph,
        data_type=names(BFLOAT16=0, FLOAT=1, INT32=2, INT64=3),
        heur_mode=names(A=0, FALLBACK=1),
        create_handle=lambda: 0,
        set_stream=lambda handle, stream: None,
    )
    monkeypatch.setattr(peers, "load", lambda name: cudnn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: names(cuda_stream=0))
    work = problem(window=window)
    assert max(errors(peers.VARIANTS["cuDNN ragged"](work), work)) < 1e-5
