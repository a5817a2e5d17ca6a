"""``slap-fast eval``."""

from __future__ import annotations

from pathlib import Path

from slap_fast.cli.options import Model
from slap_fast.console import emit, make_console, show_progress


def eval(
    model: Model,
    data: str = "builtin",
    split: str | None = None,
    template: tuple[str, ...] = (),
    captions: bool = True,
    num_beams: int = 1,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Retrieval, zero-shot labels and captions of a model, as a table and a card.

    Example: slap-fast eval --model runs/my/best --data my/manifest.csv --split test

    Args:
        data: A manifest, a folder of files or shards, or "builtin".
        split: Rows to evaluate on; by default those of split "test" where there is one.
        template: Zero-shot prompts with {} for the label, averaged; by default its authors' one.
        captions: Leave out generating captions and scoring them, most of the time that it takes.
        num_beams: Beams of the caption generation; 1 is greedy.
        out: The card; by default eval_DATA.json in the folder of a slap-fast model, else here.
        json: Print the card as JSON on stdout.
    """
    from slap_fast.atomic_files import write_json
    from slap_fast.data.open import open_source
    from slap_fast.evaluation.card import evaluate
    from slap_fast.evaluation.table import render
    from slap_fast.inference.audio_text import Captioner
    from slap_fast.inference.slap import Slap

    loaded = model.load()
    card = evaluate(
        loaded,
        open_source(data, split, fallback="test", sample_rate=loaded.sample_rate),
        captions=captions,
        num_beams=num_beams,
        template=template,
        progress=show_progress(json),
    )
    card = {
        "model": model.model,
        "data": data,
        "split": split or "test, where there is one",
        "template": list(template) or [loaded.default_template],
        "facts": loaded.facts(),
        **card,
    }
    name = "builtin" if data == "builtin" else Path(data).stem
    if out is None:
        # Beside weights of ours, which are a folder here; never among the files of others.
        ours = isinstance(loaded, Slap) and Path(model.model).is_dir()
        out = (Path(model.model) if ours else Path()) / f"eval_{name}.json"
    write_json(out, card)
    console = make_console(json)
    render(card, console)
    if captions and not isinstance(loaded, Captioner):
        console.print(f"captions: not scored, a {card['facts']['kind']} model writes none")
    console.print(f"card: {out}")
    emit(card, json)
    return 0
