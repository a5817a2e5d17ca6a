"""``slap-fast train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from slap_fast.cli.options import (
    Config,
    Device,
    Settings,
    config_text,
    load_recipe,
    parse_setting,
    torch_device,
)
from slap_fast.console import emit, make_console, show_progress


def train(
    data: str = "builtin",
    config: Config = "tiny",
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
    settings: Settings = (),
    tokenizer: str | None = None,
    tensorboard: bool = False,
    print_config: bool = False,
    json: bool = False,
) -> int:
    """Train on a manifest, a folder, or the built-in sounds.

    Example: slap-fast train --data my/manifest.csv --config tiny --out runs/my

    Ablations: --set loss.ssl=0 --set loss.caption=0 trains the contrastive loss alone;
    --set model.audio.global_every=1 makes every layer global.

    Args:
        data: A JSONL or CSV manifest (path, caption), a folder of audio with captions beside it, a
            folder of shards, a YAML file that mixes several by weight, or "builtin".
        out: Folder for checkpoints, metrics and logs.
        split: Rows to train on; by default those of split "train" where there is one.
        init: Start from the weights of this model or run, with a new schedule (fine-tuning).
        resume: Go on with the run in --out, exactly where it stopped; its settings come from there.
        precision: Of the matrix products.
        seed: Of weights, order, crops and masks.
        max_tokens: Most audio tokens (25 a second) in one forward pass; fewer take less memory.
        workers: Processes that decode, for each rank.
        rank_timeout: Under torchrun, seconds that a rank waits for the others before it gives up;
            rank 0's evaluations have to fit.
        tokenizer: A tokenizer.json, its folder or hub id; else the pretrained text tower's or ours.
        tensorboard: Also write TensorBoard events.
        print_config: Print what would run, as a YAML file that --config takes, and run nothing.
        json: Print the final card as JSON on stdout.
    """
    from slap_fast import distributed
    from slap_fast.checkpoint.format import read_json
    from slap_fast.checkpoint.model import read_model
    from slap_fast.data.audio.isolated import IsolatedDecoder
    from slap_fast.data.open import open_source
    from slap_fast.evaluation.card import evaluate, score
    from slap_fast.evaluation.table import render
    from slap_fast.inference.slap import Slap
    from slap_fast.training import loop
    from slap_fast.training.state import begin, describe, restore, stored_config, stored_run

    if resume and (settings or init or seed is not None or precision is not None):
        mistake = "found other settings beside it, expected none: a run keeps its own"
        raise ValueError(f"--resume: {mistake}")
    changes = dict(map(parse_setting, settings))
    flags = {"precision": precision, "seed": seed, "max_tokens": max_tokens}
    changes |= {key: value for key, value in flags.items() if value is not None}
    if print_config:
        run_config = stored_config(stored_run(out)[0]) if resume else load_recipe(config, changes)
        if init and not resume:
            run_config = replace(run_config, model=read_model(init)[0].config)
        print(config_text(run_config), end="")
        return 0
    if not resume and (out / "run.json").exists():
        raise ValueError(f"--out: {out} already holds a run; add --resume or choose another folder")
    folder = None
    invocation = {"data": data, "split": split, "tokenizer": tokenizer, "init": init and str(init)}
    run_device = torch_device(device)
    with distributed.process_group(rank_timeout, run_device):
        if resume:
            stored, folder = stored_run(out)
            invocation, run_config = stored["plan"], stored_config(stored)
        else:
            run_config = load_recipe(config, changes)
        data, split, decoder = invocation["data"], invocation["split"], IsolatedDecoder()
        initial = None if folder else invocation.get("init")
        state, text_tokenizer = begin(run_config, invocation["tokenizer"], initial, run_device)
        rate, shortest = state.config.model.mel.sample_rate, state.config.data.min_seconds
        options = {"sample_rate": rate, "min_seconds": shortest, "decoder": decoder}
        source = open_source(data, split, fallback="train", **options)
        validation = open_source(data, None, fallback="validation", sample_rate=rate)
        if folder:
            restore(state, folder)
        lead = distributed.rank() == 0
        console = make_console(json, quiet=not lead)
        console.print(describe(state, source))

        def validation_card(model: Any) -> dict[str, Any]:
            card = evaluate(Slap(model, text_tokenizer), validation, captions=False)
            return {**card, "score": score(card)}

        finished = loop.train(
            state,
            source,
            text_tokenizer,
            out,
            invocation=invocation,
            workers=workers,
            evaluate=validation_card,
            progress=lead and show_progress(json),
            tensorboard=tensorboard,
        )
    if not finished:
        resumption = f"slap-fast train --out {out} --resume"
        console.print(f"stopped at step {state.step}; go on with: {resumption}")
        return 130
    if lead:
        card = read_json(out / "last" / "card.json")
        render(card, console)
        console.print(f"model: {out / 'best'}")
        emit(card, json)
    return 0
