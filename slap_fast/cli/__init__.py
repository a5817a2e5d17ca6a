"""The command line: ``slap-fast COMMAND --help`` shows what each takes, with an example.

Exit codes: 0 done, 1 the work failed, 2 a mistake in what was asked, 130 stopped by Ctrl-C. Heavy
imports wait until a command needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json as json_module
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg
from tyro.extras import SubcommandApp

from slap_fast.cli import data as data_cli
from slap_fast.console import console as _console
from slap_fast.console import emit as _emit
from slap_fast.console import progress as _progress

if TYPE_CHECKING:
    import torch

    from slap_fast.config import TrainConfig


app = SubcommandApp()
app.command(data_cli.app, name="data", help="Check a collection, pack it into shards.")

SUITE = Path(__file__).parents[2] / "benchmarks" / "suite.py"
Device = Literal["auto", "cpu", "cuda", "mps"]


@app.command
def demo(
    out: Path = Path("runs/demo"),
    workers: int = 2,
    json: bool = False,
) -> int:
    """Train a tiny model on the built-in sounds, evaluate it on unseen ones, write a report.

    Example: slap-fast demo

    Args:
        out: Folder for the run and its report.html.
        workers: Processes that make the sounds.
        json: Print the evaluation card as JSON on stdout.
    """
    from slap_fast.demo.run import run

    return run(out, workers=workers, json=json)


@app.command
def train(
    data: str = "builtin",
    config: str = "tiny",
    out: Path = Path("runs/slap"),
    split: str | None = None,
    init: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    workers: int = 2,
    rank_timeout: float = 600.0,
    settings: Annotated[
        UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")
    ] = (),
    tokenizer: str | None = None,
    tensorboard: bool = False,
    json: bool = False,
) -> int:
    """Train on a manifest, a folder, or the built-in sounds.

    Example: slap-fast train --data my/manifest.csv --config tiny --out runs/my

    Ablations: --set loss.ssl=0 --set loss.caption=0 trains the contrastive loss alone;
    --set model.audio.global_every=1 makes every layer global.

    Args:
        data: A JSONL or CSV manifest (path, caption), a folder of audio with captions beside it, a
            folder of shards, a YAML file that mixes several by weight, or "builtin".
        config: A recipe (tiny, base) or a YAML file of settings.
        out: Folder for checkpoints, metrics and logs.
        split: Rows to train on; by default those of split "train" where there is one.
        init: Start from the weights of this model or run, with a new schedule (fine-tuning).
        resume: Go on with the run in --out, exactly where it stopped; its settings come from there.
        device: Where to train.
        precision: Of the matrix products.
        seed: Of weights, order, crops and masks.
        max_tokens: Most audio tokens (25 a second) in one forward pass; lower it when memory runs
            out.
        workers: Processes that decode, for each rank.
        rank_timeout: Under torchrun, seconds that a rank waits for the others before it gives up;
            rank 0's evaluations have to fit.
        settings: Any other setting by its dotted name, such as steps=500 or loss.ssl=0; repeatable.
        tokenizer: A tokenizer.json, its folder or a hub id; by default the pretrained text tower's,
            or the bundled one.
        tensorboard: Also write TensorBoard events.
        json: Print the final card as JSON on stdout.
    """
    from slap_fast import checkpoint, distributed
    from slap_fast.config import override
    from slap_fast.data.audio.isolated import IsolatedDecoder
    from slap_fast.data.open import open_source
    from slap_fast.evaluation import card as evaluate
    from slap_fast.training import loop as training
    from slap_fast.training import state as runstate

    if resume and (settings or init or seed is not None or precision is not None):
        raise ValueError(
            "--resume: found other settings beside it, expected none: a run keeps its own"
        )
    if not resume and (out / "run.json").exists():
        raise ValueError(f"--out: {out} already holds a run; add --resume or choose another folder")
    plan = {"data": data, "split": split, "tokenizer": tokenizer, "init": init and str(init)}
    folder = None
    where = _device(device)
    with distributed.process_group(rank_timeout, where):
        if resume:
            stored, folder = runstate.stored_run(out)
            plan, run_config = stored["plan"], runstate.stored_config(stored)
        else:
            changes = dict(_setting(text) for text in settings)
            flags = {"precision": precision, "seed": seed, "max_tokens": max_tokens}
            changes |= {key: value for key, value in flags.items() if value is not None}
            run_config = override(_recipe(config), changes)
        decoder = IsolatedDecoder()
        source = open_source(plan["data"], plan["split"], fallback="train", decoder=decoder)
        validation = open_source(plan["data"], None, fallback="validation")
        start = None if folder else plan.get("init")
        state, words = runstate.begin(run_config, plan["tokenizer"], start, where)
        if folder:
            runstate.restore(state, folder)
        lead = distributed.rank() == 0
        console = _console(json, quiet=not lead)
        console.print(runstate.describe(state, source))

        def measure(model: Any) -> dict[str, Any]:
            card = evaluate.evaluate(evaluate.Slap(model, words), validation, captions=False)
            return {**card, "score": evaluate.score(card)}

        finished = training.train(
            state,
            source,
            words,
            out,
            plan=plan,
            workers=workers,
            evaluate=measure,
            progress=lead and _progress(json),
            tensorboard=tensorboard,
        )
    if not finished:
        console.print(
            f"stopped at step {state.step}; go on with: slap-fast train --out {out} --resume"
        )
        return 130
    if lead:
        card = checkpoint.read_json(out / "last" / "card.json")
        evaluate.render(card, console)
        console.print(f"model: {out / 'best'}")
        _emit(card, json)
    return 0


@app.command
def eval(
    model: Path,
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
        model: A model's folder, or a run's: its best checkpoint.
        data: A manifest, a folder of files or shards, or "builtin".
        split: Rows to evaluate on; by default those of split "test" where there is one.
        template: Zero-shot prompts with {} for the label, averaged.
        captions: Also generate captions and score them.
        num_beams: Beams of the caption generation; 1 is greedy.
        device: Where to run.
        json: Print the card as JSON on stdout.
    """
    from slap_fast import checkpoint
    from slap_fast.data.open import open_source
    from slap_fast.evaluation import card as evaluate

    slap = evaluate.Slap.from_pretrained(model, device=_device(device))
    card = evaluate.evaluate(
        slap,
        open_source(data, split, fallback="test"),
        captions=captions,
        num_beams=num_beams,
        template=template or evaluate.DEFAULT_TEMPLATE,
        progress=_progress(json),
    )
    card = {"model": str(model), "data": data, "split": split or "test, where there is one", **card}
    name = "builtin" if data == "builtin" else Path(data).stem
    checkpoint.write_json(Path(model) / f"eval_{name}.json", card)
    console = _console(json)
    evaluate.render(card, console)
    console.print(f"card: {Path(model) / f'eval_{name}.json'}")
    _emit(card, json)
    return 0


