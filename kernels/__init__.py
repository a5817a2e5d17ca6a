"""The fused operations: one file per operation, Triton only. Import it as ``slap_fast.kernels``."""
