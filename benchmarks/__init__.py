"""Timings against PEFT and against stock operations, interleaved in one process.

See ``python -m benchmarks --help``.
"""