@app.command
def embed(
    paths: Positional[tuple[Path, ...]],
    model: Path,
    out: Path = Path("embeddings"),
    device: Device = "auto",
    json: bool = False,
) -> int:
    """Vectors of audio files, or of all audio files in folders.

    Writes vectors.npy (float32 [N, E], NaN where a file is bad) and items.jsonl (path, status,
    code).

    Example: slap-fast embed --model runs/my/best --out vectors sounds/ one.wav

    Args:
        paths: Audio files and folders.
        model: A model's folder, or a run's: its best checkpoint.
        out: Folder for the two files.
        device: Where to run.
        json: Print the counts as JSON on stdout.
    """
    import numpy as np

    from slap_fast.data.manifest import audio_files
    from slap_fast.inference.slap import Slap

    files = [file for path in paths for file in audio_files(path)]
    if not files:
        raise ValueError(f"paths: found no audio file in {', '.join(map(str, paths))}")
    slap = Slap.from_pretrained(model, device=_device(device))
    vectors, failures = slap.embed_audio(files, on_error="skip", progress=_progress(json))
    codes = {failure.index: failure for failure in failures}
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "vectors.npy", vectors)
    with (out / "items.jsonl").open("w", encoding="utf-8") as lines:
        for i, file in enumerate(files):
            row = {"path": str(file), "status": "ok", "code": None}
            if i in codes:
                row |= {"status": "bad", "code": codes[i].code, "message": codes[i].message}
            lines.write(json_module.dumps(row, ensure_ascii=False) + "\n")
    good = len(files) - len(failures)
    _console(json).print(f"{good} of {len(files)} files embedded: {out / 'vectors.npy'}")
    for failure in failures:
        print(failure.message, file=sys.stderr)
    _emit({"n": good, "n_expected": len(files), "out": str(out)}, json)
    return 0 if good else 1


