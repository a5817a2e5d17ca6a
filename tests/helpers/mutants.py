"""Mutants: bugs planted one at a time in a copy of the package, and the test that must catch each.

``python -m tests.helpers.mutants FOLDER [WORD]`` copies the package to FOLDER and prints pytest's
exit codes as JSON: first that of all the tests on the unchanged copy, then that of each mutant.
WORD selects the mutants whose file or test contains it. Every pytest is a fork of one process,
so that what takes long to import is imported once.
"""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from tests.helpers.paths import ROOT

LENGTHS = "kernels/test_attention.py::test_lengths_about_a_block"
ONE_HOT = "kernels/test_attention.py::test_exact_mask_by_one_hot_values"
NO_KEY = "kernels/test_attention.py::test_fully_masked_rows[tiled-some]"
FAR = "kernels/test_attention_safety.py::test_strides_past_2_31[rows-tiled]"
POOL = "kernels/test_map_pool.py::test_forward_and_gradients[torch.float32-100-3]"
MEAN = "kernels/test_map_pool.py::test_a_large_mean_of_x_does_not_swamp_the_gradient[torch.float16]"
CAPTION = "losses/test_captioning.py::TestCaption"
DISTILLATION = "losses/test_self_distillation.py"
STEP = "training/test_step.py"
SCHEDULED_STEP = f"{STEP}::test_a_step_uses_the_scheduled_temperatures_and_teacher_momentum"
SCHEDULED = f"{SCHEDULED_STEP}[sinkhorn-2-0.06-0.925]"


class Mutant(NamedTuple):
    """One bug: ``old`` becomes ``new``, and the test must fail."""

    path: str
    """From the top of the checkout."""
    old: str
    """Occurs once in that file."""
    new: str
    test: str
    """Id from ``tests/``: one test, or all of a class."""


