"""Many adapters in fewer bytes: `grow` and `compress` beside packages with one shared basis.

    texts ─▶ trained adapters ─▶ each method at the same bytes ─▶ error, held-out bits, CPU time

``python -m benchmarks.grown FOLDER``; the folder keeps what was trained and measured.
"""
