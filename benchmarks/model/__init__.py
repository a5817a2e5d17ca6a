"""The model, the step and the loader."""
