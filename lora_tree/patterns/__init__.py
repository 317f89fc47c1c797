"""Untrusted patterns on module names, matched within a bounded amount of work.

A file may hold thousands of patterns, a base thousands of names, and one pattern may make ``re``
run for years. So every step of every match is subtracted from a `MatchingBudget`: one for all
patterns of an adapter, one for all of a tree.

    parse.py             a pattern → instructions; refuses patterns that need unbounded work
    match.py             NamePattern: runs the instructions over a name
    tables.py            ByPattern, Patterns: many patterns on many names
    glob.py              globs like ``*.down_proj``, which need no budget
    matching_budget.py   MatchingBudget
"""

from .glob import check_glob, glob_matches
from .match import NamePattern
from .matching_budget import MatchingBudget
from .parse import check_pattern
from .tables import ByPattern, Patterns

__all__ = [
    "ByPattern",
    "MatchingBudget",
    "NamePattern",
    "Patterns",
    "check_glob",
    "check_pattern",
    "glob_matches",
]
