"""``slap-fast eval``."""

from __future__ import annotations

from pathlib import Path

from slap_fast.cli.options import Device, Model, torch_device
from slap_fast.console import emit, make_console, show_progress


def eval(
    model: Model,
    data: str = "builtin",
    split: str | None = None,
    template: tuple[str, ...] = (),
    captions: bool = True,
    num_beams: int = 1,
    device: Device = "auto",
    json: bool = False,
) -> int:
    """Retrieval, zero-shot labels and captions of a model, as a table and a card.

    Example: slap-fast eval --model runs/my/best --data my/manifest.csv --split test

    Args:
        data: A manifest, a folder of files or shards, or "builtin".
        split: Rows to evaluate on; by default those of split "test" where there is one.
        template: Zero-shot prompts with {} for the label, averaged.
        captions: Also generate captions and score them.
        num_beams: Beams of the caption generation; 1 is greedy.
        json: Print the card as JSON on stdout.
    """
    from slap_fast.atomic_files import write_json
    from slap_fast.data.open import open_source
    from slap_fast.evaluation.card import evaluate
    from slap_fast.evaluation.table import render
    from slap_fast.inference.slap import DEFAULT_TEMPLATE, Slap

    slap = Slap.from_pretrained(model, device=torch_device(device))
    card = evaluate(
        slap,
        open_source(data, split, fallback="test"),
        captions=captions,
        num_beams=num_beams,
        template=template or DEFAULT_TEMPLATE,
        progress=show_progress(json),
    )
    card = {"model": str(model), "data": data, "split": split or "test, where there is one", **card}
    path = model / f"eval_{Path(data).stem}.json"
    write_json(path, card)
    console = make_console(json)
    render(card, console)
    console.print(f"card: {path}")
    emit(card, json)
    return 0
