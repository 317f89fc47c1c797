"""Overrides in PEFT's folders: modules that are saved whole, and trained token rows.

    config    modules_to_save: [score]              all tensors of modules with names ending in it
              task_type: SEQ_CLS                    the head, even if older PEFT did not list it
              trainable_token_indices: [5, 7]       rows of the only embedding in the file
              trainable_token_indices: {embed_tokens: [5, 7], lm_head: [9]}
    keys      score.weight                          as PEFT's save_pretrained writes them
              score.modules_to_save.weight,         as a state dict, or PEFT before 0.4, has them;
              score.modules_to_save.default.weight  with bias="all" PEFT writes a bias in both ways,
              score.original_module.bias            and the base's own beside it, which is ignored
              embed_tokens.token_adapter.trainable_tokens_delta      (tokens, dim), the rows' values
              embed_tokens.trainable_tokens_delta   of peft_type TRAINABLE_TOKENS, which has no LoRA

A tied head shares the rows of its embedding. PEFT writes them only once, for the embedding, and so
does this module: only a base knows what is tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FormatError, plural
from ..override import Override, tensor_owner

__all__ = [
    "HEADS",
    "TOKENS",
    "TOKENS_ALONE",
    "SavedWhole",
    "is_original",
    "without_wrapper",
    "words_for",
]

TOKENS = ".token_adapter.trainable_tokens_delta"
TOKENS_ALONE = ".trainable_tokens_delta"
_WRAPPERS = (".modules_to_save.default.", ".modules_to_save.")

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""``task_type`` → the modules that PEFT always saves; it also adds them when it loads a folder."""


def is_original(path: str) -> bool:
    """Return whether a key is the base's original tensor, saved beside its replacement."""
    return ".original_module." in path


def without_wrapper(path: str) -> tuple[str, bool]:
    """Return a key without the wrapper of a module that is saved whole, and whether it had one.

    >>> without_wrapper("score.modules_to_save.default.weight"), without_wrapper("norm.weight")
    (('score.weight', True), ('norm.weight', False))
    """
    for wrapper in _WRAPPERS:
        if wrapper in path:
            return path.replace(wrapper, ".", 1), True
    return path, False


@dataclass(frozen=True)
class SavedWhole:
    """The fields of a config about overrides.

    Args:
        where: the file, as errors name it.
        modules: ends of the names of modules that are saved whole.
        tokens: end of a module's name → its rows; the end ``""`` matches every name.
        declared: those of `modules` that the config lists, without those that the task implies.
    """

    where: str
    modules: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] | None = None
    declared: tuple[str, ...] = ()

    def has(self, tensor: str) -> bool:
        """Return whether a tensor belongs to a module that is saved whole.

        PEFT's rule matches any end of a module's name, not only after a dot.
        """
        module, _ = tensor_owner(tensor)
        parts = module.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return any(name.endswith(end) for name in around for end in self.modules)

    def rows(self, module: str, values: Tensor) -> Override:
        """Return the trained rows of an embedding, (tokens, dim), as an override.

        Raises:
            FormatError: the config lists no rows for the module, or another number of them.
        """
        tokens = self.tokens or {}
        matching = [rows for end, rows in tokens.items() if module.endswith(end)]
        if len(matching) != 1 or len(matching[0]) != len(values):
            count_text = "no rows of it" if not matching else plural(len(matching[0]), "row")
            raise FormatError(
                f"{self.where}: trainable_token_indices: {count_text} for {module}, whose "
                f"trainable_tokens_delta has {len(values)}",
                "the two files are not of one adapter: save it again with PEFT",
            )
        return Override(values, matching[0])

    def check_found(self, overrides: Mapping[str, Override], weights: str) -> None:
        """Check that the file has the tensors that the config announces.

        Some names in the config may match no module of the model, but not all of them.

        Args:
            overrides: those in the file.
            weights: the file, as errors name it.

        Raises:
            FormatError: it has no tensor of any module that is saved whole, or no trained rows.
        """
        declared = SavedWhole(self.where, self.declared)
        if self.declared and not any(declared.has(name) for name in overrides):
            raise FormatError(
                f"{weights}: no tensor of {' or '.join(self.declared)}, and {self.where} says that "
                "it was saved: modules_to_save",
                "the file lost its head: save the adapter again with PEFT; or take the name out",
            )
        if self.tokens and all(override.rows is None for override in overrides.values()):
            raise FormatError(
                f"{weights}: no trainable_tokens_delta, and {self.where} says that rows were "
                "trained: trainable_token_indices",
                "save the adapter again with PEFT",
            )

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str) -> SavedWhole:
        """Return the fields about overrides of a parsed adapter_config.json.

        Raises:
            FormatError: a field has a wrong type.
        """
        named = fields.get("modules_to_save")
        if named is not None and not _are_names(named):
            raise FormatError(
                f"{where}: modules_to_save: got {str(named)[:80]!r}, expected a list of names or "
                "null"
            )
        by_task = HEADS.get(str(fields.get("task_type")), ())
        modules = dict.fromkeys([*(named or ()), *by_task])
        field = "trainable_token_indices"
        if fields.get("peft_type") == "TRAINABLE_TOKENS":
            field = "token_indices"
        return cls(
            where,
            tuple(modules),
            _tokens(fields.get(field), f"{where}: {field}"),
            tuple([name for name in named or () if name not in by_task]),
        )


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _tokens(value: Any, where: str) -> dict[str, tuple[int, ...]] | None:
    if value is None:
        return None
    of: Mapping[str, Any] = value if isinstance(value, dict) else {"": value}
    rows_by_name: dict[str, tuple[int, ...]] = {}
    for name, rows in of.items():
        is_list = isinstance(rows, list) and len(rows) > 0
        if not is_list or not all(type(row) is int and 0 <= row < 2**31 for row in rows):
            raise FormatError(
                f"{where}: got {str(rows)[:80]!r}, expected a list of rows, or such a list for "
                "each module"
            )
        if len(set(rows)) != len(rows):
            raise FormatError(f"{where}: a row occurs twice in {str(rows)[:80]}")
        rows_by_name[name] = tuple(rows)
    return rows_by_name


