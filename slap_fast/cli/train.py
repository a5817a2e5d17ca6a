"""``slap-fast train``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from slap_fast.cli.inputs import bad_row_lines
from slap_fast.cli.options import (
    Device,
    Settings,
    config_text,
    load_recipe,
    parse_setting,
    torch_device,
)
from slap_fast.config.bounds import CountOrZero, Positive
from slap_fast.console import emit, make_console, show_progress

if TYPE_CHECKING:
    from slap_fast.config import TrainConfig

Resume = Annotated[tuple[Literal["auto"], ...] | None, arg(metavar="[auto]")]
"""None: a new run; ("auto",): a new one, or the one in --out; (): that one."""


def train(
    data: str | None = None,
    config: str | None = None,
    out: Path = Path("runs/slap"),
    split: str | None = None,
    init: Path | None = None,
    resume: Resume = None,
    device: Device = "auto",
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    workers: CountOrZero = 2,
    rank_timeout: Positive = 600.0,
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

    best/ is the checkpoint of the highest validation score: the mean of R@1, R@5 and R@10, text to
    audio and back. Where the data has no validation split, every tenth file is held out for it.

    Args:
        data: A JSONL or CSV manifest (path, caption), a folder of audio with captions beside it, a
            folder of shards, a YAML file that mixes several by weight, or "builtin", the default.
        config: A recipe (tiny, base) or a YAML file of settings; tiny by default.
        out: Folder for checkpoints, metrics and logs.
        split: Rows to train on; by default those of split "train" where there is one.
        init: Start from the weights of this model or run, with a new schedule (fine-tuning).
            Settings of the model that keep its tensors' shapes can be changed.
        resume: Go on with the run in --out, exactly where it stopped; its settings come from there.
            With it, --data (moved), --device, --workers, --precision, --max-tokens and a few
            settings act, steps among them: more of them extend a run. "--resume auto" starts the
            run where there is none yet, so that one command does for a restart policy.
        precision: Of the matrix products.
        seed: Of weights, order, crops and masks.
        max_tokens: Most audio tokens (25 a second) in one forward pass; lower it when memory runs
            out.
        workers: Processes that decode, for each rank.
        rank_timeout: Under torchrun, seconds that a rank waits for the others before it gives up;
            rank 0's evaluations have to fit.
        tokenizer: A tokenizer.json, its folder or a hub id; by default the pretrained text tower's,
            or the bundled one.
        tensorboard: Also write TensorBoard events.
        print_config: Print what would run, as a YAML file that --config takes, and run nothing.
        json: Print the final card as JSON on stdout.
    """
    from slap_fast import distributed
    from slap_fast.checkpoint.format import read_json
    from slap_fast.checkpoint.model import read_model
    from slap_fast.data.audio.isolated import IsolatedDecoder
    from slap_fast.data.fingerprint import fingerprint
    from slap_fast.data.splits import training_data
    from slap_fast.evaluation.card import evaluate, score
    from slap_fast.evaluation.table import render
    from slap_fast.inference.slap import Slap
    from slap_fast.training import loop
    from slap_fast.training.run_log import left_out
    from slap_fast.training.settings import describe_changes, resumed
    from slap_fast.training.state import begin, check_tokenizer, describe, go_on
    from slap_fast.training.stop_rules import RunStopped
    from slap_fast.training.stored_run import edits, stored_config, stored_run

    has_run = any((out / name).exists() for name in ("run.json", "last", "last.old"))
    goes_on = resume is not None and (has_run or not resume)
    if resume is None and has_run:
        raise ValueError(f"--out: {out} already holds a run; add --resume or choose another folder")
    if goes_on and not has_run:
        raise ValueError(f"--resume: found no run in {out}, expected one; --resume auto starts it")
    changes = dict(parse_setting(text) for text in settings)
    flags = {"precision": precision, "seed": seed, "max_tokens": max_tokens}
    changes |= {key: value for key, value in flags.items() if value is not None}
    if print_config:
        given = (
            stored_config(stored_run(out)[0]) if goes_on else _config(config, changes, bool(init))
        )
        if init and not goes_on:
            given = replace(given, model=read_model(init)[0].config)
        print(config_text(given), end="")
        return 0
    device_here, notes, folder = torch_device(device), [], None
    plan = {"data": data or "builtin", "split": split, "tokenizer": tokenizer}
    plan |= {"init": init and str(init), "hold_out": True}
    with distributed.process_group(rank_timeout, device_here):
        if goes_on:
            stored, folder = stored_run(out)
            notes = [note for note in [edits(out, stored, folder)] if note]
            plan, run_config = dict(stored["plan"]), stored_config(stored)
            _refuse_others(plan, {"split": split, "init": init and str(init)})
            plan["data"] = data or plan["data"]
            step = read_json(folder / "training.json")["step"] if folder else 0
            given = _given(config, changes, has_init=plan["init"] is not None)
            run_config = resumed(run_config, given, step)
            notes += describe_changes(stored_config(stored), run_config, step)
        else:
            given = _given(config, changes, has_init=init is not None)
            run_config = _config(config, changes, has_init=init is not None)
        if folder:
            state, text_tokenizer = go_on(run_config, folder, device_here)
        else:
            of_model = {
                key.removeprefix("model."): value
                for key, value in given.items()
                if key.startswith("model.")
            }
            start = run_config, plan["tokenizer"], plan["init"], device_here
            state, text_tokenizer = begin(*start, of_model)
        if goes_on and tokenizer is not None:
            check_tokenizer(tokenizer, text_tokenizer, f"the run in {out}")
        _check_settings(state.config, changes)
        sources = training_data(
            plan["data"],
            plan["split"],
            hold_out=plan.get("hold_out", False),
            sample_rate=state.config.model.mel.sample_rate,
            min_seconds=state.config.data.min_seconds,
            decoder=IsolatedDecoder(),
            bad=(bad_rows := []),
        )
        notes += bad_row_lines(bad_rows)
        lead = distributed.rank() == 0
        console = make_console(json, quiet=not lead)
        if lead:
            before, plan["fingerprint"] = plan.get("fingerprint"), fingerprint(sources.train)
            if before not in (None, plan["fingerprint"]):
                notes.append(_changed_data(before, plan["fingerprint"]))
        for note in notes:
            console.print(note)
        console.print(describe(state, sources.train))
        console.print(_validation(sources))

        def validation_card(model: Any) -> dict[str, Any]:
            card = evaluate(Slap(model, text_tokenizer), sources.validation, captions=False)
            # Without any clip the loop stops the run.
            figure = score(card) if card["n"] else None
            return {**card, "clips": sources.validated_on, "score": figure}

        try:
            finished = loop.train(
                state,
                sources.train,
                text_tokenizer,
                out,
                invocation=plan,
                workers=workers,
                evaluate=validation_card,
                progress=lead and show_progress(json),
                tensorboard=tensorboard,
            )
        except RunStopped as stopped:
            if lead:
                print(f"slap-fast: stopped: {stopped} (--out {out})", file=sys.stderr)
            return 1
    if not finished:
        console.print(
            f"stopped at step {state.step}; go on with: slap-fast train --out {out} --resume"
        )
        return 130
    if lead:
        card = read_json(out / "last" / "card.json")
        render(card, console)
        if names := left_out(out):
            console.print(_left_out(names, out))
        best = read_json(out / "best" / "training.json")["step"]
        console.print(
            f"model: {out / 'best'}, of step {best}: score {state.best:.3f}, the mean of R@1, R@5 "
            "and R@10, text to audio and back"
        )
        emit(card, json)
    return 0


