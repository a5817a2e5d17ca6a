"""The student's or the teacher's weights of a run's checkpoint as a model of its own."""

from __future__ import annotations

from pathlib import Path

from slap_fast.checkpoint.format import TRAINING_FILES, find_model, read_tensors, verify
from slap_fast.checkpoint.model import load_tensors, read_model, write_model
from slap_fast.checkpoint.training import tensors_under
from slap_fast.models.slap import Teacher


def export_weights(folder: str | Path, out: Path, weights: str) -> None:
    """Writes one model of a run's checkpoint as a model folder of its own, without the optimiser.

    Args:
        folder: a checkpoint, such as ``runs/my/last``.
        out: the model folder.
        weights: ``"student"``, or ``"teacher"``: the audio encoder and the prototype head are the
            moving averages, all else is the student's, which alone has it.

    Raises:
        ValueError: another name, or a checkpoint without a teacher.
    """
    folder = find_model(folder)
    model, tokenizer, card = read_model(folder)
    if weights == "teacher":
        verify(folder, TRAINING_FILES)
        path = folder / "training.safetensors"
        tensors = tensors_under(read_tensors(path), "teacher.")
        if not tensors:
            raise ValueError(f"weights: {folder} has no teacher: its loss.ssl is 0")
        teacher = Teacher(model)
        load_tensors(teacher, tensors, path)
        model.audio_encoder, model.prototype_head = teacher.audio_encoder, teacher.prototype_head
    elif weights != "student":
        raise ValueError(f"weights: found {weights!r}, expected student or teacher")
    write_model(out, model, tokenizer, {**card, "weights": weights})
