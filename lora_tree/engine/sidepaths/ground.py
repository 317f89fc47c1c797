"""Ground: what increments are added to beside the weights, where a node overrides a module's
tensors.

    no override       y = module(x)
    whole tensors     y = twin(x)              the module's own forward over the overrides
    rows              y, with the outputs of these rows computed again

The twin is an object of the module's class that shares everything with it but the tensors that are
overridden. Its forward is called by itself, so no hook runs a second time. The module has run
before, over the base's own tensors; its output is dropped where a whole tensor is overridden.

Law: the base's module is not written to, not even for the length of a forward: other threads run
the same module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import BaseMismatch, MergedOnly, plural
from ...override import Override
from ...sites import Site
from ..plan import OverrideTerm, OverrideTerms, Plan

__all__ = ["Ground", "check_grounds", "check_one_input", "grounds_of", "twin"]


class Ground:
    """The overrides that stand at one module, ready to run.

    Args:
        site: of the module.
        overrides: in the order in which they are applied.
    """

    def __init__(self, site: Site, overrides: OverrideTerms) -> None:
        self._site = site
        self._full_overrides: dict[str, Override] = {}
        self._rows: list[Override] = []
        for override in overrides:
            if override.value.rows is None:
                self._full_overrides[override.attribute] = override.value
            else:
                self._rows.append(override.value)
        # A frozen override is cast and moved to the base's tensor once, one that trains at every
        # call.
        self._laid: dict[int, Tensor] = {}
        for override in overrides:
            if not override.trains:
                own: Tensor = getattr(site.module, override.attribute)
                self._laid[id(override.value)] = _like(override.value.values, own)

    @property
    def nbytes(self) -> int:
        """The bytes of overrides that were copied, because their dtype or device was another."""
        total = 0
        for override in (*self._full_overrides.values(), *self._rows):
            laid = self._laid.get(id(override))
            if laid is not None and laid.data_ptr() != override.values.data_ptr():
                total += laid.numel() * laid.element_size()
        return total

    def applied(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the module's output over the overrides.

        Args:
            out: its output over its own tensors.
            x: its input.
        """
        site = self._site
        tensors = {
            name: self._now(name, override) for name, override in self._full_overrides.items()
        }
        if tensors:
            module: Any = twin(site.module, tensors)
            # The class's forward: one that was put on the object belongs to the base's module.
            out = type(module).forward(module, x)
        bias = tensors.get(site.bias_name, site.bias)
        for override in self._rows:
            rows = override.index(out.device)
            out = site.with_rows(out, x, rows, self._now(site.weight_name, override), bias)
        return out

    def _now(self, attribute: str, override: Override) -> Tensor:
        own: Tensor = getattr(self._site.module, attribute)
        # The base may have been moved or cast since.
        return _like(self._laid.get(id(override), override.values), own)


def twin(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return an object of a module's class that shares its state, except for some tensors."""
    made: nn.Module = object.__new__(type(module))
    state = dict(vars(module))
    for held in ("_parameters", "_buffers"):
        own = dict(state[held])
        own.update({name: tensor for name, tensor in tensors.items() if name in own})
        state[held] = own
    vars(made).update(state)
    return made


def grounds_of(plan: Plan) -> dict[str, OverrideTerms]:
    """Return site → the overrides at its module.

    A module whose tensors are several sites (a norm's weight and its bias) has one ground, at the
    first of them: its output is computed once, over all that is overridden.
    """
    by_module: dict[int, list[OverrideTerm]] = {}
    first: dict[int, str] = {}
    for name, overrides in plan.overrides.items():
        site = plan.sites[name]
        key = id(site.module)
        by_module.setdefault(key, []).extend(overrides)
        # The module's own site, if there is one: it alone has increments.
        if key not in first or not site.is_raw:
            first[key] = name
    return {first[key]: tuple(overrides) for key, overrides in by_module.items()}


def check_grounds(plan: Plan) -> None:
    """Check that every overridden module runs by itself.

    Raises:
        MergedOnly: the module around one reads its tensors; names the node and the module.
    """
    for name, overrides in plan.overrides.items():
        site = plan.sites[name]
        if site.is_read_by_parent:
            raise MergedOnly(
                f"{overrides[0].node}: {name}: an override can't run beside the weights: "
                "nn.MultiheadAttention reads its projections itself",
                'use activate(…, mode="merged")',
            )
        for other, terms in plan.terms.items():
            # The twin's forward is not the one that is watched.
            if terms and plan.sites[other].reader_names and plan.sites[other].module is site.module:
                raise MergedOnly(
                    f"{overrides[0].node}: {name}: an override can't run beside the weights while "
                    f"{terms[0].node} changes {other}, which the same module reads itself",
                    'use activate(…, mode="merged")',
                )


def check_one_input(site: Site, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that an overridden module was called with its input alone.

    Raises:
        BaseMismatch: there were more arguments, which would have to be split by rows for its twin.
    """
    if len(args) + len(kwargs) != 1:
        raise BaseMismatch(
            f"{site.name}: called with {plural(len(args) + len(kwargs), 'argument')}, "
            "and an override beside the weights needs one, its input",
            'use activate(…, mode="merged")',
        )


def _like(values: Tensor, own: Tensor) -> Tensor:
    if values.dtype == own.dtype and values.device == own.device:
        return values
    return values.to(device=own.device, dtype=own.dtype)
