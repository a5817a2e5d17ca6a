"""What patch() does with transformers' models: `python -m benchmarks.report.compatibility`.

Every model of benchmarks.transformers_models is built from its config, patched, and compared with
itself before: in eval mode, in fp32, without padding, padded, packed, with an encoder's states and
on a cache. Writes benchmarks/results/compatibility.json and the table of docs/compatibility.md;
exit code 1 where a number differs by more than 1e-5, or anything was raised.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slap_fast
from benchmarks import machine
from benchmarks.report.readme import ran_on
from benchmarks.report.tables import markdown
from benchmarks.transformers_batches import Inputs
from benchmarks.transformers_models import KINDS, inputs_of, make
from slap_fast.packed import starts_of

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- compatibility: made by `%s` -->", "<!-- end of compatibility -->"
BEGIN %= "python -m benchmarks.report.compatibility"
MOST = 1e-5
"""Relative L2 difference of outputs and gradients, in fp32."""
CALLS = ("unpadded", "padded", "packed", "cross", "past", "gradients", "undone")
"""What is compared; ``undone`` is the model after ``undo()``."""

Outputs = dict[str, Tensor]


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """The parts of one model by option and outcome, each with the differences of the whole model.

    A model that raises has one row whose ``changed`` is False and whose option is ``raised``.
    """
    try:
        model = make(name)
        ways = dict(calls(name, model))
        before = {call: list(run(model)) for call, run in ways.items()}
        report = slap_fast.patch(model)
        found = {call: _largest(run(model), before[call]) for call, run in ways.items()}
        report.undo()
        found["undone"] = max(_largest(run(model), before[call]) for call, run in ways.items())
    except Exception as error:  # a model may raise anything; the table names it
        why = f"{type(error).__name__}: {error}"
        yield {**_row(name, "raised", name), "changed": False, "why": " ".join(why.split())[:200]}
        return
    parts = Counter((c.option, c.changed, c.kind, c.why) for c in report.changes)
    parts = parts or Counter({("patch", False, name, "nothing that it knows"): 1})
    for (option, changed, kind, why), count in parts.items():
        row = _row(name, option, f"{count} x {kind}")
        differences = {call: found.get(call) for call in CALLS} if changed else {}
        yield {**row, "changed": changed, "why": why, **differences}


def _row(name: str, option: str, part: str) -> dict[str, Any]:
    return {"group": KINDS[name].group, "model": name, "option": option, "part": part}


def calls(name: str, model: Any) -> Iterator[tuple[str, Callable[[nn.Module], Iterator[Tensor]]]]:
    """Ways to call a model, by the column of the table: each yields tensors to compare."""
    inputs = inputs_of(name)
    plain = {key: x for key, x in inputs.items() if not key.endswith("attention_mask")}
    yield "unpadded", lambda model: iter(_outputs(model, plain).values())
    yield "gradients", lambda model: _gradients(model, inputs)
    crosses = [key for key in ("decoder_input_ids", "encoder_hidden_states") if key in inputs]
    if "attention_mask" in inputs and "encoder_hidden_states" not in inputs:
        yield "padded", lambda model: _padded(model, inputs, of_decoder=False)
    if crosses:
        yield "cross", lambda model: _padded(model, inputs, of_decoder=True)
    is_text = inputs.keys() <= {"input_ids", "attention_mask"}
    if is_text and model.can_generate() and "past_key_values" in _names(model):
        yield "past", lambda model: _past(model, inputs)
    if is_text and KINDS[name].group == "causal" and _packs(model, inputs):
        yield "packed", lambda model: _packed(model, inputs)


@torch.no_grad()
def _outputs(model: Any, inputs: Inputs) -> Outputs:
    return {
        key: value
        for key, value in _call(model, inputs).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == (2,)
    }


def _padded(model: Any, inputs: Inputs, *, of_decoder: bool) -> Iterator[Tensor]:
    """Outputs of the encoder, at real positions, or of the decoder."""
    has_decoder = "decoder_input_ids" in inputs
    for key, value in _outputs(model, inputs).items():
        if (has_decoder and not key.startswith("encoder_")) == of_decoder:
            yield value if has_decoder and of_decoder else _real(value, inputs)
        elif of_decoder and not has_decoder:  # a decoder of text, on an encoder's states
            yield _real(value, inputs)


def _real(value: Tensor, inputs: Inputs) -> Tensor:
    """Both samples without the padding of the second; of fewer positions the same share."""
    mask = inputs.get("attention_mask")
    if mask is None or value.ndim < 3:
        return value
    positions = value.shape[1]
    real = positions * int(mask[1].sum()) // mask.shape[1]
    if positions != mask.shape[1]:
        real -= 1  # which may reach into the padding
    return torch.cat([value[0], value[1, :real]])


def _gradients(model: Any, inputs: Inputs) -> Iterator[Tensor]:
    """Of all parameters in one: of a scalar of all outputs at real positions, and of the loss."""
    with torch.enable_grad():
        values = [
            value
            if "decoder_input_ids" in inputs and not key.startswith("encoder_")
            else _real(value, inputs)
            for key, value in _call(model, inputs).items()
            if isinstance(value, Tensor) and value.requires_grad and value.shape[:1] == (2,)
        ]
        yield _gradient(model, sum(value.square().sum() for value in values))
        if model.get_output_embeddings() is not None and "attention_mask" in inputs:
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            yield _gradient(model, _call(model, {**inputs, "labels": labels}).loss)


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


def _call(model: Any, inputs: Inputs) -> Any:
    """The output without a cache, whose blocks may run without padding."""
    torch.manual_seed(0)  # of a model that draws random numbers even in eval mode
    return model(**inputs, **({"use_cache": False} if "use_cache" in _names(model) else {}))


def _names(model: nn.Module) -> Any:
    """Of the arguments that a model takes."""
    return inspect.signature(model.forward).parameters


@torch.no_grad()
def _past(model: Any, inputs: Inputs) -> Iterator[Tensor]:
    """Logits of two more tokens, one by one, on the cache of a left-padded batch."""
    ids, mask = inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1)
    cache = None
    for first, end in ((0, 7), (7, 8), (8, 9)):
        out = model(
            input_ids=ids[:, first:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        yield out.logits[:, -1]


@torch.no_grad()
def _packed(model: Any, inputs: Inputs) -> Iterator[Tensor]:
    """Logits of both samples in one row, where their positions begin anew."""
    mask = inputs["attention_mask"].bool()
    positions = mask.cumsum(1)[mask] - 1
    starts = starts_of(mask.sum(1))
    out = model(
        input_ids=inputs["input_ids"][mask][None],
        position_ids=positions[None],
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=mask.shape[1],
        max_length_k=mask.shape[1],
        use_cache=False,
    )
    yield out.logits[0]


def _packs(model: Any, inputs: Inputs) -> bool:
    """Whether the model's own attention packs by positions: as each sample gives alone."""
    try:
        mask = inputs["attention_mask"].bool()
        (packed,) = _packed(model, inputs)
        padded = _outputs(model, inputs)["logits"][mask]
    except Exception:  # it takes no positions, or no lengths
        return False
    return _difference(packed, padded) <= 1e-4