MUTANTS = [
    # Masks and windows.
    Mutant("kernels/attention.py", "& (j < len_k)", "& (j <= len_k)", f"{LENGTHS}[whole-17]"),
    Mutant(
        "kernels/attention.py",
        "(distance <= right)",
        "(distance < right)",
        f"{ONE_HOT}[whole-(31, 32)]",
    ),
    Mutant(
        "kernels/attention.py",
        "(distance >= -left)",
        "(distance > -left)",
        f"{ONE_HOT}[tiled-(31, 32)]",
    ),
    Mutant(
        "kernels/attention.py",
        "position + BLOCK + after",
        "position + after",
        f"{ONE_HOT}[tiled-(31, 32)]",
    ),
    Mutant(
        "kernels/attention.py",
        "            p = tl.where(seen, p, 0.0)\n            dv +=",
        "            dv +=",
        f"{LENGTHS}[tiled-65]",
    ),
    Mutant(
        "kernels/map_pool.py",
        "tl.where(rows < stop, tl.exp(s - lse[:, None]), 0.0)",
        "tl.exp(s - lse[:, None])",
        POOL,
    ),
    # The softmax and its gradient.
    Mutant(
        "kernels/attention.py", "acc * rescale[:, None] + dot", "acc + dot", f"{LENGTHS}[tiled-129]"
    ),
    Mutant(
        "kernels/attention.py",
        'tl.where(new_high == float("-inf"), 0.0, new_high)',
        "new_high",
        NO_KEY,
    ),
    Mutant(
        "kernels/attention.py",
        "dk_stride, rows_k, valid_k, dk * scale,",
        "dk_stride, rows_k, valid_k, dk,",
        f"{LENGTHS}[tiled-65]",
    ),
    Mutant(
        "kernels/attention.py",
        "delta -= tl.load(dlse_ptr",
        "delta += tl.load(dlse_ptr",
        f"{LENGTHS}[tiled-65]",
    ),
    Mutant("kernels/map_pool.py", "(before[j] - ds_sum[:, None] * pooled,)", "(before[j],)", MEAN),
    # Rows, heads, addresses, positions.
    Mutant(
        "kernels/attention.py",
        "end = tl.maximum(tl.load(cu_ptr + num_sequences), 0)",
        "end = total",
        "kernels/test_attention.py::test_no_tokens_or_sequences[tiled-7]",
    ),
    Mutant(
        "kernels/attention.py",
        "head_kv * GROUP + member",
        "head_kv * GROUP",
        "kernels/test_attention.py::test_shared_keys[tiled-gqa-q_k_v]",
    ),
    Mutant("kernels/attention.py", "begin_k.to(tl.int64)", "begin_k", FAR),
    Mutant(
        "kernels/attention.py",
        "right=True",
        "right=False",
        "kernels/test_attention_launches.py::test_schedule",
    ),
    Mutant(
        "slap_fast/ops/validation.py",
        "not torch.equal(schedule, make())",
        "False",
        "kernels/test_attention_launches.py::test_a_schedule_of_other_sequences_is_refused",
    ),
    Mutant(
        "kernels/_packed.py",
        "lower * cos + upper * sin)",
        "lower * cos - upper * sin)",
        f"{LENGTHS}[tiled-65]",
    ),
    Mutant(
        "slap_fast/reference/rope.py",
        "coords.double()[",
        "coords.double().flip(1)[",
        "reference/test_rope.py::test_tables_entry_by_entry[2d-theta1e4]",
    ),
    # Losses, the teacher, ranks.
    Mutant(
        "slap_fast/losses/contrastive.py",
        "logit_scale * rows,",
        "rows,",
        "losses/test_contrastive.py::TestFormulas::test_contrastive[no_groups]",
    ),
    Mutant(
        "slap_fast/losses/captioning.py",
        "(labels != ignore_index).sum()",
        "labels.new_tensor(len(labels))",
        CAPTION,
    ),
    Mutant(
        "slap_fast/losses/self_distillation.py",
        "sub_(bias).log_softmax(1)",
        "sub_(bias)",
        f"{DISTILLATION}::TestTargets::test_sinkhorn_marginals",
    ),
    Mutant(
        "slap_fast/losses/chunked.py",
        ".sub_(teacher_probs).div_(student_temperature)",
        ".sub_(teacher_probs)",
        f"{DISTILLATION}::TestSelfDistillation",
    ),
    Mutant(
        "slap_fast/losses/chunked.py",
        "logits.mul_(counts / total)",
        "logits.div_(total)",
        CAPTION,
    ),
    Mutant(
        "slap_fast/models/slap.py",
        "trained)], 1.0 - momentum)",
        "trained)], momentum)",
        "models/test_slap.py::test_teacher_follows_the_student_by_its_momentum",
    ),
    Mutant(
        "slap_fast/distributed.py",
        "dist.all_reduce(grad)\n",
        "dist.all_reduce(grad)\n        grad /= world_size()\n",
        "training/test_distributed.py::test_losses_and_gradients_equal_those_of_one_rank[2]",
    ),
    # A step, and what a checkpoint keeps of a run.
    Mutant(
        "slap_fast/training/step.py",
        "clip_grad_norm_(trained, config.clip_grad_norm)",
        "clip_grad_norm_(trained, math.inf)",
        f"{STEP}::test_a_gradient_is_clipped_to_the_largest_norm",
    ),
    Mutant(
        "slap_fast/training/step.py",
        "for group in state.optimizer.param_groups:\n",
        "for group in state.optimizer.param_groups[:1]:\n",
        f"{STEP}::test_a_step_uses_the_scheduled_learning_rate[4-0.0055]",
    ),
    Mutant(
        "slap_fast/training/step.py",
        "len(batch.mask_indices), len(batch.labels)",
        "batch.masked_clips, len(batch.labels)",
        f"{STEP}::test_the_gradient_of_uneven_packs_is_that_of_one[ssl]",
    ),
    Mutant(
        "slap_fast/training/step.py",
        "teacher.update(model, ema_momentum(config, step))",
        "teacher.update(model, config.ema_momentum)",
        SCHEDULED,
    ),
    Mutant(
        "slap_fast/training/objective.py",
        "config.model.ssl.student_temperature",
        "temperature",
        SCHEDULED,
    ),
    Mutant(
        "slap_fast/training/grad_cache.py",
        "dloss.to(x.dtype) * x for x",
        "x for x",
        f"{STEP}::test_the_gradient_of_uneven_packs_is_that_of_one[weights]",
    ),
    Mutant(
        "slap_fast/training/state.py",
        '"step", "skipped", "evaluated"',
        '"step", "evaluated"',
        "training/test_resume.py::test_a_checkpoint_keeps_every_counter_and_the_random_numbers[0.25]",
    ),
    # Other people's models.
    Mutant(
        "slap_fast/interop/pretrained/clap.py",
        'return features["input_features"], features["is_longer"]',
        'return features["input_features"], ~features["is_longer"]',
        "interop/test_pretrained.py::test_vectors_are_those_of_its_own_pipeline",
    ),
    Mutant(
        "slap_fast/interop/pretrained/clap.py",
        "float(self.feature_extractor.max_length_s)",
        "2 * float(self.feature_extractor.max_length_s)",
        "interop/test_pretrained.py::test_a_longer_file_is_the_mean_of_its_windows",
    ),
    Mutant(
        "slap_fast/interop/pretrained/pe_audio.py",
        "output.hidden_states[-1]",
        "output.hidden_states[-2]",
        "interop/test_pretrained.py::test_vectors_are_those_of_its_own_pipeline",
    ),
    Mutant(
        "slap_fast/interop/pretrained/transformers_model.py",
        "            truncation=True,\n",
        "",
        "interop/test_pretrained.py::test_vectors_are_those_of_its_own_pipeline",
    ),
    Mutant(
        "slap_fast/inference/embedder.py",
        "mean = total / max(counts.pop(i, 0), 1)",
        "mean = total",
        "interop/test_pretrained.py::test_a_longer_file_is_the_mean_of_its_windows",
    ),
    # Words in and out.
    Mutant(
        "slap_fast/inference/embedder.py",
        "for text in templates for label in labels]",
        "for label in labels for text in templates]",
        "inference/test_slap.py::test_several_templates_are_the_mean_of_their_vectors",
    ),
    Mutant(
        "slap_fast/models/tokenizer.py",
        "*caption.ids[:room]",
        "*caption.ids[-room:]",
        "models/test_tokenizer.py::test_a_long_caption_keeps_its_first_words_and_the_start_and_end_tokens",
    ),
    # Third-party tars.
    Mutant(
        "slap_fast/data/shards/tar_members.py",
        "if any(rest):",
        "if not rest:",
        "data/shards/test_broken_tars.py::test_a_broken_tar_is_reported_once[a_header_of_zeros]",
    ),
    Mutant(
        "slap_fast/data/shards/import_tars.py",
        "if digest in first:",
        "if not first:",
        "data/shards/test_import_tars.py::test_a_key_in_two_tars_belongs_to_the_first",
    ),
]


