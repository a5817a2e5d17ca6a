"""The trainer: state, step, loop, and what a run writes."""
