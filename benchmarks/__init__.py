"""Benchmarks, and the tables and plots of their records."""