def copy_package(folder: Path) -> None:
    """Copies the package as an installation has it, with ``kernels`` inside."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "slap_fast", folder / "slap_fast", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "slap_fast" / "kernels", ignore=ignored)
    # By hash: a bug of the same length in the same second must not run as the code before it.
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(folder, quiet=1, invalidation_mode=mode)


def plant(mutant: Mutant, folder: Path) -> tuple[Path, str]:
    """Writes the bug into the copy; returns the file and its text before."""
    path = folder / mutant.path.replace("kernels/", "slap_fast/kernels/", 1)
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, mutant
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return path, text


def exit_code(tests: list[str], folder: Path) -> int:
    """pytest's code of tests on the package in the folder: 1 if one failed, -n for signal n."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        # The copy before the checkout, where the tests are; ranks inherit this path.
        checkout = ("", str(ROOT))
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in checkout), str(ROOT)]
        import slap_fast

        assert Path(slap_fast.__file__).is_relative_to(folder), slap_fast.__file__
        paths = [str(ROOT / "tests" / test) for test in tests]
        options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        os._exit(pytest.main([*options, *paths]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, mutants: list[Mutant]) -> None:
    copy_package(folder)
    # A test that fails on the unchanged copy, or in this order, proves nothing about a mutant.
    codes = [exit_code(list(dict.fromkeys(mutant.test for mutant in mutants)), folder)]
    for mutant in mutants:
        path, text = plant(mutant, folder)
        codes.append(exit_code([mutant.test], folder))
        path.write_text(text, encoding="utf-8")
    print(json.dumps(codes))


if __name__ == "__main__":
    os.chdir(ROOT)
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes longer than a test
    sys.dont_write_bytecode = True
    import pytest
    import torch  # noqa: F401
    import triton  # noqa: F401
    from transformers.models.modernbert import modeling_modernbert  # noqa: F401

    target, *words = sys.argv[1:]
    main(Path(target), [m for m in MUTANTS if all(w in f"{m.path} {m.test}" for w in words)])
