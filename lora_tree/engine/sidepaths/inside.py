"""Side paths of weights that a module reads itself: fused experts, other raw parameters, and the
projections of `nn.MultiheadAttention`.

Such a weight has no module that could be hooked. So while its path is active, the forward of the
module that reads it (`readers.py`) is replaced by one that runs the module's own under a
`TorchFunctionMode` (`watched_forward.py`). The mode sees every function of torch that the forward
calls, and adds the factors' products to the results.

This file puts these forwards in place and takes them out again, and keeps apart the threads that
run them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import StateError
from ...sites import Site
from ..hook import Hook
from ..rows.batch_axis import BatchAxis, Place
from ..rows.row_layout import RowLayout
from .readers import Reader, is_around
from .side import raise_for_copy
from .watched_forward import WatchedForward

__all__ = ["InsideForwards"]


class InsideForwards:
    """The watched forwards of a base.

    Args:
        base: the model.
        ran: is called with a site and the result of each product with its weight.
        dropped: an input and a site → the input after the dropout of nodes that train.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        ran: Callable[[Site, Tensor], Tensor],
        dropped: Callable[[Tensor, Site], Tensor],
    ) -> None:
        self._base = base
        self._ran, self._dropped = ran, dropped
        self._watched: dict[str, _Replaced] = {}
        self._sites: Mapping[str, Sequence[Site]] = {}
        """Reader → the sites whose weights are read in its forward."""
        self._sides: Mapping[str, Any] = {}
        self._axis: BatchAxis | None = None
        self._threads = _Threads()

    # ------------------------------------------------------------------ the only writer
    def run(
        self,
        readers: Mapping[str, Sequence[Site]],
        sides: Mapping[str, Any],
        axis: BatchAxis | None,
    ) -> None:
        """Watch the forwards of these modules, and of no others.

        Args:
            readers: dotted name → the sites whose weights are read there; no sites if the module is
                watched only to know where the rows are.
            sides: site → its side path.
            axis: how the rows of a batch lie; None: no batch is routed.
        """
        self._sites, self._sides, self._axis = readers, sides, axis
        for name in list(self._watched):
            if name not in readers or self._watched[name].is_stale(self._base):
                self._watched.pop(name).put_back()
        for name in readers:
            if name not in self._watched:
                reader = Reader(name, self._base.get_submodule(name))
                self._watched[name] = _Replaced.put(reader, self._forward, self._check)

    def places(self, sites: Iterable[Site]) -> list[Place]:
        """Return the places whose inputs show the axis of the batch's rows, for some sites: the
        outermost watched module around each, or the site itself.
        """
        found: dict[Place, None] = {}
        for site in sites:
            around = [n for n in self._watched if is_around(n, site.name)]
            if not around:
                found[site] = None
                continue
            reader = self._watched[min(around, key=len)].reader
            if not isinstance(reader.module, nn.MultiheadAttention):
                found[reader] = None
        return list(found)

    # ------------------------------------------------------------------ in a forward
    @property
    def is_watched(self) -> bool:
        """True while a forward is watched on this thread."""
        return self._threads.watch is not None

    @contextlib.contextmanager
    def apart(self, x: Tensor) -> Iterator[tuple[RowLayout | None, Callable[[Tensor], None]]]:
        """Pause the watch for the length of a ``with``, so that a hook may compute unwatched.

        Args:
            x: the inputs of the hook's module.

        Yields:
            The layout of the batch's rows in ``x`` (None: not known), and a function that notes it
            for the module's output.
        """
        watch = self._threads.watch
        assert watch is not None  # the caller has checked `is_watched`
        layout = watch.layouts.get(x)

        def note(out: Tensor) -> None:
            if layout is not None and out.shape[:-1] == x.shape[:-1]:
                watch.layouts[out] = layout.with_last(out.shape[-1])

        watch.paused = True
        try:
            yield layout, note
        finally:
            watch.paused = False

    def _check(self, reader: Reader, module: nn.Module) -> None:
        """Refuse a copy of the base, as a side path's hook does."""
        if self._axis is not None and self._axis.probing:
            return
        if module is not reader.module:
            raise_for_copy(module, reader.name)
            raise StateError(
                f"{reader.name}: this is a replica of nn.DataParallel, which reads its weights "
                "itself",
                'use activate(…, mode="merged"), or DistributedDataParallel',
            )

    def _forward(
        self, reader: Reader, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        axis = self._axis
        x = _first_tensor(args, kwargs)
        if axis is not None and axis.probing:
            if x is not None:
                axis.note(reader, x)
            return forward(*args, **kwargs)
        # Watched already: a module around it reads the same weights, or sends tokens on to it.
        if self._threads.watch is not None or reader.name not in self._sites:
            return forward(*args, **kwargs)
        watch = WatchedForward(
            reader,
            self._sites[reader.name],
            sides=self._sides,
            axis=axis,
            ran=self._ran,
            dropped=self._dropped,
        )
        if axis is not None and x is not None:
            watch.begin(x, axis)
        self._threads.watch = watch
        try:
            with watch:
                out = forward(*args, **kwargs)
        finally:
            self._threads.watch = None
        return watch.with_bare_rows(out, partial(forward, *args, **kwargs))


class _Threads(threading.local):
    """The forward that each thread watches now: autograd recomputes layers on its own threads."""

    watch: WatchedForward | None = None


@dataclass(frozen=True, eq=False)
class _Replaced:
    """A module whose forward was replaced, and how to put it back.

    Args:
        reader: the module.
        forward: what was put there: a method, which a copy of the module makes its own.
        own: the forward that the module had as an attribute of its own; None: only its class's.
        hook: refuses copies. It also keeps torch's encoder layers from their fast path, which they
            take only if no module in them has hooks, and which never calls the attention's forward.
    """

    reader: Reader
    forward: MethodType
    own: Any
    hook: RemovableHandle

    @staticmethod
    def put(
        reader: Reader,
        run: Callable[[Reader, nn.Module, Callable[..., Any], Any, Any], Any],
        check: Callable[[Reader, nn.Module], None],
    ) -> _Replaced:
        """Replace the forward of a module."""
        own = vars(reader.module).get("forward")

        def watched_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if own is not None:
                return run(reader, module, own, args, kwargs)
            return run(reader, module, MethodType(type(module).forward, module), args, kwargs)

        def refuse_copies(module: nn.Module, args: Any) -> None:
            check(reader, module)

        hook = reader.module.register_forward_pre_hook(Hook(refuse_copies))
        method = MethodType(watched_forward, reader.module)
        vars(reader.module)["forward"] = method
        return _Replaced(reader, method, own, hook)

    def is_stale(self, base: nn.Module) -> bool:
        """Return whether the base has another module there by now."""
        try:
            return base.get_submodule(self.reader.name) is not self.reader.module
        except AttributeError:
            return True

    def put_back(self) -> None:
        """Give the module its own forward back."""
        self.hook.remove()
        attributes = vars(self.reader.module)
        # Other code may have replaced our forward since, and call it from its own. So ours stays
        # usable: without the reader in `_sites` it passes every call on.
        if attributes.get("forward") is not self.forward:
            return
        if self.own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = self.own


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None
