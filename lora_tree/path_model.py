"""PathModel: one path of a tree as a module of its own, beside any others of the same base.

    model.at("fr/legal")     the base's parameters, modules of its own (`engine/view.py`)
      ├── base               a view of the base, with the path beside its weights for good
      └── factors            those of the path's own nodes that train, or did

A `TreeModel` has one active path at a time, and its base behaves so only until the next switch.
Trainers keep a model for long, and call parts of it directly: the base without its head, the head's
weight, ``generate``. In a path model each part is a module of the view, and the view's side paths
stay installed.

Law: whatever else is active, and in whatever order path models run, forward and backward of one are
those of its path.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .blend import Blend, spelled
from .engine.answers import AnswersForBase
from .engine.behaviour import Request
from .engine.plan import Plan
from .engine.stage import Stage
from .engine.view import gate
from .errors import StateError, listing
from .training.every_rank import joined
from .training.factors import Factors
from .training.node_factors import key_of
from .training.rank_names import ranks

__all__ = ["PathModel"]


class PathModel(AnswersForBase):
    """A path or blend as an ``nn.Module``; made by `TreeModel.at`.

    It answers for its base, as a `TreeModel` does. Its parameters are the base's own, and the
    factors of the path's nodes that train, or did.

    Args:
        path: the path or blend.
        base: a view of the base.
        stage: the stage of that view.
        factors: the factors that train, or did, of the whole tree.
        owner: the `TreeModel`; this object keeps it alive.
        check: called before each forward; raises while a path is merged into the base's weights.
        dropped: called with the stage when this object is collected.
    """

    def __init__(
        self,
        path: Blend,
        base: nn.Module,
        stage: Stage,
        factors: Factors,
        *,
        owner: nn.Module,
        check: Callable[[], None],
        dropped: Callable[[Stage], object],
    ) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.factors = Factors()
        self.training = base.training
        self._path_stage = stage
        # In a tuple: nn.Module would register them as submodules. It keeps the owner alive.
        self._of_tree = factors, owner
        self._digest: Tensor | None = None
        # The hooks refer to the gate and not to this object. A reference back would be a cycle, and
        # this object would stay alive until the garbage collector runs.
        self._gate = _Gate(check)
        gate(base, self._gate)
        stage.become(Request(path, "unmerged"))
        self._own_factors()
        # A hook, because trainers replace `forward` with their own function.
        self.register_forward_hook(_every_factor)
        # A finalizer may run in a thread that holds the cache's lock, so it only makes a note.
        self._note = weakref.finalize(self, dropped, stage)
        self._note.atexit = False
        self._answers = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's forward under the path.

        If several ranks train together, every factor that trains is in every rank's backward.
        """
        return self.base(*args, **kwargs)

    def close(self) -> None:
        """Release the path's nodes, so that the tree may change them; idempotent."""
        if self._gate.is_open:
            self._gate.is_open = False
            self._note.detach()
            self._path_stage.close()

    @property
    def tree_model(self) -> Any:
        """The `TreeModel` that made it."""
        return self._of_tree[1]

    @property
    def nodes(self) -> list[str]:
        """The nodes of its path, from the root down; none once it is closed."""
        return list(self._path_stage.current.adapters)

    def renew(self) -> None:
        """Make the side paths again, because the nodes' factors changed, or other nodes train."""
        if self._gate.is_open:
            self._path_stage.renew()
            self._own_factors()

    def get_output_embeddings(self) -> Any:
        """Return the head, for a caller that multiplies by its weight.

        Raises:
            StateError: the path changes the head, and such a caller would silently leave that out;
                names the nodes.
        """
        base: Any = self.base
        head = base.get_output_embeddings()
        plan = self._path_stage.current.placed.plan
        for name, site in plan.sites.items():
            if head is not None and site.module is head:
                nodes = [term.node for term in plan.terms.get(name, ())]
                nodes += [override.node for override in plan.overrides.get(name, ())]
                changed_by = listing(dict.fromkeys(nodes))
                raise StateError(
                    f"{name}: the head is changed by {changed_by}, and a caller that takes its "
                    "weight alone would leave that out",
                    "call the model for its logits, or leave the head out of the node: "
                    f'exclude_modules=["{name}"]',
                )
        return head

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PathModel:
        """Move or cast as every module does, then make the side paths for the new place."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.renew()
        return self

    def get_extra_state(self) -> Tensor:
        """Return a hash of the content of the path's frozen nodes.

        The ``state_dict`` has it beside the factors. So a checkpoint records the nodes that it was
        trained on, and a cache of results under a ``state_dict``'s hash (trl caches a reference's
        log-probabilities like this) does not mistake two paths over one base for the same model.
        """
        if self._digest is None:
            self._digest = _digest_of(self._path_stage.current.placed.plan, set(self.factors))
        return self._digest

    def set_extra_state(self, state: Any) -> None:
        """Check that a ``state_dict`` was made over the same frozen nodes.

        Raises:
            StateError: the factors in it were trained on other nodes.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise StateError(
                f"{spelled(self.path) or 'the bare base'}: this state_dict is of a path whose "
                "frozen nodes have other contents",
                "load it over the tree that it was trained on",
            )

    def _own_factors(self) -> None:
        """Hold the factors of this path's nodes and of no others, because data parallelism waits
        for a gradient of every parameter.
        """
        self._digest = None
        self.factors.clear()
        all_factors, _ = self._of_tree
        for node in self.nodes:
            key = key_of(node)
            if key in all_factors:
                self.factors[key] = all_factors[key]

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            StateError: always.
        """
        raise StateError(
            "a path model can't be copied or pickled: its parameters are its base's",
            "ask for another one: model.at(path)",
        )


def _every_factor(module: nn.Module, args: Any, out: Any) -> Any:
    """Put every factor that trains into the backward, if several ranks train together."""
    if not torch.is_grad_enabled() or ranks() == 1:
        return out
    path_model: Any = module
    return joined(out, [p for p in path_model.factors.parameters() if p.requires_grad])


def _digest_of(plan: Plan, without: Collection[str]) -> Tensor:
    """Return the SHA-256 of a plan's terms and overrides as (32,) uint8.

    Args:
        without: the keys (`key_of`) of nodes that are left out.
    """
    seen = hashlib.sha256()
    for name in plan.sites:
        for term in plan.terms.get(name, ()):
            if key_of(term.node) not in without:
                seen.update(f"{name} {term.coefficient!r} {term.value.scale!r}".encode())
                _add_numbers(seen, term.value.tensors)
        for override in plan.overrides.get(name, ()):
            if key_of(override.node) not in without:
                seen.update(f"{name}.{override.attribute}".encode())
                _add_numbers(seen, [override.value.values])
    return torch.frombuffer(bytearray(seen.digest()), dtype=torch.uint8)


def _add_numbers(seen: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        # As bytes, because numpy has no bf16.
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        seen.update(raw.numpy().tobytes())


class _Gate:
    """Refuses a forward of a path model that is closed, or whose base has other weights."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.is_open, self._check = True, check

    def __call__(self) -> None:
        if not self.is_open:
            raise StateError(
                "this path model was closed, or its TreeModel was detached",
                "ask for another one: model.at(path)",
            )
        self._check()
