"""Find the tensors that a fresh adapter replaces: whole modules, and rows of embeddings.

The rules are PEFT's. A module is saved whole, with every tensor in it, if its name ends with an
entry of ``modules_to_save``; modules inside it get no factors. ``trainable_token_indices`` is a
list of rows of the input embedding, or maps ends of embeddings' names to such lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import BaseMismatch, plural, suggest
from ..spec import LoraSpec

__all__ = ["is_inside", "replaced_tensors"]

Rows = tuple[int, ...] | None
"""Rows of a tensor; None: all of it."""


def replaced_tensors(base: nn.Module, spec: LoraSpec) -> dict[str, Rows]:
    """Return tensor of the base → the rows of it that a spec replaces, sorted by name.

    Raises:
        BaseMismatch: an entry names no module; or a module has statistics, which no optimiser
            trains; or an embedding is named both whole and by its rows.
    """
    rows_of: dict[str, Rows] = {}
    for word in spec.modules_to_save or ():
        for module, held in _ending_with(base, word, "modules_to_save").items():
            for name in _tensors_of(module, held):
                rows_of[name] = None
    for module, rows in _token_rows(base, spec).items():
        name = f"{module}.weight"
        if name in rows_of:
            raise BaseMismatch(
                f"{module}: modules_to_save replaces all of it, and trainable_token_indices rows",
                "name it in one of the two",
            )
        rows_of[name] = tuple(rows)
    return dict(sorted(rows_of.items()))


def is_inside(module: str, tensors: Mapping[str, Rows]) -> bool:
    """Return whether one of a module's own tensors is replaced."""
    return any(name.rpartition(".")[0] == module for name in tensors)


def _ending_with(base: nn.Module, word: str, field: str) -> dict[str, nn.Module]:
    """Return the modules whose names end with an entry of a field.

    Raises:
        BaseMismatch: there are none.
    """
    modules = {name: module for name, module in base.named_modules() if name}
    found = {name: module for name, module in modules.items() if name.endswith(word)}
    if not found:
        ends = {name.rpartition(".")[2] for name in modules}
        raise BaseMismatch(
            f"{field}: {word!r} names no module of the base{suggest(word, ends)}",
        )
    return found


def _tensors_of(module: str, held: nn.Module) -> list[str]:
    """Return the names of all tensors in a module that is saved whole.

    Raises:
        BaseMismatch: it has no parameter; or it has statistics, as a batch norm does.
    """
    parameters = [f"{module}.{name}" for name, _ in held.named_parameters()]
    saved = {f"{module}.{name}" for name in held.state_dict()}
    statistics = sorted(saved - set(parameters))
    if statistics:
        raise BaseMismatch(
            f"{statistics[0]}: modules_to_save: it is a statistic and no parameter, and no step of "
            "an optimiser moves it",
            "train a head with a batch norm in PEFT, and add its folder",
        )
    if not parameters:
        raise BaseMismatch(f"{module}: modules_to_save: it has no parameter")
    return parameters


def _token_rows(base: nn.Module, spec: LoraSpec) -> dict[str, Sequence[int]]:
    """Return embedding → the rows of it that train.

    Raises:
        BaseMismatch: an entry names no module, or several; or the input embedding is not known; or
            a row does not exist.
    """
    field = "trainable_token_indices"
    declared = spec.trainable_token_indices
    if declared is None:
        return {}
    rows_of: dict[str, Sequence[int]] = {}
    if isinstance(declared, list):
        rows_of[_input_embedding(base)] = declared
    else:
        for word, named in declared.items():
            names = list(_ending_with(base, word, field))
            if len(names) > 1:
                raise BaseMismatch(
                    f"{field}: {word!r} names {plural(len(names), 'module')}", "name one"
                )
            rows_of[names[0]] = named
    for module, rows in rows_of.items():
        weight = getattr(base.get_submodule(module), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise BaseMismatch(f"{field}: {module} is no embedding, and has no rows")
        if max(rows) >= weight.shape[0]:
            raise BaseMismatch(
                f"{field}: {module} has {plural(weight.shape[0], 'row')}, and {max(rows)} is named",
                f"resize the base before attach: base.resize_token_embeddings({max(rows) + 1})",
            )
    return rows_of


def _input_embedding(base: nn.Module) -> str:
    get: Any = getattr(base, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    for name, module in base.named_modules():
        # Like PEFT, fall back on the name embed_tokens if the model does not say.
        if module is embedding or (embedding is None and name.endswith("embed_tokens")):
            return str(name)
    raise BaseMismatch(
        "trainable_token_indices: the model does not say which its input embedding is",
        "name it: {embed: [5, 7]}",
    )
