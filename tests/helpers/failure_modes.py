"""Failure modes of kernels like ours, and the tests that guard against each.

A test id means that test with all its parameters. ``python -m tests.helpers.failure_modes``
writes docs/failure_modes.md from this table.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.helpers.paths import ROOT

ATTENTION = "tests/kernels/test_attention.py"
AUTOGRAD = "tests/kernels/test_attention_autograd.py"
LAYOUTS = "tests/kernels/test_attention_layouts.py"
LAUNCHES = "tests/kernels/test_attention_launches.py"
SAFETY = "tests/kernels/test_attention_safety.py"
OPS = "tests/ops/test_ops.py"
MODEL = "tests/models/test_slap_triton.py"
GPU = "needs a GPU"
"""In place of a test: only a GPU can show it."""
ABSENT = "nothing is autotuned"
"""In place of a test: the package does not do it."""

PAGE = ROOT / "docs" / "failure_modes.md"


class FailureMode(NamedTuple):
    effect: str
    """What goes wrong."""
    tests: list[str]


FAILURE_MODES = {
    "fully masked row": FailureMode(
        "softmax divides 0 by 0; NaN gradients reach the projection the whole batch shares",
        [f"{ATTENTION}::test_fully_masked_rows", f"{ATTENTION}::test_windows"],
    ),
    "tail keys in the backward": FailureMode(
        "keys past the sequence's end are masked forward but not backward: NaN in dq",
        [f"{ATTENTION}::test_lengths_about_a_block", f"{ATTENTION}::test_cross"],
    ),
    "overflow at masked positions": FailureMode(
        "the backward recomputes exp of a masked score, which overflows",
        [f"{ATTENTION}::test_large_scores_do_not_overflow"],
    ),
    "tile before the window": FailureMode(
        "every key of a tile is masked: exp(-inf - -inf) in the online softmax",
        [f"{ATTENTION}::test_windows", f"{ATTENTION}::test_cross"],
    ),
    "window off by one": FailureMode(
        "a bound is exclusive, or -1 (open) is taken as a distance",
        [f"{ATTENTION}::test_exact_mask_by_one_hot_values", f"{ATTENTION}::test_windows"],
    ),
    "backward mask": FailureMode(
        "the backward's mask differs from the forward's",
        [f"{ATTENTION}::test_windows", f"{ATTENTION}::test_causal"],
    ),
    "half-precision statistics": FailureMode(
        "lse or scaled scores overflow in fp16",
        [f"{ATTENTION}::test_large_scores_do_not_overflow"],
    ),
    "unmasked writes": FailureMode(
        "stores or atomics past the end of a tensor",
        [f"{SAFETY}::test_guard_pages", f"{ATTENTION}::test_windows"],
    ),
    "empty sequence": FailureMode(
        "length 0 gives NaN gradients, writes out of bounds or a wrong shape",
        [f"{ATTENTION}::test_empty_sequences_anywhere", f"{ATTENTION}::test_fully_masked_rows"],
    ),
    "empty pack": FailureMode(
        "no token or no sequence: division by zero, or a grid of size 0",
        [
            f"{ATTENTION}::test_no_tokens_or_sequences",
            f"{OPS}::test_no_tokens_or_sequences_are_legal",
        ],
    ),
    "rows past the last sequence": FailureMode(
        "their outputs or gradients stay uninitialised",
        [f"{ATTENTION}::test_windows", f"{ATTENTION}::test_no_tokens_or_sequences"],
    ),
    "leak between sequences": FailureMode(
        "a sequence attends to its neighbour in the pack",
        [
            f"{SAFETY}::test_neighbours_change_nothing",
            f"{MODEL}::test_packed_equals_one_clip_at_a_time",
        ],
    ),
    "cu_seqlens past the tokens": FailureMode(
        "cu_seqlens claims more tokens than there are: reads out of bounds",
        [f"{OPS}::test_attention_refuses", f"{SAFETY}::test_invalid_cu_seqlens_stay_in_bounds"],
    ),
    "batch dimension beside cu_seqlens": FailureMode(
        "a batched tensor with cu_seqlens is accepted and gives wrong gradients",
        [f"{OPS}::test_attention_refuses"],
    ),
    "offsets of two kernels": FailureMode(
        "two kernels of one call disagree on padded offsets; zeroed memory hides it",
        [f"{SAFETY}::test_calls_in_any_order_have_the_same_bits"],
    ),
    "launch grid": FailureMode(
        "wrong grid or chunk index for many short sequences and a long one",
        [f"{ATTENTION}::test_one_sequence_of_many", f"{LAUNCHES}::test_schedule"],
    ),
    "packed positions": FailureMode(
        "rotary positions are not reset per sequence, rounded, or their axes swapped",
        [f"{SAFETY}::test_neighbours_change_nothing", "tests/reference/test_rope.py"],
    ),
    "block boundaries": FailureMode(
        "the first or last tile of a sequence reads out of bounds",
        [f"{SAFETY}::test_guard_pages", f"{ATTENTION}::test_lengths_about_a_block"],
    ),
    "int32 offsets": FailureMode(
        "an offset past 2^31 elements wraps to another address",
        [f"{SAFETY}::test_strides_past_2_31", f"{SAFETY}::test_results_past_2_31"],
    ),
    "grid limits": FailureMode(
        "more than 65,535 programs on an axis that has no more",
        [f"{SAFETY}::test_more_than_65535_sequences"],
    ),
    "non-contiguous gradients": FailureMode(
        "one tensor's strides are used for another's",
        [f"{LAYOUTS}::test_layouts_of_the_gradients", f"{LAYOUTS}::test_layouts_of_the_inputs"],
    ),
    "expanded inputs": FailureMode(
        "stride 0, or a compiled kernel reused for another layout",
        [f"{LAYOUTS}::test_layouts_of_the_inputs"],
    ),
    "misaligned storage": FailureMode(
        "a kernel specialised for aligned pointers is called with others",
        [f"{LAYOUTS}::test_misaligned_after_aligned"],
    ),
    "state kept between calls": FailureMode(
        "accumulators or semaphores are not reset",
        [f"{SAFETY}::test_calls_in_any_order_have_the_same_bits"],
    ),
    "use after free": FailureMode(
        "the caching allocator hides it",
        [GPU],
    ),
    "large strides on the host": FailureMode(
        "a stride does not fit the integer of the launcher",
        [f"{SAFETY}::test_strides_past_2_31"],
    ),
    "C++ extension": FailureMode(
        "data races, undefined casts and exceptions in threads of mel_patches",
        [
            "tests/csrc/test_sanitizers.py",
            "tests/ops/test_mel_cpp.py::test_runs_beside_other_threads",
        ],
    ),
    "races between warps": FailureMode(
        "a missing barrier for some head sizes or numbers of warps",
        [GPU],
    ),
    "atomics": FailureMode(
        "sums in the order of programs differ from run to run",
        [f"{SAFETY}::test_the_order_of_programs_changes_nothing"],
    ),
    "batch invariance": FailureMode(
        "a sequence's bits depend on its neighbours",
        [f"{SAFETY}::test_neighbours_change_nothing"],
    ),
    "shared-memory aliasing": FailureMode(
        "a result is wrong for one number of pipeline stages",
        [GPU],
    ),
    "wrong launch setting": FailureMode(
        "one row of the table of settings gives wrong results",
        [f"{LAUNCHES}::test_every_setting_of_the_table"],
    ),
    "autotuning": FailureMode(
        "outputs accumulate over the trials of an autotuner",
        [ABSENT],
    ),
    "recompilation": FailureMode(
        "a cache key changes from pack to pack: compiles again and again, or reuses a wrong kernel",
        [f"{AUTOGRAD}::test_many_packs_compile_without_graph_breaks_and_at_most_twice"],
    ),
    "compile cache of several ranks": FailureMode(
        "ranks race for one cache, or one takes another's kernel",
        [GPU],
    ),
    "CUDA graphs": FailureMode(
        "capture fails, or the replay differs",
        [f"{LAUNCHES}::test_cuda_graph"],
    ),
    "torch.compile": FailureMode(
        "graph breaks, or results that differ from eager",
        [f"{AUTOGRAD}::test_many_packs_compile_without_graph_breaks_and_at_most_twice"],
    ),
    "current device": FailureMode(
        "a kernel is launched on the current device, not on the tensors'",
        [f"{LAUNCHES}::test_the_launches_are_on_the_tensors_device"],
    ),
    "stream": FailureMode(
        "a kernel does not run on the current stream",
        [GPU],
    ),
    "TF32": FailureMode(
        "fp32 products are rounded to TF32",
        [f"{ATTENTION}::test_windows"],
    ),
    "interpreter and GPU": FailureMode(
        "the interpreter is right where the GPU is wrong",
        [GPU],
    ),
    "version drift": FailureMode(
        "another version of torch or Triton changes the losses' bits",
        ["tests/training/test_golden.py"],
    ),
    "upstream gradients": FailureMode(
        "only one element of a non-uniform upstream gradient is used",
        [f"{ATTENTION}::test_windows", f"{LAYOUTS}::test_layouts_of_the_gradients"],
    ),
    "gradients in place": FailureMode(
        "the backward overwrites inputs or accumulated gradients",
        [f"{AUTOGRAD}::test_gradients_accumulate_and_inputs_stay"],
    ),
    "some outputs without gradient": FailureMode(
        "only the lse, or only the output, has a gradient",
        [f"{AUTOGRAD}::test_some_outputs_have_gradients"],
    ),
    "autograd modes": FailureMode(
        "double backward, no_grad, checkpointing or a subset of inputs is wrong without an error",
        [
            f"{AUTOGRAD}::test_twice_differentiated_is_an_error",
            f"{AUTOGRAD}::test_some_inputs_require_gradients",
            f"{AUTOGRAD}::test_checkpointing_and_no_grad",
        ],
    ),
    "autocast": FailureMode(
        "autocast casts inside the operation, or disagrees with checkpointing",
        [f"{AUTOGRAD}::test_autocast_leaves_the_operation_alone"],
    ),
    "head dimensions": FailureMode(
        "not a power of two or a multiple of 16; shared key heads",
        [f"{ATTENTION}::test_head_dims", f"{ATTENTION}::test_shared_keys"],
    ),
}

INTRODUCTION = """\
# Failure modes

What goes wrong in packed attention, pooling and mel kernels, collected from the issue trackers of
FlashAttention, flash-linear-attention, xFormers, Liger, Triton and PyTorch, and the tests that
guard against it here. `python -m tests.helpers.failure_modes` writes this page.

| failure mode | what goes wrong | tests |
| --- | --- | --- |
"""


def page() -> str:
    """docs/failure_modes.md."""
    rows = (
        f"| {name} | {mode.effect} | {'<br>'.join(map(_cell, mode.tests))} |\n"
        for name, mode in FAILURE_MODES.items()
    )
    return INTRODUCTION + "".join(rows)


def _cell(test: str) -> str:
    return test if test in (GPU, ABSENT) else f"`{test.removeprefix('tests/')}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
