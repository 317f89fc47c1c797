"""Side paths of weights that a module reads itself: fused experts, other raw parameters, and the
projections of `nn.MultiheadAttention`.

Such a weight has no module that could be hooked. So while its path is active, the forward of the
module that reads it runs under a `TorchFunctionMode`, which sees every function of torch that the
forward calls, and lets it run as it is:

    W[e], W.mT, W.chunk(2)       the same is done to the factors                  weight_view.py
    linear(x, W[e]), x @ W, …    the factors' product is added to the result      weight_product.py
    x[tokens], x.view(…), …      in a routed batch: where its rows are now        row_layout.py

The base's own numbers come from the base's own calls, so a bare row keeps its bits, and the experts
are grouped as the module groups them (transformers' eager, grouped and batched implementations).

Law: a function that is given the weight and is none of these is refused by its name. A token whose
row is not known is never guessed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import BaseMismatch, MergedOnly, StateError
from ..sites import Site, experts_around
from .batch_axis import DECLARE, BatchAxis, Place
from .row_functions import followed, function_name
from .row_layout import RowLayout
from .shares import Share
from .side import raise_for_copy
from .token_sum import add_shares
from .unpromised import attention_body
from .weight_product import WeightProduct, multiplies, product_of
from .weight_view import WeightView, is_view, views_of

__all__ = ["InsideForwards", "Reader", "Readers", "readers_of"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A module whose forward is watched.

    Args:
        name: its dotted name.
        module: the module.
    """

    name: str
    module: nn.Module

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        """Return the sizes of the axes that might be an input's rows, as `Site.token_axes`."""
        return x.shape[1:-1] if x.ndim > 1 else x.shape


class InsideForwards:
    """The watched forwards of a base.

    Args:
        base: the model.
        ran: is called with a site and the result of each product with its weight.
        dropped: a site and an input → what nodes that train see of it.
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
            readers: dotted name → the sites whose weights are read there; none where it is watched
                only to know where the rows are.
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
        """Return where the axis of the batch's rows is seen, for some sites: the outermost watched
        module around each, or the site itself.
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
        """Whether a forward is watched now, on this thread."""
        return self._threads.watch is not None

    @contextlib.contextmanager
    def apart(self, x: Tensor) -> Iterator[tuple[RowLayout | None, Callable[[Tensor], None]]]:
        """Let a hook compute without being watched, within a forward that is.

        Args:
            x: the inputs of the hook's module.

        Yields:
            Where the rows of the batch are in ``x``, and what notes them in the module's output.
        """
        watch = self._threads.watch
        assert watch is not None  # the caller asked
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
        watch = _WatchedForward(self, reader, self._sites[reader.name])
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
    """The forward that is watched now, thread by thread: autograd recomputes layers on its own."""

    watch: _WatchedForward | None = None