def _config(config: str | None, changes: Mapping[str, Any], has_init: bool) -> TrainConfig:
    """The config of a new run; with --init its model is that one's, and set there."""
    own = {k: v for k, v in changes.items() if not (has_init and k.startswith("model."))}
    return load_recipe(config or "tiny", own)


def _given(config: str | None, changes: Mapping[str, Any], has_init: bool) -> dict[str, Any]:
    """The settings that the command line names, by dotted key: of --config, then of --set.

    With --init a YAML file names those of its own lines, but not the model of a recipe it is on.
    """
    import yaml

    from slap_fast.config import RECIPES
    from slap_fast.training.settings import flat

    if config is None:
        return dict(changes)
    given = flat(load_recipe(config, quiet=True))
    if has_init and config not in RECIPES:
        named = yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("model", {})
        model = flat(named, "model.")
        given = {k: v for k, v in given.items() if not k.startswith("model.") or k in model}
    return given | changes


def _refuse_others(plan: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError for an option beside --resume that the run was not started with."""
    for name, value in given.items():
        if value is not None and value != plan[name]:
            raise ValueError(
                f"--{name}: found {value}, expected {plan[name]}, which the run was started with; "
                "--resume cannot change it"
            )


def _check_settings(config: TrainConfig, changes: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that --set names and the run does not have."""
    from slap_fast.config import override
    from slap_fast.training.settings import changed

    for key, (own, asked) in changed(config, override(config, dict(changes))).items():
        raise ValueError(
            f"{key}: found {asked!r}, expected {own!r}, which model.text.pretrained brings along"
        )


def _changed_data(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """One line about training data that is not what the run was started with."""
    old, new = (f"{x['clips']} clips, {x['seconds'] / 3600:.2f} h" for x in (before, after))
    what = f"{old} before, {new} now" if old != new else f"{new}, other names, captions or lengths"
    return f"data: changed since the run was started or last resumed: {what}"


def _validation(sources: Any) -> str:
    """One line about what the validation is on."""
    size = f"validation: {len(sources.validation)} clips"
    return {
        "validation split": size,
        "held-out clips": f"{size}, held out of training, as the data has no validation split",
        "training clips": f"{size} that are also trained on, as the data has no validation split "
        "and too few files to hold any out: its figures say nothing about other sounds",
    }.get(sources.validated_on, f"{size}: {sources.validated_on}")


def _left_out(names: Mapping[str, str], out: Path) -> str:
    """The clips that could not be used, the first ten by name."""
    first = ", ".join(f"{name} ({code})" for name, code in list(names.items())[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    clips = "clip was" if len(names) == 1 else "clips were"
    return f"{len(names)} {clips} left out: {first}{more}; see {out / 'bad_clips.jsonl'}"
