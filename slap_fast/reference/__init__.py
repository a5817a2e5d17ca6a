"""The public operations in plain PyTorch: the definition of right, and what a CPU runs."""
