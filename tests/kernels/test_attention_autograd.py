"""Triton's attention under autograd, torch.compile, checkpointing and autocast."""

from __future__ import annotations

import pytest
import torch

from slap_fast import ops
from slap_fast.kernels import attention as triton_attention
from tests.helpers import packs
from tests.helpers.packs import DEVICE, Pack, assert_same_bits, starts

LENGTHS = [1, 63, 0, 130]


def test_some_outputs_have_gradients(kernel):
    pack = Pack(LENGTHS, options={"window_size": (5, 5)})
    expected = {}
    for which in ("out", "lse"):
        results = []
        for module, dtype in ((triton_attention, None), (packs.reference_attention, torch.float64)):
            q, k, v = pack.inputs(dtype)
            options = {"rope": pack.tables, "return_lse": True} | pack.options
            out, lse = module.attention(q, k, v, starts(LENGTHS), 130, **options)
            y = {"out": out[:194], "lse": lse[:, :194]}[which]
            weight = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
            results.append(torch.autograd.grad(y, (q, k, v), weight, materialize_grads=True))
        for a, b in zip(*results, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
        expected[which] = results[0]
    assert torch.equal(expected["lse"][2], torch.zeros_like(expected["lse"][2]))


def test_some_inputs_require_gradients(kernel):
    pack = Pack([1, 40])
    full = pack.run(triton_attention, pack.inputs())
    for required in ("q", "k", "v"):
        inputs = [
            x.requires_grad_(name == required) for x, name in zip(pack.inputs(), "qkv", strict=True)
        ]
        options = {"rope": pack.tables, "return_lse": True}
        out, lse = triton_attention.attention(*inputs, starts([1, 40]), 40, **options)
        weights = pack.values["dout"], pack.values["dlse"]
        (grad,) = torch.autograd.grad((out, lse), inputs["qkv".index(required)], weights)
        assert torch.equal(grad, full[f"d{required}"])


def test_twice_differentiated_is_an_error():
    # Also where the gradient of out is a constant: a penalty on dq would silently do nothing.
    q, k, v = Pack([8], tail=0).inputs()
    out = triton_attention.attention(q, k, v, starts([8]), 8)
    with pytest.raises(RuntimeError, match="has no second derivative; use impl='reference'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_gradients_accumulate_and_inputs_stay():
    pack = Pack([1, 40], tail=0)
    inputs = pack.inputs()
    before = [x.detach().clone() for x in inputs]
    first = pack.run(triton_attention, inputs)
    second = pack.run(triton_attention, inputs)
    assert_same_bits(second, first)
    assert not {x.data_ptr() for x in first.values()} & {x.data_ptr() for x in inputs}
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


def test_checkpointing_and_no_grad():
    pack = Pack([1, 40], tail=0)
    inputs = pack.inputs()

    def run(*inputs):
        return triton_attention.attention(*inputs, starts([1, 40]), 40, rope=pack.tables)

    expected = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(run(*inputs), again) and not run(*inputs).requires_grad


def test_autocast_leaves_the_operation_alone():
    # Registered operations ignore autocast: what comes in decides.
    q, k, v = Pack([20], tail=0).inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = triton_attention.attention(q, k, v, starts([20]), 20)
    assert out.dtype == torch.float32


def compiled_problem(seed):
    generator = torch.Generator().manual_seed(seed)
    count = 3 + seed % 4
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    tail = 1 + seed % 3
    qkv = torch.randn(sum(lengths) + tail, 3, 16, generator=generator).to(DEVICE).requires_grad_()
    coords = torch.arange(len(qkv), dtype=torch.int32, device=DEVICE)[:, None]
    return qkv, starts(lengths), max(lengths), ops.rope_tables(coords, 16)


def layer_pair(qkv, cu_seqlens, max_seqlen, rope):
    schedule = ops.attention_schedule(cu_seqlens, max_seqlen, len(qkv))
    options = {"rope": rope, "schedule": schedule}
    x = ops.attention_qkvpacked(qkv * 1.5, 1, cu_seqlens, max_seqlen, window_size=(4, 4), **options)
    return ops.attention_qkvpacked(qkv + x, 1, cu_seqlens, max_seqlen, **options).sin()


@pytest.mark.parametrize(
    "backend, count",
    [
        ("aot_eager", 8),
        pytest.param("aot_eager", 50, marks=pytest.mark.slow),
        pytest.param("inductor", 50, marks=pytest.mark.slow),
    ],
)
def test_many_packs_compile_without_graph_breaks_and_at_most_twice(
    figure, triton_by_default, backend, count
):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer_pair, fullgraph=True, backend=counter)
    for seed in figure("K10", ci=count, soak=50):
        problem = compiled_problem(seed)
        actual = compiled(*problem)
        if seed % 7 == 0:
            expected = layer_pair(*problem)
            assert (actual - expected).norm() <= 1e-6 * expected.norm()
            weight = torch.randn_like(actual)
            grads = [torch.autograd.grad(y, problem[0], weight)[0] for y in (actual, expected)]
            assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()
        assert counter.frame_count <= 2


@pytest.mark.parametrize("packed", [False, True], ids=["q_k_v", "qkv"])
def test_opcheck(figure, monkeypatch, packed):
    for seed in figure("K6", ci=1, soak=10):
        torch.manual_seed(seed)
        lengths = torch.randint(0, 4, (1 + seed % 4,)).tolist()
        total = sum(lengths)
        packs.force(monkeypatch, "mixed")
        inputs = [x.detach() for x in Pack(lengths, None, (2, 1), 16, tail=0).inputs()]
        inputs = [torch.cat(inputs, 1)] if packed else inputs
        dout, dlse = torch.randn(total, 2, 16, device=DEVICE), torch.randn(2, total, device=DEVICE)
        coords = torch.zeros(total, 1, dtype=torch.int32, device=DEVICE)
        schedules, tables = (None, None), ops.rope_tables(coords, 16)
        # 3 takes the short-sequence kernel, 300 could take the tiled one.
        for longest, dlse_here in ((3, None), (300, dlse)):
            numbers = (longest, longest, 3, triton_attention.OPEN, 0.2)
            call = (starts(lengths), starts(lengths), *schedules, *tables, *numbers)
            torch.library.opcheck(torch.ops.slap_fast.attention_forward, (inputs, 1, *call))
            out, lse = torch.ops.slap_fast.attention_forward(inputs, 1, *call)
            arguments = (dout, dlse_here, inputs, 1, out, lse, *call)
            torch.library.opcheck(torch.ops.slap_fast.attention_backward, arguments)
