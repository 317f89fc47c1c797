"""Several files of a folder change as one: all of them, or none, also if the process is killed.

Changes ─→ commit: stage the files, write the record ─→ carry_out: move them into place
                                                 └─→ pending: readers see the new files at once
"""