@dataclass(frozen=True, eq=False)
class _Replaced:
    """A module whose forward was replaced, and how to put it back.

    Args:
        reader: the module.
        forward: what was put there: a method, which a copy of the module makes its own.
        own: the forward that the module itself had, beside that of its class; None: none.
        hook: refuses copies. A module with a hook is never passed over, as encoder layers of torch
            pass over the attention in them.
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

        hook = reader.module.register_forward_pre_hook(refuse_copies)
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
        mine = vars(self.reader.module)
        # Other code may have put its own there since, and calls ours: that passes everything on.
        if mine.get("forward") is not self.forward:
            return
        if self.own is None:
            del mine["forward"]
        else:
            mine["forward"] = self.own


class _WatchedForward(TorchFunctionMode):
    """One forward of one reader.

    Args:
        inside: the watched forwards.
        reader: the module.
        sites: whose weights it reads.
    """

    def __init__(self, inside: InsideForwards, reader: Reader, sites: Sequence[Site]) -> None:
        super().__init__()
        self._inside, self._reader, self._sites = inside, reader, sites
        self._views: Any = WeakIdKeyDictionary()
        self.layouts: Any = WeakIdKeyDictionary()
        """Tensor → where the rows are in it. Weak, so that no tensor lives longer for it."""
        self.paused = False
        self._shares: dict[tuple[str, Any], list[Share]] = {}
        self._records = torch.is_grad_enabled()
        self._unknown: BaseMismatch | None = None
        """Why the rows are not known in what the forward was given."""
        self._attention: RowLayout | None = None
        """The layout of the query of the attention that runs now."""

    def begin(self, x: Tensor, axis: BatchAxis) -> None:
        """Note where the rows of the batch are in the forward's inputs."""
        if isinstance(self._reader.module, nn.MultiheadAttention):
            return  # it says so itself: see `_attend`
        try:
            spread = axis.rows_of(self._reader, x)
        except BaseMismatch as error:
            self._unknown = error  # told only if a weight in here needs the rows
            return
        if spread is not None:
            self.layouts[x] = RowLayout.of(x.shape, spread=spread)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], Sequence):
            args = (args[0], *args[1])
        found = self._weights(args, kwargs)
        if found:
            return self._with_weight(func, args, kwargs, found)
        out = func(*args, **kwargs)
        if self.layouts:
            followed(self.layouts, func, args, kwargs, out)
        return out

    # ------------------------------------------------------------------ a function of a weight
    def _weights(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, WeightView]:
        """Return which arguments are weights, or were made of one."""
        found: dict[Any, WeightView] = {}
        for at, value in (*enumerate(args), *kwargs.items()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                view = self._views.get(tensor)
                for site in self._sites if view is None else ():
                    # Asked anew: FSDP2 exchanges a module's parameters while it runs.
                    if site.weight is tensor:
                        view = WeightView(site)
                if view is not None:
                    found[at] = view
        return found

    def _with_weight(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        found: Mapping[Any, WeightView],
    ) -> Any:
        if func is F.multi_head_attention_forward:
            return self._attend(args, kwargs)
        name = function_name(func)
        (at, view), *others = found.items()
        if not others and isinstance(at, int) and multiplies(name):
            product = product_of(name, func, at, args, kwargs)
            if product is not None:
                return self._multiply(func, args, kwargs, view, product)
        out = func(*args, **kwargs)
        if not _has_tensors(out):
            return out  # a question: its shape, its dtype
        made = None
        if not others and at == 0 and is_view(name):
            made = views_of(view, name, args[0], [*args[1:], *kwargs.values()], out)
        if made is None:
            self._refuse(view.site, func)
        for tensor, each in made:
            self._views[tensor] = each
        return out

    def _multiply(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        view: WeightView,
        product: WeightProduct,
    ) -> Tensor:
        site, x = view.site, product.x
        layout = self._layout(x)
        out: Tensor = func(*args, **kwargs)
        shares = self._shares_at(site, out.device, layout)
        if self._records and not torch.is_grad_enabled() and any(s.live for s in shares):
            raise StateError(
                f"{site.name}: {type(site.module).__name__} multiplies with it where "
                "autograd does not record, so the nodes that train there would get no gradient",
                "let the module use an implementation that is plain torch, as "
                'set_experts_implementation("eager") does',
            )
        after = add_shares(
            out,
            product,
            shares,
            cut=view.of,
            dropped=lambda x: self._inside._dropped(x, site),
            layout=layout,
        )
        if after is None:
            raise BaseMismatch(
                f"{site.name}: {type(site.module).__name__} multiplies it with "
                f"{tuple(x.shape)}, and the rows of the batch can't be followed to there",
                "activate one path at a time",
                DECLARE,
            )
        after = self._inside._ran(site, after)
        if layout is not None and product.keeps_axes:
            self.layouts[after] = layout.with_last(after.shape[product.features], product.features)
        return after

    def _shares_at(self, site: Site, device: torch.device, layout: RowLayout | None) -> list[Share]:
        """Return what is added at a site; made once for all experts, since what trains is stacked
        anew each time.
        """
        key = site.name, None if layout is None else layout.spread
        found = self._shares.get(key)
        if found is None:
            side = self._inside._sides[site.name]
            try:
                found = self._shares[key] = side.shares(device, layout)
            except BaseMismatch as error:
                raise self._unknown or error from None
        return found

    def _layout(self, x: Tensor) -> RowLayout | None:
        found: RowLayout | None = self.layouts.get(x)
        if found is None and self._attention is not None and x.ndim == 2:
            # torch's attention puts the tokens of all rows below each other, token by token.
            query = self._attention
            if len(x) == query.axes[0][0].size * query.count:
                found = query.with_last(x.shape[1]).reshape(x.shape)
        return found

    # ------------------------------------------------------------------ torch's attention
    def _attend(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run `F.multi_head_attention_forward` with its products watched. Its inputs are (tokens,
        rows, features), or (tokens, features) of one row.
        """
        body = attention_body()
        if body is None:
            self._refuse(self._sites[0], F.multi_head_attention_forward)
        axis = self._inside._axis
        query = args[0]
        if axis is not None and query.ndim == 3 and axis.is_length(query.shape[1]):
            spread = axis.spread_of(query.shape[1])
            self._attention = RowLayout.of(query.shape, axis=1, spread=spread)
            for x in args[:3]:
                self.layouts[x] = RowLayout.of(x.shape, axis=1, spread=spread)
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self._attention = None

    def with_bare_rows(self, out: Any, forward: Callable[[], Any]) -> Any:
        """Return the output of torch's attention with the bare rows as the base computes them.

        In evaluation the bare base may compute it in one call, whose bits are others; while a
        forward is watched, torch takes that way never.

        Args:
            out: (attention, weights or None).
            forward: runs the module unwatched.
        """
        module = self._reader.module
        if not isinstance(module, nn.MultiheadAttention) or module.training or not self._shares:
            return out
        owes = None
        for share in itertools.chain.from_iterable(self._shares.values()):
            if share.table is None or share.table.owes is None:
                return out  # no row is bare
            owes = share.table.owes if owes is None else owes | share.table.owes
        assert owes is not None
        attended, weights = out
        bare, bare_weights = forward()
        if not module.batch_first:
            owes = owes.mT
        attended = torch.where(owes[..., None], attended, bare)
        if weights is not None:
            is_bare = ~owes.reshape(-1, *[1] * (weights.ndim - 1))
            weights = torch.where(is_bare, bare_weights, weights)
        return attended, weights

    def _refuse(self, site: Site, func: Any) -> NoReturn:
        module = type(site.module).__name__
        raise MergedOnly(
            f"{site.name}: can't run unmerged: {module} gives it to "
            f"{resolve_name(func) or function_name(func)}, which is no product that two factors "
            "could take part in",
            'use activate(…, mode="merged")',
        )


@dataclass(frozen=True)
class Readers:
    """The modules that read the weights of a plan's sites.

    Args:
        watched: the modules whose forwards have to be watched, and the sites whose weights they
            read.
        called: the names of the sites whose own modules are called, so that a hook finds them.
    """

    watched: Mapping[str, Sequence[Site]]
    called: frozenset[str]


def readers_of(base: nn.Module, sites: Collection[Site], is_routed: bool) -> Readers:
    """Return the modules that read the weights of some sites.

    Args:
        base: the model.
        sites: of a plan.
        is_routed: rows go by different paths, so that it matters where a module of experts has
            them.
    """
    read_in = {site: site.read_in for site in sites}
    watched: dict[str, list[Site]] = {}
    called: set[str] = set()
    for site, names in read_in.items():
        if not names:
            called.add(site.name)
        if is_routed and not names:
            around = experts_around(base, site.name)
            names = () if around is None else (around,)
        for name in names:
            watched[name] = []
    for site, names in read_in.items():
        for name, read in watched.items() if names else ():
            # Of a forward within it too: the outer one watches for both.
            if any(is_around(name, each) for each in names):
                read.append(site)
    return Readers(watched, frozenset(called))


def is_around(module: str, name: str) -> bool:
    """Return whether a name belongs to the module or to something in it."""
    return not module or f"{name}.".startswith(f"{module}.")


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def _has_tensors(out: Any) -> bool:
    values: Iterable[Any] = out if isinstance(out, (list, tuple)) else (out,)
    return any(isinstance(value, Tensor) for value in values)
