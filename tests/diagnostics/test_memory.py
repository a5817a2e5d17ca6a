"""The memory that ``slap-fast plan`` estimates, against what torch keeps for a backward."""

import json

import pytest
import torch

from slap_fast import cli, compilation
from slap_fast.config import override, slap_base
from slap_fast.data.loader import TrainSteps
from slap_fast.diagnostics import memory
from slap_fast.losses import self_distillation
from slap_fast.ops import dispatch
from slap_fast.training.state import begin
from slap_fast.training.step import train_step
from tests.helpers import runs
from tests.helpers.memory import Peak

TOLERANCE = 0.1
FUSED = {"attention": "triton", "map_pool": "triton"}
SIZED = {
    "model.audio.hidden_size": 32,
    "model.audio.intermediate_size": 64,
    "model.text.hidden_size": 32,
    "model.text.num_layers": 2,
    "model.text.intermediate_size": 48,
    "model.caption.hidden_size": 24,
    "model.caption.num_layers": 2,
    "model.caption.intermediate_size": 40,
    "batch_size": 3,
}


def kept_bytes(model, *inputs):
    """Of the tensors that autograd keeps for the backward, each memory once; not of parameters."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(*inputs)  # alive until all is counted
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(kept[place].nbytes() for place in kept.keys() - parameters) if outputs else None


@pytest.mark.parametrize("student_pass", ["shared", "separate"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_forward_keeps_what_is_estimated(compiled, student_pass):
    """Within TOLERANCE, on the kernels, as a GPU runs them."""
    changes = {"model.ssl.student_pass": student_pass, "model.ssl.mask_clips": 0.6}
    config = override(runs.TINY, SIZED | changes)
    state, words = begin(config, None, None, runs.CPU)
    (batch,) = TrainSteps(runs.clips(), words, config)[0].batches
    if compiled:

        def backend(graph, inputs):
            return compilation.recompute_backend(graph, inputs, "aot_eager_decomp_partition")

        state.model.compile(backend=backend, dynamic=True)
        with dispatch.using(FUSED):
            state.model(batch, config.loss)
    with dispatch.using(FUSED):
        kept = kept_bytes(state.model, batch, config.loss)
    saved = memory.saved_for_backward(config.model, compiled)
    audio, masked = len(batch.audio.patches), batch.masked_tokens
    assert 0 < masked < audio
    counts = audio, masked, len(batch.mask_indices), len(batch.text.ids)
    estimated = 4 * sum(n * per for n, per in zip(counts, saved, strict=True))
    assert kept == pytest.approx(estimated, rel=TOLERANCE)


def test_parameters_are_counted_without_making_them():
    counts = memory.parameter_counts(runs.TINY.model)
    state, _ = begin(runs.TINY, None, None, runs.CPU)
    num_parameters = sum(p.numel() for p in state.model.parameters())
    bare = sum(p.numel() for p in (state.model.log_logit_scale, state.model.logit_bias))
    assert sum(counts.values()) - counts["teacher"] == num_parameters - bare
    assert counts["teacher"] == sum(p.numel() for p in state.teacher.parameters())


def test_what_a_run_holds_between_steps_is_counted():
    state, words = begin(runs.TINY, None, None, runs.CPU)
    seen = []
    for parameter in filter(lambda p: p.requires_grad, state.model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.nbytes))
    train_step(state, TrainSteps(runs.clips(), words, state.config)[0].batches)
    moments = (x for slots in state.optimizer.state.values() for x in slots.values() if x.ndim)
    counted = memory.estimate_memory(state.config, 24e9)["fixed_bytes"]
    for name, size in (
        ("parameters", sum(p.nbytes for p in state.model.parameters())),
        ("gradients", sum(seen)),
        ("AdamW's moments", sum(x.nbytes for x in moments)),
        ("teacher", sum(p.nbytes for p in state.teacher.parameters())),
    ):
        assert counted[name] == pytest.approx(size, rel=1e-3), name


def test_more_memory_fits_more_and_too_little_nothing(capsys):
    tokens = []
    for gpu in ("1GB", "24GB", "80GiB"):
        assert cli.main(["plan", "--gpu", gpu, "--json"]) == 0
        estimate = json.loads(capsys.readouterr().out)
        tokens.append(estimate["max_tokens"])
        spent = sum(estimate["fixed_bytes"].values())
        spent += estimate["max_tokens"] * sum(estimate["bytes_per_token"].values())
        assert gpu == "1GB" or 0.99 * estimate["memory"] < spent <= estimate["memory"]
    assert tokens[0] == 0 < tokens[1] < tokens[2]
    assert cli.main(["plan", "--gpu", "1GB"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_what_a_cached_batch_keeps_is_counted():
    """2,048 clips of 252 patches, half of them masked, features of 256 in bf16."""
    cached = override(slap_base(), {"grad_cache": True})
    estimate = memory.estimate_memory(cached, 80e9)
    assert estimate["fixed_bytes"]["teacher's features of the whole batch"] == 2048 * 126 * 256 * 2
    assert estimate["max_tokens"] < memory.estimate_memory(slap_base(), 80e9)["max_tokens"]


def test_self_distillation_holds_as_many_blocks_as_are_counted():
    features, prototypes = (torch.randn(n, 4) for n in (300, 200))
    student = torch.randn(300, 4, requires_grad=True)
    with Peak() as seen:
        targets = self_distillation.sinkhorn(features, prototypes, 0.1, 3, chunk_size=30)
        self_distillation.self_distillation_loss(student, prototypes, targets, 0.1, 30)
    assert seen.most / (30 * 200) == pytest.approx(memory.LOSS_BLOCKS, abs=0.8)


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "nanGB", "24TB"])
def test_a_malformed_size_is_refused(text, capsys):
    assert cli.main(["plan", f"--gpu={text}"]) == 2
    assert "expected a size such as 24GB" in capsys.readouterr().err
