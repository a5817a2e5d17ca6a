"""A patched model on two ranks: DDP, and FSDP2 with the output layer as a unit of its own."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import slap_fast
from benchmarks.transformers_batches import MASK
from benchmarks.transformers_models import inputs_of, make
from tests.helpers.runs import ranks

NAME = "LlamaForCausalLM"


def batch_of(rank):
    """Other ids on each rank."""
    inputs = inputs_of(NAME)
    inputs["input_ids"] = (inputs["input_ids"] + rank) % 60
    return {**inputs, "labels": inputs["input_ids"].masked_fill(MASK == 0, -100)}


def gradients(model):
    grads = (parameter.grad for parameter in model.parameters())
    return torch.cat([
        (grad.full_tensor() if isinstance(grad, DTensor) else grad).flatten() for grad in grads
    ])  # fmt: skip


def average():
    """The gradients of both ranks' batches by the model's own code."""
    model = make(NAME)
    for rank in range(2):
        (model(**batch_of(rank)).loss / 2).backward()
    return gradients(model)


def difference(actual):
    expected = average()
    return float((actual - expected).norm() / expected.norm())


def in_ddp():
    model = make(NAME).train()
    assert slap_fast.patch(model).changed("linear_cross_entropy")
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        out = wrapped(**batch_of(torch.distributed.get_rank()))
        out.loss.backward()
    return difference(gradients(model)), "logits" in out.keys()


def in_fsdp(head_alone):
    """The head's weight is whole only while the head itself runs, where it is a unit."""
    model = make(NAME).train()
    report = slap_fast.patch(model)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_alone:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        out = model(**batch_of(torch.distributed.get_rank()))
        out.loss.backward()
    found = difference(gradients(model)), "logits" in out.keys()
    report.undo()
    out = model(**batch_of(0))
    assert "logits" in out.keys()
    out.loss.backward()
    refused = slap_fast.patch(model)
    assert not any(change.changed for change in refused.changes), refused
    assert "sharded: patch before fully_shard" in str(refused)
    return found


@pytest.mark.slow
def test_ddp():
    for difference, has_logits in ranks(2, in_ddp):
        assert difference < 1e-5 and not has_logits


@pytest.mark.slow
@pytest.mark.parametrize("head_alone", [False, True])
def test_fsdp(head_alone):
    for difference, has_logits in ranks(2, in_fsdp, head_alone):
        assert difference < 1e-5 and has_logits == head_alone
