"""Which tests guard which failure mode (reliability.md numbers them), 1 to 48.

A name stands for a test of that name with all its parameters. ``GPU`` marks what only a GPU can
show, ``ABSENT`` what the package does not do.
"""

ATTENTION = "tests/kernels/test_attention.py"
AUTOGRAD = "tests/kernels/test_attention_autograd.py"
LAYOUTS = "tests/kernels/test_attention_layouts.py"
LAUNCHES = "tests/kernels/test_attention_launches.py"
SAFETY = "tests/kernels/test_attention_safety.py"
OPS = "tests/ops/test_ops.py"
MODEL = "tests/models/test_slap_triton.py"
GPU = "needs a GPU"
ABSENT = "nothing is autotuned"

FAILURE_MODES = {
    1: [f"{ATTENTION}::test_fully_masked_rows", f"{ATTENTION}::test_windows"],
    2: [f"{ATTENTION}::test_lengths_about_a_block", f"{ATTENTION}::test_cross"],
    3: [f"{ATTENTION}::test_large_scores_do_not_overflow"],
    4: [f"{ATTENTION}::test_windows", f"{ATTENTION}::test_cross"],
    5: [f"{ATTENTION}::test_exact_mask_by_one_hot_values", f"{ATTENTION}::test_windows"],
    6: [f"{ATTENTION}::test_windows", f"{ATTENTION}::test_causal"],
    7: [f"{ATTENTION}::test_large_scores_do_not_overflow"],
    8: [f"{SAFETY}::test_guard_pages", f"{ATTENTION}::test_windows"],
    9: [f"{ATTENTION}::test_empty_sequences_anywhere", f"{ATTENTION}::test_fully_masked_rows"],
    10: [f"{ATTENTION}::test_nothing_at_all", f"{OPS}::test_nothing_at_all_is_legal"],
    11: [f"{ATTENTION}::test_windows", f"{ATTENTION}::test_nothing_at_all"],
    12: [
        f"{SAFETY}::test_neighbours_change_nothing",
        f"{MODEL}::test_packed_equals_one_clip_at_a_time",
    ],
    13: [f"{OPS}::test_attention_refuses", f"{SAFETY}::test_false_starts_stay_inside"],
    14: [f"{OPS}::test_attention_refuses"],
    15: [f"{SAFETY}::test_calls_in_any_order_have_the_same_bits"],
    16: [f"{ATTENTION}::test_one_sequence_of_many", f"{LAUNCHES}::test_schedule"],
    17: [f"{SAFETY}::test_neighbours_change_nothing", "tests/reference/test_rope.py"],
    18: [f"{SAFETY}::test_guard_pages", f"{ATTENTION}::test_lengths_about_a_block"],
    19: [f"{SAFETY}::test_strides_past_2_31", f"{SAFETY}::test_results_past_2_31"],
    20: [f"{SAFETY}::test_more_than_65535_sequences"],
    21: [f"{LAYOUTS}::test_layouts_of_the_gradients", f"{LAYOUTS}::test_layouts_of_the_inputs"],
    22: [f"{LAYOUTS}::test_layouts_of_the_inputs"],
    23: [f"{LAYOUTS}::test_misaligned_after_aligned"],
    24: [f"{SAFETY}::test_calls_in_any_order_have_the_same_bits"],
    25: [GPU],
    26: [f"{SAFETY}::test_strides_past_2_31"],
    27: [
        "tests/csrc/test_sanitizers.py",
        "tests/ops/test_mel_cpp.py::test_runs_beside_other_threads",
    ],
    28: [GPU],
    29: [f"{SAFETY}::test_the_order_of_programs_changes_nothing"],
    30: [f"{SAFETY}::test_neighbours_change_nothing"],
    31: [GPU],
    32: [f"{LAUNCHES}::test_every_setting_of_the_table"],
    33: [ABSENT],
    34: [f"{AUTOGRAD}::test_compiled_whole_and_at_most_twice_over_many_packs"],
    35: [GPU],
    36: [f"{LAUNCHES}::test_cuda_graph"],
    37: [f"{AUTOGRAD}::test_compiled_whole_and_at_most_twice_over_many_packs"],
    38: [f"{LAUNCHES}::test_the_launches_are_on_the_tensors_device"],
    39: [GPU],
    40: [f"{ATTENTION}::test_windows"],
    41: [GPU],
    42: ["tests/training/test_golden.py"],
    43: [f"{ATTENTION}::test_windows", f"{LAYOUTS}::test_layouts_of_the_gradients"],
    44: [f"{AUTOGRAD}::test_gradients_accumulate_and_inputs_stay"],
    45: [f"{AUTOGRAD}::test_some_outputs_have_gradients"],
    46: [
        f"{AUTOGRAD}::test_twice_differentiated_is_an_error",
        f"{AUTOGRAD}::test_some_inputs_want_gradients",
        f"{AUTOGRAD}::test_checkpointing_and_no_grad",
    ],
    47: [f"{AUTOGRAD}::test_autocast_leaves_the_operation_alone"],
    48: [f"{ATTENTION}::test_head_dims", f"{ATTENTION}::test_shared_keys"],
}
