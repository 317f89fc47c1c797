"""Timings against PEFT and against stock operations, in one process, interleaved. See `python -m benchmarks --help`."""