# ---------------------------------------------------------------------- out
def words_for(overrides: Mapping[str, Override], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``modules_to_save`` and ``trainable_token_indices`` for the overrides to write.

    The values in the adapter's own config are kept if they name these overrides, so that a file
    that was read is written with the same text.

    Args:
        overrides: tensor → override, without those of modules that have factors.
        config: the adapter's.
    """
    full_tensors = [name for name, override in overrides.items() if override.rows is None]
    rows = {tensor_owner(name)[0]: o.rows for name, o in overrides.items() if o.rows is not None}
    words: dict[str, Any] = {}
    if full_tensors or "modules_to_save" in config:
        words["modules_to_save"] = _module_words(full_tensors, config)
    if rows or "trainable_token_indices" in config:
        words["trainable_token_indices"] = _token_words(rows, config)
    return words


def _module_words(full_tensors: Sequence[str], config: Mapping[str, Any]) -> list[str] | None:
    by_task = HEADS.get(str(config.get("task_type")), ())
    declared = config.get("modules_to_save") or ()
    kept: list[str] = []
    for word in declared if _are_names(declared) else ():
        # Drop a name that matches nothing here: PEFT would look for keys that the file lacks. PEFT
        # adds the names of the task in any case.
        if word in by_task or any(SavedWhole("", (word,)).has(name) for name in full_tensors):
            kept.append(word)
    known = SavedWhole("", tuple(kept))
    kept += sorted({tensor_owner(name)[0] for name in full_tensors if not known.has(name)})
    return sorted(kept) or None


def _token_words(
    rows: Mapping[str, tuple[int, ...] | None], config: Mapping[str, Any]
) -> dict[str, list[int]] | list[int] | None:
    if not rows:
        return None
    declared = config.get("trainable_token_indices")
    plain = {module: list(of or ()) for module, of in rows.items()}
    if isinstance(declared, list) and list(plain.values()) == [declared]:
        return declared
    if isinstance(declared, dict) and _same_rows(declared, plain):
        return declared
    return plain


def _same_rows(declared: Mapping[str, Any], rows: Mapping[str, list[int]]) -> bool:
    """Return whether the config's entries name exactly these modules, one each, with these rows."""

    def ends(module: str) -> Iterable[str]:
        return [end for end in declared if isinstance(end, str) and module.endswith(end)]

    named = {module: list(ends(module)) for module in rows}
    if any(len(found) != 1 for found in named.values()) or len(declared) != len(rows):
        return False
    return all(declared[named[module][0]] == module_rows for module, module_rows in rows.items())
