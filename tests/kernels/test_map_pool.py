"""The Triton pooling against the reference in fp64, on a GPU or interpreted."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from triton.runtime.interpreter import interpreter_builder

from slap_fast import ops
from slap_fast.kernels import map_pool as kernels
from tests.helpers import guard_pages
from tests.helpers.pool_problems import DEVICE, LENGTHS, TAIL, inputs, run, starts
from tests.helpers.tolerance import assert_accurate

# Interpreted bf16 is truncated where it should be rounded.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter")


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest sequence has three pieces, the second one."""
    monkeypatch.setattr(kernels, "SPLIT", 64)


def assert_matches_reference(
    x: Tensor, score_weight: Tensor, cu_seqlens: Tensor, dout: Tensor
) -> None:
    actual = run(x, score_weight, cu_seqlens, dout, "triton")
    eager = run(x, score_weight, cu_seqlens, dout, "reference")
    truth = run(x.double(), score_weight.double(), cu_seqlens, dout.double(), "reference")
    rows = x[: int(cu_seqlens[-1])]
    operands = ((rows,), (dout, score_weight, rows), (dout, rows, rows))
    for i, name in enumerate(("pooled", "dx", "dscore_weight")):
        try:
            assert_accurate(actual[i], eager[i], truth[i], operands=operands[i], gradient=i > 0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("C, H", [(64, 2), (100, 3), (150, 1)], ids=lambda n: str(n))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(figure, dtype: torch.dtype, C: int, H: int) -> None:
    for seed in figure("K2", ci=1, soak=100):
        torch.manual_seed(seed)
        assert_matches_reference(*inputs(C, H, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("element_size, widest", kernels.SETTINGS, ids=str)
def test_every_setting(figure, monkeypatch, element_size: int, widest: int) -> None:
    monkeypatch.undo()  # SPLIT is the real one, and there are sequences of several pieces
    dtype = {2: torch.float16, 4: torch.float32}[element_size]
    for seed in figure("K7", ci=1, soak=5):
        torch.manual_seed(seed)
        assert_matches_reference(*inputs(widest, 3, dtype, lengths=[1, 0, kernels.SPLIT + 3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_of_x_does_not_swamp_the_gradient(dtype: torch.dtype) -> None:
    x, score_weight, cu_seqlens, dout = inputs(dtype=dtype)
    assert_matches_reference(x + 5 * torch.randn_like(x[:1]), score_weight / 5, cu_seqlens, dout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    x, score_weight, cu_seqlens, dout = inputs(dtype=dtype)
    assert_matches_reference(x, score_weight.sign() * 1e3, cu_seqlens, dout)


LAYOUTS = {
    "step": lambda x: torch.stack((x, torch.full_like(x, math.nan)), 1).flatten(0, 1)[::2],
    "columns": lambda x: torch.cat((torch.full_like(x, math.nan), x), 1)[:, x.shape[1] :],
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout) -> None:
    x, score_weight, cu_seqlens, dout = inputs()
    x, score_weight, dout = layout(x), layout(score_weight), layout(dout)
    actual = run(x, score_weight, cu_seqlens, dout, "triton")
    expected = run(x.clone(), score_weight.clone(), cu_seqlens, dout.contiguous(), "triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rows_past_the_end_get_exactly_zero() -> None:
    pooled, dx, dw = run(*inputs(), "triton")
    assert pooled.isfinite().all() and dw.isfinite().all()
    assert torch.equal(dx[-TAIL:], torch.zeros_like(dx[-TAIL:]))


@pytest.mark.parametrize("where", range(len(LENGTHS)))
def test_a_sequence_ignores_its_neighbours_bitwise(where: int) -> None:
    x, score_weight, cu_seqlens, dout = inputs()
    rows = slice(*cu_seqlens[where : where + 2].tolist())
    length, one = [LENGTHS[where]], slice(where, where + 1)
    alone = run(x[rows], score_weight, starts(length), dout[one], "triton")
    neighbours = torch.full_like(x, math.nan)
    neighbours[rows] = x[rows]
    packed = run(neighbours, score_weight, cu_seqlens, dout, "triton")
    assert torch.equal(packed[0][one], alone[0]) and torch.equal(packed[1][rows], alone[1])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [0, 0, 3]], ids=str)
@pytest.mark.parametrize("rows", [0, 7])
def test_few_or_no_tokens(lengths: list[int], rows: int) -> None:
    total = max(rows, sum(lengths))
    x, score_weight = torch.randn(total, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    dout = torch.randn(len(lengths), 2, 8, device=DEVICE)
    assert_matches_reference(x, score_weight, starts(lengths), dout)


def test_many_short_sequences_and_one_long_one() -> None:
    lengths = [1] * 40 + [400] + [0, 2] * 10
    assert_matches_reference(*inputs(C=16, H=1, lengths=lengths))


def test_cu_seqlens_beyond_x_is_clamped() -> None:
    # A GPU does not read the values; the kernels must stay inside x.
    x, score_weight, _, dout = inputs(lengths=[40, 20])
    x = x[:60]
    wrong = starts([40, 999])
    pooled, lse = kernels._forward_op(x, score_weight, wrong)
    expected, expected_lse = kernels._forward_op(x, score_weight, starts([40, 20]))
    assert torch.equal(pooled, expected) and torch.equal(lse, expected_lse)
    actual = kernels._backward_op(x, score_weight, wrong, pooled, lse, dout)
    expected = kernels._backward_op(x, score_weight, starts([40, 20]), pooled, lse, dout)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
def test_forward_and_backward_each_read_x_once_in_equal_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long a sequence is, its programs read a piece, or their part of all rows."""
    x, score_weight, cu_seqlens, dout = inputs(C=24, lengths=[1, 300, 0, 63, 2, 2, 64, 130])
    load, reads = interpreter_builder.create_masked_load, {}

    def spy(pointers, mask, *arguments):
        places = (pointers.data.astype(np.int64) - x.data_ptr()) // x.element_size()
        places = places[mask.data & (places >= 0) & (places < x.numel())]
        reads.setdefault(interpreter_builder.grid_idx, []).extend(places.tolist())
        return load(pointers, mask, *arguments)

    def shares() -> list[int]:
        """Rows that each program has read; all of them together read each element once."""
        offsets = sorted(itertools.chain.from_iterable(reads.values()))
        assert offsets == list(range(int(cu_seqlens[-1]) * x.shape[1]))
        rows_read = [len(places) // x.shape[1] for places in reads.values()]
        reads.clear()
        return rows_read

    monkeypatch.setattr(interpreter_builder, "create_masked_load", spy)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 6)
    pooled, lse = kernels._forward_op(x, score_weight, cu_seqlens)
    assert max(shares()) == kernels.SPLIT
    kernels._backward_op(x, score_weight, cu_seqlens, pooled, lse, dout)
    rows = shares()
    assert len(rows) == 6 and max(rows) == 96  # full tiles of a sixth of the 567 rows


@interpreted
def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(C=16)
    expected = run(*arguments, "triton")
    set_grid_idx = interpreter_builder.set_grid_idx
    for seed in range(5):
        orders: dict[int, list[int]] = {}

        def permuted(x: int, y: int, z: int, seed=seed, orders=orders) -> None:
            size = interpreter_builder.grid_dim[0]
            order = orders.setdefault(size, random.Random(seed).sample(range(size), size))
            set_grid_idx(order[x], y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)
        actual = run(*arguments, "triton")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
def test_guard_pages(figure) -> None:
    for first in figure("K4", ci=10, soak=510, batch=10):
        assert not guard_pages.invalid_accesses("pool_guard_pages", first, 10)


def lazy(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take memory only where they are written."""
    return guard_pages.lazy(shape, dtype)


BIG = 2**31 + 64
"""Elements before what is looked at."""


def one_program(kernel, index: int, *arguments, **constexprs) -> None:
    """Runs one program of a kernel, with this index."""

    def set_grid_idx(x: int, y: int, z: int) -> None:
        interpreter_builder.grid_idx = (index, y, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
        kernel[(1,)](*arguments, **constexprs)


SHAPE = {"H": 16, "C": 128, "BLOCK_T": 16, "BLOCK_H": 16, "BLOCK_C": 128}
ROW = 16 * 128


@interpreted
def test_offsets_of_x_past_2_31(figure) -> None:
    for _ in figure("K5", ci=1, soak=1):
        rows = lazy(3, 2**30 + 64, dtype=torch.float16)
        x = rows[:, :16]
        x.copy_(torch.randn(3, 16))
        _, score_weight, _, dout = inputs(C=16, dtype=torch.float16, lengths=[3])
        actual = run(x, score_weight, starts([3]), dout, "triton")
        expected = run(x.clone(), score_weight, starts([3]), dout, "triton")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
def test_offsets_of_sequences_past_2_31(figure) -> None:
    # Only the last of many sequences has tokens.
    for _ in figure("K5", ci=1, soak=1):
        sequences = BIG // ROW + 1
        cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
        cu_seqlens[-1] = 20
        x, score_weight = torch.randn(20, 128), torch.randn(16, 128)
        dout = lazy(sequences, 16, 128)
        dout[-1] = torch.randn(16, 128)
        pooled, lse, nothing = lazy(sequences, 16, 128), lazy(sequences, 16), torch.empty(0)
        one_program(
            kernels._forward_kernel, sequences - 1, x, score_weight, cu_seqlens, pooled, lse,
            nothing, nothing, 128, 20, sequences, SPLIT=64, **SHAPE,
        )  # fmt: skip
        expected = kernels._forward_op(x, score_weight, starts([20]))
        assert torch.equal(pooled[-1:], expected[0]) and torch.equal(lse[-1:], expected[1])

        dx, parts = torch.empty(20, 128), torch.empty(1, 16, 128)
        one_program(
            kernels._backward_kernel, 0, x, score_weight, cu_seqlens, pooled, lse, dout, dx, parts,
            128, 20, sequences, 32, **SHAPE,
        )  # fmt: skip
        expected = kernels._backward_op(x, score_weight, starts([20]), *expected, dout[-1:])
        torch.testing.assert_close((dx, parts[0]), tuple(expected), rtol=1e-4, atol=1e-4)


@interpreted
def test_offsets_of_rows_and_parts_past_2_31(figure) -> None:
    # A second sequence far behind the first; x is one row, repeated.
    for _ in figure("K5", ci=1, soak=1):
        split = 16
        begin = split * (BIG // (2 * ROW) + 1)
        cu_seqlens, total = starts([begin, 2 * split]), begin + 2 * split
        x, score_weight = torch.randn(1, 128).expand(total, 128), torch.randn(16, 128)
        num_parts = 2 * (total // split)
        parts, part_lse = lazy(num_parts, 16, 128), lazy(num_parts, 16)
        pooled, lse = torch.empty(2, 16, 128), torch.empty(2, 16)
        shape = {"SPLIT": split, **SHAPE}
        for piece in range(2):
            one_program(
                kernels._forward_kernel, begin // split + 1 + piece, x, score_weight, cu_seqlens,
                pooled, lse, parts, part_lse, 0, total, 2, **shape,
            )  # fmt: skip
        one_program(
            kernels._combine_kernel, 1, cu_seqlens, pooled, lse, parts, part_lse, total, H=16,
            C=128, SPLIT=split, BLOCK_C=128,
        )  # fmt: skip
        torch.testing.assert_close(pooled[1, 0], x[0])

        programs = BIG // ROW + 1
        rows = 32
        total = programs * rows
        dx, parts = lazy(total, 128), lazy(programs, 16, 128)
        dout = torch.randn(1, 16, 128)
        x, few = x[:1].expand(total, 128), x[:1].expand(rows, 128)
        pooled, lse = kernels._forward_op(few, score_weight, starts([rows]))
        one_program(
            kernels._backward_kernel, programs - 1, x, score_weight, starts([total]), pooled, lse,
            dout, dx, parts, 0, total, 1, rows, **SHAPE,
        )  # fmt: skip
        expected = kernels._backward_op(few, score_weight, starts([rows]), pooled, lse, dout)
        torch.testing.assert_close(dx[-rows:], expected[0])
        torch.testing.assert_close(parts[-1], expected[1])


def test_opcheck(figure) -> None:
    for seed in figure("K6", ci=1, soak=10):
        torch.manual_seed(seed)
        lengths = torch.randint(0, 100, (1 + seed % 4,)).tolist()
        x, score_weight, cu_seqlens, dout = inputs(C=16, lengths=lengths)
        pooled, lse = kernels._forward_op(x, score_weight, cu_seqlens)
        for op, arguments in (
            (kernels._forward_op, (x[:-TAIL], score_weight, cu_seqlens)),
            (kernels._backward_op, (x[:-TAIL], score_weight, cu_seqlens, pooled, lse, dout)),
        ):
            torch.library.opcheck(op, arguments)


def test_compiles_without_graph_breaks_and_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def loss(x, score_weight, cu_seqlens, dout):
        return (ops.map_pool(x, score_weight, cu_seqlens, impl="triton") * dout).sum()

    for lengths in ([3, 70, 0], [9, 5, 2, 66], [1, 1]):
        x, score_weight, cu_seqlens, dout = inputs(C=16, lengths=lengths)
        x.requires_grad_(), score_weight.requires_grad_()
        actual = torch.autograd.grad(loss(x, score_weight, cu_seqlens, dout), (x, score_weight))
        expected = run(x, score_weight, cu_seqlens, dout, "triton")[1:]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counter.frame_count == 1


def test_launches_under_the_device_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded_for = []
    device_of = torch.cuda.device_of

    def watched(tensor: Tensor):
        guarded_for.append(tensor)
        return device_of(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", watched)
    x, score_weight, cu_seqlens, dout = inputs(C=16)
    pooled, lse = kernels._forward(x, score_weight, cu_seqlens)
    kernels._backward(x, score_weight, cu_seqlens, pooled, lse, dout)
    assert len(guarded_for) == 2 and all(tensor is x for tensor in guarded_for)


def test_a_gradient_of_the_gradient_raises() -> None:
    x, score_weight, cu_seqlens, _ = inputs(C=16)
    x.requires_grad_()
    pooled = ops.map_pool(x, score_weight, cu_seqlens, impl="triton")
    (dx,) = torch.autograd.grad(pooled.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_more_than_the_kernel_holds_is_refused() -> None:
    for C, H in ((1025, 1), (8, 17)):
        x, score_weight = torch.zeros(2, C, device=DEVICE), torch.zeros(H, C, device=DEVICE)
        with pytest.raises(NotImplementedError, match=f"C = {C} and H = {H}"):
            ops.map_pool(x, score_weight, starts([2]), impl="triton")
