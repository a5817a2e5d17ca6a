"""SLAP as a transformers model on two ranks: DDP, accelerate, Trainer; only one of its losses."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from slap_fast.training.state import begin
from tests.helpers.runs import SMALL, ranks

STEPS = 3  # what is left unreduced by one step raises in the next


@cache
def model_and_batch():
    """The same model on every rank, and two pairs of this rank's own."""
    from slap_fast.interop.transformers import from_native

    state, words = begin(SMALL, None, None, torch.device("cpu"))
    model, processor = from_native(state.model, words)
    rng = np.random.default_rng(torch.distributed.get_rank())
    clips = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (16_000, 8_000)]
    batch = processor(text=["a dog barks", "rain on a roof of tin"], audio=clips)
    return model.train(), {**batch, "return_loss": True}


def train(model, batch, backward=torch.Tensor.backward):
    """Losses of all steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        losses.append(float(loss))
    return losses


def in_ddp():
    model, batch = model_and_batch()
    losses = []
    for checkpointing in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        twin = copy.deepcopy(model)
        if checkpointing:
            twin.gradient_checkpointing_enable(checkpointing)
        losses.append(train(DistributedDataParallel(twin), batch))
    return losses, float(sum(p.detach().double().sum() for p in twin.parameters()))


def in_accelerate():
    from accelerate import Accelerator

    model, batch = model_and_batch()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    return train(prepared, batch, accelerator.backward)


def in_trainer(folder, checkpointing):
    from transformers import Trainer, TrainingArguments

    model, batch = model_and_batch()
    rows = [{name: values[i] for name, values in batch.items() if name != "return_loss"}
            for i in range(2)]  # fmt: skip

    def collate(rows):
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {**columns, "return_loss": True}

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        gradient_checkpointing=checkpointing,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    return trainer.train().global_step


@pytest.mark.slow
def test_ddp_with_and_without_gradient_checkpointing():
    (losses, first), (_, second) = ranks(2, in_ddp)
    assert first == second
    for checkpointed in losses[1:]:
        assert checkpointed == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_accelerate():
    pytest.importorskip("accelerate")
    first, second = ranks(2, in_accelerate)
    assert len(first) == len(second) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    pytest.importorskip("accelerate")
    assert ranks(2, in_trainer, str(tmp_path), checkpointing) == [STEPS, STEPS]


def test_parameters_that_ddp_leaves_alone_are_those_without_a_gradient(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    model, batch = model_and_batch.__wrapped__()
    model(**batch).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == set(model._ddp_params_and_buffers_to_ignore)
