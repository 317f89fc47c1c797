"""MatchingBudget: bounds the work of matching patterns, so that a hostile one raises in seconds."""

from __future__ import annotations

from ..errors import LoraTreeError, SpecError

__all__ = ["MatchingBudget"]

STEPS_OF_WORK = 8_000_000
"""The most steps for all patterns of one adapter, or of one tree: one to three seconds."""


class MatchingBudget:
    """The budget of work for all patterns of one adapter, or of one tree.

    Args:
        whose: the file or the tree, for the error.
        error: the class of the error to raise.
        steps: the number of steps that it allows.

    >>> MatchingBudget("tree.yaml", steps=10).spend(11)
    Traceback (most recent call last):
    lora_tree.errors.SpecError: tree.yaml: matching its patterns takes too long: more than 10 steps
      write them with less repetition, or name the modules instead of describing them
    """

    def __init__(
        self, whose: str, error: type[LoraTreeError] = SpecError, steps: int = STEPS_OF_WORK
    ) -> None:
        self._whose, self._error, self._most = whose, error, steps
        self.left = steps

    def spend(self, steps: int, pattern: str = "") -> None:
        """Subtract steps that a match takes, or is about to take.

        Args:
            steps: their number.
            pattern: the text of the pattern, for the error.

        Raises:
            LoraTreeError: the budget is spent; of the class ``error``, and names the pattern that
                took the last step.
        """
        self.left -= steps
        if self.left < 0:
            last = f" (the last was {pattern[:80]!r})" if pattern else ""
            raise self._error(
                f"{self._whose}: matching its patterns takes too long: "
                f"more than {self._most:,} steps{last}",
                "write them with less repetition, or name the modules instead of describing them",
            )