@app.command
def classify(
    paths: Positional[tuple[Path, ...]],
    model: Path,
    labels: str,
    template: tuple[str, ...] = (),
    device: Device = "auto",
    json: bool = False,
) -> int:
    """Say which of your labels each file sounds like.

    Example: slap-fast classify --model runs/my/best --labels "dog,cat,rain" a.wav b.mp3

    Args:
        paths: Audio files and folders.
        model: A model's folder, or a run's: its best checkpoint.
        labels: Labels with commas between.
        template: Prompts with {} for the label, averaged.
        device: Where to run.
        json: Print {path: {label: probability}} as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.data.manifest import audio_files
    from slap_fast.inference.slap import DEFAULT_TEMPLATE, Slap

    files = [file for path in paths for file in audio_files(path)]
    names = [name.strip() for name in labels.split(",") if name.strip()]
    slap = Slap.from_pretrained(model, device=_device(device))
    rows = slap.classify(files, names, template or DEFAULT_TEMPLATE)
    table = Table("file", "label", "probability")
    for file, row in zip(files, rows, strict=True):
        for label, probability in list(row.items())[:3]:
            table.add_row(str(file), label, f"{probability:.1%}")
    _console(json).print(table)
    _emit({str(file): row for file, row in zip(files, rows, strict=True)}, json)
    return 0


@app.command
def caption(
    paths: Positional[tuple[Path, ...]],
    model: Path,
    num_beams: int = 3,
    device: Device = "auto",
    json: bool = False,
) -> int:
    """Say in words what each file sounds like.

    Example: slap-fast caption --model runs/my/best a.wav b.mp3

    Args:
        paths: Audio files and folders.
        model: A model's folder, or a run's: its best checkpoint.
        num_beams: Hypotheses kept; 1 is greedy.
        device: Where to run.
        json: Print {path: caption} as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.data.manifest import audio_files
    from slap_fast.inference.slap import Slap

    files = [file for path in paths for file in audio_files(path)]
    slap = Slap.from_pretrained(model, device=_device(device))
    captions = slap.caption(files, num_beams=num_beams)
    table = Table("file", "caption")
    for file, text in zip(files, captions, strict=True):
        table.add_row(str(file), text)
    _console(json).print(table)
    _emit({str(file): text for file, text in zip(files, captions, strict=True)}, json)
    return 0


@app.command
def export(model: Path, out: Path = Path("slap.onnx"), json: bool = False) -> int:
    """Write a model's audio tower as an ONNX file or a torch.export program.

    It takes a waveform of any length and gives its embedding, as the model does: that is checked
    before it is written.

    Example: slap-fast export --model runs/my/best --out slap.onnx

    Args:
        model: A model's folder, or a run's: its best checkpoint.
        out: The file to write; its name ends in .onnx or .pt2.
        json: Print what was written as JSON on stdout.
    """
    from slap_fast import checkpoint
    from slap_fast.interop import export

    slap, _, _ = checkpoint.read_model(model)
    difference = export.export(slap.eval(), out)
    rate, size = slap.config.mel.sample_rate, slap.config.embed_dim or slap.config.audio.hidden_size
    _console(json).print(
        f"{out}: waveform [num_samples] float32 at {rate} Hz -> embedding [{size}], at most "
        f"{difference:.1e} from the model's"
    )
    _emit({"out": str(out), "sample_rate": rate, "embed_dim": size, "difference": difference}, json)
    return 0


