"""The compiled step: no graph breaks, few recompiles, and the losses of the eager step."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from slap_fast import compilation, distributed, ops
from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.ops import torch_attention
from slap_fast.packed import PackedBatch
from slap_fast.training.state import begin
from slap_fast.training.step import LOSSES, train_step
from tests.helpers import runs

COMPILED = override(runs.TINY, {"steps": 50, "batch_size": 6, "compile": True})


def start(config):
    state, tokenizer = begin(config, None, None, runs.CPU)
    return state, TrainSteps(runs.clips(), tokenizer, config)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def sequences(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_the_reference_is_one_node_of_a_graph(dynamo):
    """Values and gradients equal eager ones: changing lengths, window, causal, cross."""
    torch.manual_seed(0)

    def run(qkv, k, w, starts, starts_k, rope):
        out = ops.attention_qkvpacked(qkv, 2, starts, 9, rope=rope, window_size=(2, 1))
        out = out + ops.attention_qkvpacked(qkv, 2, starts, 9, causal=True)
        out = out + ops.attention(out, k, k, starts, 9, cu_seqlens_k=starts_k, max_seqlen_k=9)
        return ops.map_pool(out.flatten(1), w, starts).square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for lengths, lengths_k in (((3, 0, 9), (4, 2, 9)), ((5, 2), (3, 3)), ((7, 8, 1, 2), (2,) * 4)):
        starts, starts_k = sequences(*lengths), sequences(*lengths_k)
        qkv, k, w = (
            torch.randn(sum(lengths), 6, 8),
            torch.randn(sum(lengths_k), 2, 8),
            torch.randn(3, 16),
        )
        inputs = [x.requires_grad_() for x in (qkv, k, w)]
        rope = ops.rope_tables(torch.arange(sum(lengths))[:, None].int(), 8)
        eager, in_graph = (f(*inputs, starts, starts_k, rope) for f in (run, compiled))
        assert torch.equal(eager, in_graph)
        for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (eager, in_graph)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2  # the first lengths have sizes in common that others have not


@pytest.mark.parametrize("layout", ["contiguous", "strided", "as on a GPU"])
def test_opcheck(layout, figure, monkeypatch):
    """Of the operations without kernels, forward and backward."""
    registered, contiguous = torch.ops.slap_fast, layout != "strided"
    if layout == "as on a GPU":
        attend = torch_attention._attend

        def with_lse(*arguments):
            *tensors, options = arguments
            return attend(*tensors, options._replace(return_lse=True))[0]

        monkeypatch.setattr(torch_attention, "_attend", with_lse)

    def normal(*shape):
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]
        return (x.contiguous() if contiguous else x).requires_grad_()

    for seed in figure("K6", ci=1, soak=10):
        torch.manual_seed(seed)
        starts, starts_k = sequences(3, 0, 5), sequences(4, 1, 2)
        tables = [table.float() for table in torch.randn(2, 8, 2)]
        options = 2, 1, False, None
        separate = *(normal(n, 2, 4) for n in (8, 7, 7)), starts, starts_k, None, None, *options
        packed = normal(8, 6, 4), 2, starts, *tables, *options
        cases = {
            registered.torch_attention: separate,
            registered.torch_attention_qkvpacked: packed,
            registered.reference_attention: separate,
            registered.reference_attention_qkvpacked: packed,
            registered.reference_map_pool: (normal(8, 4), normal(2, 4), starts),
        }
        for op, arguments in cases.items():
            torch.library.opcheck(op.default, arguments)


def test_a_missing_compiler_is_reported_at_once(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def nothing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    with pytest.raises(ValueError, match="compile: found no C.. compiler, expected g"):
        start(COMPILED)


def test_student_and_teacher_are_compiled_to_keep_less(monkeypatch):
    compiled = {}

    def spy(module, **options):
        compiled[type(module)] = options

    monkeypatch.setattr(torch.nn.Module, "compile", spy)
    start(COMPILED)
    assert compiled == dict.fromkeys(
        (SlapModel, Teacher), {"dynamic": True, "backend": compilation.recompute_backend}
    )


def losses_of_ranks(kind, compile):
    config = override(COMPILED, {"ranks": kind, "compile": compile})
    state, tokenizer = begin(config, None, None, runs.CPU)
    ranks = distributed.rank(), distributed.world_size()
    data = TrainSteps(runs.clips(), tokenizer, config, None, *ranks)
    graphs = counters["stats"]
    graphs.clear()
    losses = []
    for state.step in range(5):
        metrics = train_step(state, data[state.step].batches)
        losses.append([float(metrics[name]) for name in LOSSES])
    return losses, graphs["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_ranks_have_the_losses_of_eager_ranks(kind):
    plain, compiled = (
        runs.ranks(2, losses_of_ranks, kind, compile, patience=600.0) for compile in (False, True)
    )
    for (eager_losses, none, _), (losses, graphs, breaks) in zip(plain, compiled, strict=True):
        assert none == 0 < graphs and not breaks
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (losses, eager_losses))
        assert ((a - b).abs() / b.abs()).max() < 1e-5


@pytest.mark.slow
def test_fifty_packs_make_no_graph_break_and_two_recompiles_at_most(dynamo, figure, monkeypatch):
    """K10: of student, teacher, targets and the three losses, forward and backward."""

    @functools.cache
    def counted(function):
        made.append(CompileCounterWithBackend("aot_eager"))
        return torch.compile(function, backend=made[-1], dynamic=True)

    def count(modules, device):
        for module in modules:
            made.append(CompileCounterWithBackend("aot_eager"))
            module.compile(backend=made[-1], dynamic=True)

    monkeypatch.setattr(compilation, "compile_modules", count)
    monkeypatch.setattr(compilation, "compile_for_any_size", counted)
    for seed in figure("K10", ci=1, soak=3):
        made = []
        counted.cache_clear()
        state, data = start(override(COMPILED, {"seed": seed}))
        for state.step in range(50):
            train_step(state, data[state.step].batches)
        assert not dynamo["graph_break"]
        assert len(made) == 6
        counts = [counter.frame_count for counter in made]
        assert 1 <= min(counts) and max(counts) <= 3, counts
        torch._dynamo.reset()


@pytest.mark.slow
def test_packs_of_no_and_of_one_clip_are_compiled_too(dynamo, monkeypatch):
    """In both passes of a gradient cache; Dynamo's own limit of 8 would leave one of them eager,
    and here raise."""
    monkeypatch.setattr(compilation, "recompute_backend", lambda graph, inputs: graph.forward)
    eager = functools.partial(torch.compile, backend="eager", dynamic=True)
    monkeypatch.setattr(compilation, "compile_for_any_size", functools.cache(eager))
    small = {"batch_size": 9, "max_tokens": 60, "grad_cache": True, "model.ssl.mask_clips": 0.25}
    limits = {"recompile_limit": 8, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        state, data = start(override(COMPILED, small))
        empty, clips = PackedBatch.empty(state.config.model.mel.patch_dim), set()
        for state.step in range(5):
            batches = data[state.step].batches
            clips.update(len(batch.audio.cu_seqlens) - 1 for batch in batches)
            train_step(state, [*batches, empty])
    assert clips == {1, 2, 3} and not dynamo["graph_break"]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_eager_run():
    losses = []
    for changes in ({}, {"compile": False}):
        state, data = start(override(COMPILED, changes))
        losses.append([])
        for state.step in range(20):
            metrics = train_step(state, data[state.step].batches)
            losses[-1].append([float(metrics[name]) for name in LOSSES])
        names = set(state.model.state_dict())
        assert not any("_orig_mod" in name for name in names)
    a, b = torch.tensor(losses, dtype=torch.float64)
    assert ((a - b).abs() / b.abs()).max() < 1e-5
