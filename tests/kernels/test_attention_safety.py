"""Triton's attention: accesses out of bounds, large offsets, program order, neighbours."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from slap_fast.kernels import attention as triton_attention
from tests.helpers import guard_pages, packs
from tests.helpers.packs import Pack, assert_same_bits
from tests.helpers.paths import ROOT

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="only the interpreter's memory and order are ours to choose"
)
MIXED = [70, 3, 0, 33]


@interpreted
@pytest.mark.slow
def test_guard_pages(figure):
    for first in figure("K4", ci=30, soak=510, batch=30):
        assert not guard_pages.invalid_accesses("attention_guard_pages", first, 30)


@interpreted
def test_guard_pages_guard():
    program = (
        "import ctypes, torch; from tests.helpers.guard_pages import guarded; "
        "x = guarded(torch.ones(3), at_end=True); ctypes.string_at(x.data_ptr() + 12, 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert done.returncode == -11


def permuted_runs(monkeypatch, pack, inputs, orders):
    """The results under several orders of a kernel's programs."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    for seed in range(orders):
        generator = torch.Generator().manual_seed(seed)
        permutations = {}

        def permuted(x, y, z, generator=generator, permutations=permutations):
            count = builder.grid_dim[0]
            if x == 0 or count not in permutations:
                permutations[count] = torch.randperm(count, generator=generator).tolist()
            place(permutations[count][x], y, z)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", permuted)
            yield pack.run(triton_attention, inputs)


@interpreted
@pytest.mark.parametrize("kernel", ["mixed", "tiled"])
def test_the_order_of_programs_changes_nothing(monkeypatch, kernel):
    packs.force(monkeypatch, kernel)
    pack = Pack(MIXED, heads=(2, 1) if kernel == "tiled" else (2, 2), head_dim=16)
    inputs = pack.inputs()
    expected = pack.run(triton_attention, inputs)
    for actual in permuted_runs(monkeypatch, pack, inputs, 2):
        assert_same_bits(actual, expected)


@interpreted
@pytest.mark.slow
def test_orders_of_programs(figure, monkeypatch):
    for seed in figure("K8", ci=20, soak=500):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            packs.force(patch, ["mixed", "tiled", "whole"][seed % 3])
            pack = Pack(MIXED, heads=(2, 1) if seed % 2 else (2, 2), head_dim=16)
            inputs = pack.inputs()
            expected = pack.run(triton_attention, inputs)
            for actual in permuted_runs(patch, pack, inputs, 1 + seed % 3):
                assert_same_bits(actual, expected)


def leaks_nothing(pack: Pack, which: int) -> None:
    """A sequence has the same bits alone as beside neighbours that are NaN."""
    begin = sum(pack.lengths[:which])
    rows = slice(begin, begin + pack.lengths[which])
    alone = Pack([pack.lengths[which]], None, pack.heads, pack.head_dim, pack.dtype, tail=0)
    alone.options = pack.options
    alone.values = {
        name: (x[:, rows] if name == "dlse" else x[rows]).clone() for name, x in pack.values.items()
    }
    alone.tables = tuple(x[rows].clone() for x in pack.tables)
    for name, x in pack.values.items():
        kept = (x[:, rows] if name == "dlse" else x[rows]).clone()
        x.fill_(math.nan)
        (x[:, rows] if name == "dlse" else x[rows]).copy_(kept)
    together = pack.run(triton_attention, pack.inputs())
    for name, expected in alone.run(triton_attention, alone.inputs()).items():
        actual = together[name]
        assert torch.equal(actual[:, rows] if name == "lse" else actual[rows], expected), name


@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("kernel", ["whole", "mixed", "tiled"])
def test_neighbours_change_nothing(monkeypatch, kernel, which):
    packs.force(monkeypatch, kernel)
    leaks_nothing(Pack(MIXED, options={"window_size": (9, 20)}), which)


@pytest.mark.slow(minutes=2)
def test_random_neighbours_change_nothing(figure, monkeypatch):
    for seed in figure("K3", ci=100, soak=5_000):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        lengths = torch.randint(0, 100, (3,), generator=generator).tolist()
        with monkeypatch.context() as patch:
            packs.force(patch, ["whole", "mixed", "tiled", "table"][seed % 4])
            dtype = (torch.float32, torch.float16)[seed % 2]
            window = [(-1, -1), (9, 20), (48, 48)][seed % 3]
            heads = [(1, 1), (2, 1), (2, 2)][seed // 3 % 3]
            pack = Pack(lengths, None, heads, 16, dtype, options={"window_size": window})
            leaks_nothing(pack, seed % 3)


def test_calls_in_any_order_have_the_same_bits(monkeypatch):
    packs.force(monkeypatch, "mixed")
    many = [Pack([40, 70]), Pack([3]), Pack([0, 65], tail=9)]
    inputs = [pack.inputs() for pack in many]
    first = [p.run(triton_attention, x) for p, x in zip(many, inputs, strict=True)]
    for i in (2, 0, 1, 1, 0):
        assert_same_bits(many[i].run(triton_attention, inputs[i]), first[i])


@pytest.mark.parametrize("kernel", ["whole", "tiled"])
def test_invalid_cu_seqlens_stay_in_bounds(monkeypatch, kernel):
    # On a GPU they are not validated: the kernels must stay in bounds, whatever the results.
    packs.force(monkeypatch, kernel)
    for bounds in ([0, 7, 900], [-5, 3, 20], [0, 15, 4], [90, 95, 99]):
        q, k, v = Pack([20], tail=0).inputs()
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=packs.DEVICE)
        out = triton_attention.attention(q, k, v, cu_seqlens, 40)
        out.sum().backward()