def _largest(actual: Iterator[Tensor], expected: list[Tensor]) -> float:
    return max(_difference(a, b) for a, b in zip(actual, expected, strict=True))


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def fails(row: dict[str, Any]) -> bool:
    """Whether a row breaks the promise: something raised, or a number that is not the model's."""
    values = [row.get(call) for call in CALLS]
    return row["option"] == "raised" or any(
        not value <= MOST for value in values if value is not None
    )


def page(record: dict[str, Any]) -> str:
    """The tables, one for each group of models, and a line about the machine."""
    rows = record["rows"]
    parts = [BEGIN]
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        header = ["model", "part", "option", "", *CALLS[:-1]]
        cells = [
            [row["model"], row["part"], row["option"]]
            + [("yes" if row["changed"] else f"no: {_escaped(row['why'])}")]
            + [_figure(row.get(call)) for call in CALLS[:-1]]
            for row in own
        ]
        changed = len({row["model"] for row in own if row["changed"]})
        models = len({row["model"] for row in own})
        parts += [f"## {group}: {changed} of {models} models changed", markdown(header, cells)]
    return "\n\n".join([*parts, f"<sub>{ran_on(record['machine'])}</sub>", END])


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"


def main() -> int:
    """Measures, records and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of models; only prints their rows")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    options = parser.parse_args()
    rows = [row for name in options.names or KINDS for row in rows_of(name)]
    failed = [row for row in rows if fails(row)]
    if options.names:
        print(json.dumps(rows, indent=1))
        return int(bool(failed))
    record = machine.record(rows=rows)
    machine.write(options.root / "benchmarks" / "results" / "compatibility.json", record)
    path = options.root / "docs" / "compatibility.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.split(BEGIN)[0] + page(record) + text.split(END)[1], encoding="utf-8")
    for row in failed:
        print(f"FAILS {row}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