@app.command
def export_weights(
    model: Path, out: Path, weights: Literal["student", "teacher"] = "student"
) -> int:
    """Write the student or the teacher of a run's checkpoint as a model folder of its own.

    The teacher is the moving average of the audio encoder; all else is the student's.

    Example: slap-fast export-weights --model runs/my/last --out my-model --weights teacher

    Args:
        model: A run's checkpoint, such as runs/my/last.
        out: The model folder to write.
        weights: Which of the two.
    """
    from slap_fast import checkpoint

    checkpoint.export(model, out, weights)
    _console(False).print(f"model: {out}")
    return 0


@app.command
def plan(
    gpu: str,
    config: str = "base",
    settings: Annotated[
        UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")
    ] = (),
    json: bool = False,
) -> int:
    """How much of a GPU's memory a run would take, and the largest batch that fits: an estimate.

    Example: slap-fast plan --gpu 24GB --config base

    Args:
        gpu: Its memory, such as 24GB or 80GiB.
        config: A recipe (tiny, base) or a YAML file of settings.
        settings: Any other setting by its dotted name, such as compile=true; repeatable.
        json: Print the plan as JSON on stdout.
    """
    from slap_fast.config import override
    from slap_fast.diagnostics import memory as plans

    memory = plans.memory_of(gpu)
    found = plans.plan(override(_recipe(config), dict(map(_setting, settings))), memory)
    plans.render(found, _console(json))
    _emit(found, json)
    return 0


@app.command
def doctor(parity: bool = False, json: bool = False) -> int:
    """What is installed, what runs where, and what to do about the rest.

    Example: slap-fast doctor --parity

    Args:
        parity: Also run the kernels against the reference on this device, error beside tolerance.
        json: Print the report as JSON on stdout.
    """
    from slap_fast.diagnostics import doctor as checks

    report = checks.report()
    if parity:
        report = checks.parity(report)
    if not json:
        checks.render(report)
    _emit(report, json)
    return checks.exit_code(report)


@app.command
def bench(
    steps: Positional[tuple[str, ...]] = (),
    out: Path = Path("runs/bench"),
    minutes: float = 9.5,
    wheels: Path | None = None,
    again: bool = False,
    dry_run: bool = False,
) -> int:
    """Time what this machine runs beside its peers; in a checkout of the repository.

    The same as make bench. Checks everything before it is timed; goes on where it was cut off.

    Example: slap-fast bench mel attention

    Args:
        steps: Which; by default all. A name that is not one shows them.
        out: Folder for the JSON records and suite.log.
        minutes: A step that would pass this is stopped.
        wheels: A folder of peers to install first, with no network.
        again: Also run what is done.
        dry_run: Every step, tiny, on any machine.
    """
    import subprocess

    if not SUITE.is_file():
        raise ValueError(
            f"bench: found no {SUITE}, expected a checkout of the repository, installed by "
            "pip install -e . (a wheel holds no benchmarks)"
        )
    command = [
        sys.executable,
        "-m",
        "benchmarks.suite",
        *steps,
        "--out",
        str(out),
        "--minutes",
        str(minutes),
    ]
    command += ["--wheels", str(wheels)] if wheels else []
    command += ["--again"] * again + ["--dry-run"] * dry_run
    paths = [str(SUITE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment).returncode


def _recipe(name: str) -> TrainConfig:
    import yaml

    from slap_fast.config import RECIPES, TrainConfig, from_dict

    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--config: found {name!r}, expected one of {', '.join(RECIPES)} or a YAML file"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return from_dict(TrainConfig, values)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set: found {text!r}, expected KEY=VALUE, such as loss.ssl=0")
    return key.strip(), value.strip()


def _device(name: Device) -> torch.device:
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has[name]:
        raise ValueError(f"--device: {name} is not available here; slap-fast doctor says what is")
    return torch.device(name)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a user's mistake is one line on stderr."""
    # OpenMP's threads spin while they wait. Of slap_tiny on 2 cores that are free, a step takes
    # 0.6 s however they wait, or 0.9 s if they sleep at once; beside one other busy process it
    # takes over 10 s if they spin as long as they like, and 1.8 s with this. Read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return app.cli(
            prog="slap-fast",
            description="Scalable language-audio pretraining (arXiv 2601.12594), fast.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"slap-fast: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        print(
            "slap-fast: error: out of memory; lower --max-tokens (a larger batch is then split and "
            f"its gradients accumulated): {str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1


def _out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text