def test_more_than_65535_sequences():
    # Axes 1 and 2 of a grid end there; this only makes the grids, as interpreting takes minutes.
    count = 65_540
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32)
    tiles = triton_attention.schedule_tiles(cu_seqlens, count)
    assert tiles[count - 1].tolist() == [count - 1, 0]
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    call = triton_attention._Call(*[cu_seqlens] * 2, *[None] * 4, 1, 1, 0, 0, 1.0)
    q = torch.zeros(count, 2, 16)
    setting = triton_attention.Setting(64, 64, 4, 1)
    call.launch(Kernel(), count * 2, 0, setting, q, q)
    assert grids == [(2 * count,)]


@pytest.mark.gpu  # no grid of the interpreter ends, and it takes ten minutes
@pytest.mark.parametrize("kernel", ["whole", "tiled"])
def test_more_than_65535_sequences_run(monkeypatch, kernel):
    packs.force(monkeypatch, kernel)
    lengths = [0] * 65_540 + [2]
    inputs = Pack([2], heads=(1, 1), head_dim=16, tail=0)
    pack = Pack([2], heads=(1, 1), head_dim=16, tail=0)
    pack.values, pack.tables = inputs.values, inputs.tables
    expected = pack.run(triton_attention, pack.inputs())
    pack.lengths = lengths
    assert_same_bits(pack.run(triton_attention, pack.inputs()), expected)


FAR = 1 << 30
"""A stride that fits int32; three of it do not."""


def assert_strides_past_2_31(monkeypatch, kernel, what):
    # The last rows (or heads) of every input are past 2^31 and 2^32 elements.
    packs.force(monkeypatch, kernel)
    pack = Pack([6], heads=(6, 6), head_dim=16, dtype=torch.float16, tail=0)
    expected = pack.run(triton_attention, pack.inputs())

    def far(x):
        strides = (FAR, 16, 1) if what == "rows" else (16, FAR, 1)
        base = guard_pages.lazy((6 * FAR,), x.dtype)
        return torch.as_strided(base, x.shape, strides).copy_(x.detach())

    pack.values["dout"] = far(pack.values["dout"])
    assert_same_bits(
        pack.run(triton_attention, [far(x).requires_grad_() for x in pack.inputs()]), expected
    )


@interpreted
@pytest.mark.parametrize("kernel", ["whole", "tiled"])
@pytest.mark.parametrize("what", ["rows", "heads"])
def test_strides_past_2_31(figure, monkeypatch, kernel, what):
    for _ in figure("K5", ci=1, soak=1):
        assert_strides_past_2_31(monkeypatch, kernel, what)


def assert_results_past_2_31(monkeypatch, kernel, what):
    # rows: those of out, dq, dk, dv, cos and sin; heads: those of lse, dlse and delta.
    packs.force(monkeypatch, kernel)
    begin, heads, head_dim = ((1 << 25) + 8, 1, 128) if what == "rows" else (1 << 24, 130, 16)
    length, rows = 3, begin + 4
    pack = Pack([length], heads=(heads, heads), head_dim=head_dim, dtype=torch.float16, tail=1)
    expected = pack.run(triton_attention, pack.inputs())

    def late(x, dim=0):
        """x as the last rows of a tensor of that many."""
        shape = list(x.shape)
        shape[dim] = rows
        base = guard_pages.lazy(tuple(shape), x.dtype)
        base.narrow(dim, begin, 4).copy_(x.detach())
        return base

    def lazy_like(x):
        return guard_pages.lazy(tuple(x.shape), x.dtype)

    def allocate_forward(inputs, *_):
        q = inputs[0]
        lse = guard_pages.lazy((heads, rows), torch.float32)
        return guard_pages.lazy(tuple(q.shape), q.dtype), lse

    monkeypatch.setattr(triton_attention, "_allocate_forward", allocate_forward)
    monkeypatch.setattr(
        triton_attention,
        "_allocate_backward",
        lambda _, __, inputs, *___: [*map(lazy_like, inputs)],
    )
    monkeypatch.setattr(torch, "empty_like", lazy_like)
    inputs = [late(x) for x in pack.inputs()]
    grads_out = late(pack.values["dout"]), late(pack.values["dlse"], 1)
    starts = torch.tensor([begin, begin + length], dtype=torch.int32)
    schedule = torch.tensor([[0, 0]], dtype=torch.int32)
    cos, sin = map(late, pack.tables)
    scale, side = head_dim**-0.5, triton_attention.OPEN
    call = (starts, starts, schedule, schedule, cos, sin, length, length, side, side, scale)
    out, lse = triton_attention._forward(inputs, heads, *call)
    grads = triton_attention._backward(*grads_out, inputs, heads, out, lse, *call)
    actual = dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))
    actual = {name: x[begin:] for name, x in actual.items()} | {"lse": lse[:, begin:]}
    assert_same_bits(actual, expected)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["whole", "tiled"])
@pytest.mark.parametrize("what", ["rows", "heads"])
def test_results_past_2_31(figure, monkeypatch, kernel, what):
    for _ in figure("K5", ci=1, soak=1):
        assert_results_past_2_31(monkeypatch, kernel, what)
