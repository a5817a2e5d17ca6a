"""Commands that use a model on files: ``slap-fast embed``, ``classify`` and ``caption``."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path

from slap_fast.cli.options import Model, Paths
from slap_fast.console import emit, make_console, show_progress


def embed(
    paths: Paths,
    model: Model,
    out: Path = Path("embeddings"),
    json: bool = False,
) -> int:
    """Vectors of audio files, or of all audio files in folders.

    Writes vectors.npy (float32 [N, E], NaN where a file is bad), items.jsonl (path, status, code,
    seconds heard) and model.json (what the model is).

    Example: slap-fast embed --model runs/my/best --out vectors sounds/ one.wav

    Args:
        out: Folder for the three files.
        json: Print the counts as JSON on stdout.
    """
    import numpy as np

    from slap_fast.atomic_files import write_json
    from slap_fast.data.manifest import audio_files

    files = [file for path in paths for file in audio_files(path)]
    if not files:
        raise ValueError(f"paths: found no audio file in {', '.join(map(str, paths))}")
    embedder = model.load()
    vectors, failures, seconds = embedder.embed_files(files, progress=show_progress(json))
    failure_of = {failure.index: failure for failure in failures}
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "vectors.npy", vectors)
    with (out / "items.jsonl").open("w", encoding="utf-8") as lines:
        for i, file in enumerate(files):
            item = {"path": str(file), "status": "ok", "code": None, "seconds": seconds[i]}
            if failure := failure_of.get(i):
                item |= {"status": "bad", "code": failure.code, "message": failure.message}
            lines.write(json_module.dumps(item, ensure_ascii=False) + "\n")
    write_json(out / "model.json", {"model": model.model, **embedder.facts()})
    good = len(files) - len(failures)
    make_console(json).print(f"{good} of {len(files)} files embedded: {out / 'vectors.npy'}")
    for failure in failures:
        print(failure.message, file=sys.stderr)
    emit({"n": good, "n_expected": len(files), "out": str(out)}, json)
    return 0 if good else 1


def classify(
    paths: Paths,
    model: Model,
    labels: str,
    template: tuple[str, ...] = (),
    json: bool = False,
) -> int:
    """Say which of your labels each file sounds like.

    Example: slap-fast classify --model runs/my/best --labels "dog,cat,rain" a.wav b.mp3

    Args:
        labels: Labels with commas between.
        template: Prompts with {} for the label, averaged; by default the one of its authors.
        json: Print {path: {label: probability}} as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.data.manifest import audio_files

    files = [file for path in paths for file in audio_files(path)]
    names = [name.strip() for name in labels.split(",") if name.strip()]
    answers = model.load().classify(files, names, template)
    table = Table("file", "label", "probability")
    for file, probabilities in zip(files, answers, strict=True):
        for label, probability in list(probabilities.items())[:3]:
            table.add_row(str(file), label, f"{probability:.1%}")
    make_console(json).print(table)
    emit(dict(zip(map(str, files), answers, strict=True)), json)
    return 0


def caption(
    paths: Paths,
    model: Model,
    num_beams: int = 3,
    json: bool = False,
) -> int:
    """Say in words what each file sounds like.

    Example: slap-fast caption --model runs/my/best a.wav b.mp3

    Args:
        num_beams: Hypotheses kept; 1 is greedy.
        json: Print {path: caption} as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.data.manifest import audio_files
    from slap_fast.inference.audio_text import Captioner

    files = [file for path in paths for file in audio_files(path)]
    captioner = model.load()
    if not isinstance(captioner, Captioner):
        kind = captioner.facts()["kind"]
        raise ValueError(
            f"--model: {model.model} is a {kind} model, which writes no captions: "
            "expected a slap-fast model"
        )
    captions = captioner.caption(files, num_beams=num_beams)
    table = Table("file", "caption")
    for file, text in zip(files, captions, strict=True):
        table.add_row(str(file), text)
    make_console(json).print(table)
    emit(dict(zip(map(str, files), captions, strict=True)), json)
    return 0
