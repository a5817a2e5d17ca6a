"""Commands that use a model on files: ``slap-fast embed``, ``classify`` and ``caption``."""

from __future__ import annotations

import hashlib
import json as json_module
from collections import Counter
from pathlib import Path
from typing import Any

from slap_fast.cli.inputs import Inputs, name_bad, open_inputs
from slap_fast.cli.options import Model, Paths
from slap_fast.config.bounds import Count
from slap_fast.console import emit, make_console, show_progress


def embed(
    paths: Paths,
    model: Model,
    out: Path = Path("embeddings"),
    split: str | None = None,
    json: bool = False,
) -> int:
    """Vectors of audio files: those given, or of folders, manifests, shards or lists.

    Writes vectors.npy (float32 [N, E], NaN where a file is bad), items.jsonl (path, status, code,
    seconds heard) and model.json (what the model is). Earlier ones stay until the new ones are
    whole. Cut off, the same command goes on where it was.

    Example: slap-fast embed --model runs/my/best --out vectors sounds/ one.wav

    Args:
        out: Folder for the three files.
        split: Of manifests and shards, only this split.
        json: Print the counts as JSON on stdout.
    """
    from slap_fast.atomic_files import only_writer
    from slap_fast.inference.vectors import write_vectors

    inputs = open_inputs(paths, split)
    clips = inputs.clips
    console = make_console(json)
    with only_writer(out):
        embedder = model.load()
        plan = {"items": _fingerprint(inputs), "model": embedder.content_hash}
        with write_vectors(out, plan, (len(clips), embedder.embed_dim)) as writer:
            if done := len(writer.items):
                console.print(f"going on after {done} of {len(clips)} files")
            rows = embedder.embed_each(inputs.items[done:], progress=show_progress(json))
            try:
                for clip, (vector, failure, seconds) in zip(clips[done:], rows, strict=True):
                    item = {"path": clip.path, "status": "ok", "code": None, "seconds": seconds}
                    if clip.name != clip.path:
                        item |= {"start": clip.start, "end": clip.end}
                    if failure:
                        bad = {"code": failure.code, "message": failure.message}
                        item |= {"status": "bad", **bad}
                    writer.add(vector, item)
                bad = [item for item in writer.items if item["status"] == "bad"]
                if len(bad) < len(clips):
                    writer.finish({"model": model.model, **embedder.facts()})
                else:
                    writer.discard()
            except (KeyboardInterrupt, OSError):
                done = len(writer.items)
                console.print(f"{done} of {len(clips)} files are kept; the same command goes on")
                raise
    good = len(clips) - len(bad)
    total = len(clips) + len(inputs.bad_rows)
    where = out / "vectors.npy" if good else "nothing is written"
    console.print(f"{good} of {total} files embedded: {where}")
    messages = [*(item["message"] for item in bad), *inputs.bad_rows]
    name_bad(messages, total, where=str(out / "items.jsonl"))
    codes = Counter(item["code"] for item in bad)
    codes |= {"E_MANIFEST": len(inputs.bad_rows)} if inputs.bad_rows else {}
    emit({"n": good, "n_expected": total, "failures": dict(codes), "out": str(out)}, json)
    return 0 if good else 1


def _fingerprint(inputs: Inputs) -> str:
    """SHA-256 of the clips' names, and of their files' sizes and times of change."""
    digest = hashlib.sha256()
    for clip in inputs.clips:
        path = Path(clip.path)
        file = path if path.exists() else path.parent  # a clip in a shard
        stat = file.stat() if file.exists() else None
        state = stat and (stat.st_size, stat.st_mtime_ns)
        digest.update(json_module.dumps([*clip, state]).encode())
    return digest.hexdigest()


def classify(
    paths: Paths,
    model: Model,
    labels: str,
    template: tuple[str, ...] = (),
    json: bool = False,
) -> int:
    """Say which of your labels each file sounds like.

    A file that cannot be read is left out and named.

    Example: slap-fast classify --model runs/my/best --labels "dog,cat,rain" a.wav b.mp3

    Args:
        labels: Labels with commas between; or a .txt file of a label on each line, or a .json file
            of a list, or such a list itself: then a label may hold a comma.
        template: Prompts with {} for the label, averaged; by default the one of its authors.
        json: Print {path: {label: probability}} as JSON on stdout.
    """
    from rich.table import Table

    names = parse_labels(labels)
    inputs = open_inputs(paths)
    answers, failures = model.load().classify(
        inputs.items, names, template, on_error="skip", progress=show_progress(json)
    )
    table = Table("file", "label", "probability")
    for clip, probabilities in zip(inputs.clips, answers, strict=True):
        for label, probability in list((probabilities or {}).items())[:3]:
            table.add_row(clip.name, label, f"{probability:.1%}")
    return _print_answers(inputs, answers, failures, table, json)


def parse_labels(text: str) -> list[str]:
    """The labels that ``--labels`` means, each once. Raises ValueError."""
    path = Path(text)
    if path.suffix.lower() in (".txt", ".json") and "," not in text:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or "not UTF-8"
            raise ValueError(f"--labels: {path}: {problem}, expected a file of labels") from None
        labels = _json_labels(text) if path.suffix.lower() == ".json" else text.splitlines()
    elif text.lstrip().startswith("["):
        labels = _json_labels(text)
    else:
        labels = text.split(",")
    labels = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
    if not labels:
        raise ValueError("--labels: found none, expected at least one")
    return labels


def _json_labels(text: str) -> list[str]:
    try:
        labels = json_module.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--labels: found invalid JSON ({error}), expected a list") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"--labels: found {text.strip()[:80]}, expected a list of texts")
    return labels


def caption(
    paths: Paths,
    model: Model,
    num_beams: Count = 3,
    json: bool = False,
) -> int:
    """Say in words what each file sounds like.

    A file that cannot be read is left out and named.

    Example: slap-fast caption --model runs/my/best a.wav b.mp3

    Args:
        num_beams: Hypotheses kept; 1 is greedy.
        json: Print {path: caption} as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.inference.audio_text import Captioner

    inputs = open_inputs(paths)
    captioner = model.load()
    if not isinstance(captioner, Captioner):
        kind = captioner.facts()["kind"]
        raise ValueError(
            f"--model: {model.model} is a {kind} model, which writes no captions: "
            "expected a slap-fast model"
        )
    captions, failures = captioner.caption(
        inputs.items, num_beams=num_beams, on_error="skip", progress=show_progress(json)
    )
    table = Table("file", "caption")
    for clip, text in zip(inputs.clips, captions, strict=True):
        if text is not None:
            table.add_row(clip.name, text)
    return _print_answers(inputs, captions, failures, table, json)


def _print_answers(
    inputs: Inputs, answers: list[Any], failures: list[Any], table: Any, json: bool
) -> int:
    """Prints what each good file got, then the bad ones; 1 where none is good."""
    good: dict[str, Any] = {
        clip.name: answer
        for clip, answer in zip(inputs.clips, answers, strict=True)
        if answer is not None
    }
    if good:
        make_console(json).print(table)
    messages = [*(failure.message for failure in failures), *inputs.bad_rows]
    name_bad(messages, len(inputs.clips) + len(inputs.bad_rows))
    emit(good, json)
    return 0 if good else 1
