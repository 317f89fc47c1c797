"""The open ``with`` blocks around a base: their owners, and the order in which they are left.

A block belongs to the context (an asyncio task, or a thread) that opened it, and to tasks that were
made inside it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from ..errors import StateError
from .behaviour import Behaviour

__all__ = ["Block", "Blocks"]


@dataclass(frozen=True, eq=False)
class Block:
    """A ``with`` that is open, and the behaviour that comes back when it is left."""

    before: Behaviour


_INSIDE: ContextVar[tuple[Block, ...]] = ContextVar("lora_tree blocks", default=())
"""The blocks around the code that runs now."""


class Blocks:
    """The open blocks of one base, the innermost last."""

    def __init__(self) -> None:
        self._open: list[Block] = []

    def check_innermost(self) -> None:
        """Raise unless the caller is inside the innermost block.

        Other threads wait for the model's lock; other tasks of the same thread come here.

        Raises:
            StateError: it belongs to another asyncio task.
        """
        if self._open and self._open[-1] not in _INSIDE.get():
            raise StateError(
                "another asyncio task of this thread is inside a `using` or `route` of this base",
                "hold an asyncio.Lock around each block, or give all requests to one route()",
            )

    def enter(self, before: Behaviour) -> Block:
        """Open a block; leaving it brings ``before`` back."""
        block = Block(before)
        _set_inside((*_INSIDE.get(), block))
        self._open.append(block)  # last: from here on only code inside the block may switch
        return block

    def leave(self, block: Block) -> bool:
        """Close a block; return False if one that was opened after it is still open."""
        last = self._open[-1]
        self._open.remove(block)
        # By identity, and wherever it stands: blocks may be left out of order, or in another task.
        _set_inside(tuple([other for other in _INSIDE.get() if other is not block]))
        return last is block

    @property
    def earlier_behaviours(self) -> list[Behaviour]:
        """The behaviours that the open blocks will bring back."""
        return [block.before for block in self._open]


def _set_inside(blocks: tuple[Block, ...]) -> None:
    # The old tuple must outlive the call. If it died inside, what it frees could run other blocks'
    # exits, which set this variable in turn, and CPython would go on with a cached pointer to a
    # value that is gone.
    old = _INSIDE.get()
    _INSIDE.set(blocks)
    del old
