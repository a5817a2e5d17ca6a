"""``slap-fast eval``."""

from __future__ import annotations

import json as json_module
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from slap_fast.cli.inputs import bad_row_lines
from slap_fast.cli.options import Model
from slap_fast.config.bounds import Count
from slap_fast.console import emit, make_console, show_progress


def eval(
    model: Model,
    data: str = "builtin",
    split: str | None = None,
    template: tuple[str, ...] = (),
    captions: bool = True,
    num_beams: Count = 1,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Retrieval, zero-shot labels and captions of a model, as a table and a card.

    Clips that cannot be read are counted, by cause, and left out of every figure.

    Example: slap-fast eval --model runs/my/best --data my/manifest.csv --split test

    Args:
        data: A manifest, a folder of files or shards, or "builtin".
        split: Rows to evaluate on; by default those of split "test" where there is one.
        template: Zero-shot prompts with {} for the label, averaged; by default its authors' one.
        captions: Leave out generating captions and scoring them, most of the time that it takes.
        num_beams: Beams of the caption generation; 1 is greedy.
        out: The card; by default eval_DATA.json, or eval_DATA_SPLIT.json, in the folder of a
            slap-fast model, else (or where that cannot be written) here. By default the card of
            another evaluation is not overwritten.
        json: Print the card as JSON on stdout.
    """
    from slap_fast.atomic_files import only_writer, write_json
    from slap_fast.data.open import open_source
    from slap_fast.evaluation.card import evaluate
    from slap_fast.evaluation.table import render
    from slap_fast.inference.audio_text import Captioner
    from slap_fast.inference.slap import Slap

    loaded = model.load()
    source = open_source(
        data, split, fallback="test", sample_rate=loaded.sample_rate, bad=(bad := [])
    )
    for line in bad_row_lines(bad):
        print(line, file=sys.stderr)
    writes_captions = captions and isinstance(loaded, Captioner)
    what = {
        "model": model.model,
        "data": data,
        "split": split or "test, where there is one",
        "template": list(template) or [loaded.default_template],
        "num_beams": num_beams if writes_captions else None,
    }
    console = make_console(json)
    with ExitStack() as locks:
        if out is not None and not out.is_dir():
            locks.enter_context(only_writer(out, replaced=True))
        else:
            # Beside weights of ours, which are a folder here; never among the files of others.
            ours = isinstance(loaded, Slap) and Path(model.model).is_dir()
            folders = [out] if out else [Path(model.model), Path()] if ours else [Path()]
            out, problem = _reserve(locks, folders, _card_name(data, split), what)
            if out is None:
                console.print(f"card: none, {problem}")
        card = evaluate(
            loaded,
            source,
            captions=captions,
            num_beams=num_beams,
            template=template,
            progress=show_progress(json),
        )
        card = {**what, "facts": loaded.facts(), **card}
        card["n_expected"] += len(bad)
        card["failures"] = dict(Counter(card["failures"]) + Counter(row.code for row in bad))
        failure = None
        if out is not None and card["n"]:
            try:
                write_json(out, card)
            except OSError as error:
                failure = error
    render(card, console)
    if captions and not writes_captions:
        console.print(f"captions: not scored, a {card['facts']['kind']} model writes none")
    if out is not None and card["n"] and failure is None:
        console.print(f"card: {out}")
    emit(card, json)
    if failure is not None:
        raise failure
    return 0 if card["n"] else 1


def _card_name(data: str, split: str | None) -> str:
    path = Path(data).resolve()
    name = path.name if path.is_dir() else path.stem
    return re.sub(r"[^\w.-]", "_", f"{name}_{split}" if split else name)


def _reserve(
    locks: ExitStack, folders: list[Path], name: str, what: dict[str, Any]
) -> tuple[Path | None, OSError | None]:
    """(the card's place, locked, in the first folder that can be written; or None, and why)."""
    from slap_fast.atomic_files import only_writer

    for folder in folders:
        out = next(path for path in _card_names(folder, name) if _is_free(path, what))
        try:
            locks.enter_context(only_writer(out, replaced=True))
        except OSError as error:
            problem = error
        else:
            return out, None
    return None, problem


def _card_names(folder: Path, name: str) -> Iterator[Path]:
    """``eval_NAME.json``, then ``eval_NAME_2.json`` and so on."""
    yield folder / f"eval_{name}.json"
    yield from (folder / f"eval_{name}_{number}.json" for number in count(2))


def _is_free(path: Path, what: dict[str, Any]) -> bool:
    """Whether there is no card yet, or an earlier one of the same evaluation."""
    try:
        card = json_module.loads(path.read_bytes())
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and all(card.get(key, what[key]) == what[key] for key in what)
