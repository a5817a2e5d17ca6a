"""What a machine has, whether its kernels agree, and what a run needs of it."""
