"""Write a path, or every node by itself, as GGUF files that llama.cpp's server loads with a base.

    general.type = adapter      adapter.type = lora      adapter.lora.alpha = 0
    blk.0.attn_q.weight.lora_a  (r, in)                  blk.0.attn_q.weight.lora_b  (out, r)

llama.cpp scales each pair by alpha over the pair's rank, or by the request's scale alone if alpha
is 0. So the export folds scales into B and writes alpha 0, and ranks may differ between modules.
The server sums the adapters that a request lists, each with its scale: a path or a blend becomes
such a list, and each node is stored once.

Llama stores the rows of its query and key projections in another order in GGUF, and so the rows of
their B. Names and the writer are the ``gguf`` package's own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..blend import Blend, spelled
from ..errors import FormatError, LoraTreeError, SpecError, listing
from ..extras import foreign, need
from ..folder import disk
from ..folder.atomic_folders import make_all
from ..lowrank import LINEAR, LowRank
from ..override import check_none
from ..sites import find_site
from ..storage import as_path
from ..tree import AdapterTree
from .unloaded_base import skeleton

__all__ = ["LlamaRequest", "export_gguf", "export_gguf_nodes", "llama_request"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""``model_type`` of a config → the architecture's name in GGUF, for the ones that were tested."""
PERMUTED = {"llama", "mistral"}


@dataclass(frozen=True)
class LlamaRequest:
    """The part of llama.cpp's command line and requests that is about adapters.

    Args:
        files: in the order of their ids: the server's ``--lora`` flags.
        lora: node by node, the ids and scales of a path or blend, for the request's ``lora`` field.
    """

    files: tuple[Path, ...]
    lora: tuple[tuple[int, float], ...]

    @property
    def arguments(self) -> list[str]:
        """The server's flags."""
        # By default llama.cpp's server starts with every adapter at scale 1, so a request without
        # a list would get the sum of all nodes.
        flags = ["--lora-init-without-apply"]
        for file in self.files:
            flags += ["--lora", str(file)]
        return flags

    @property
    def body(self) -> list[dict[str, int | float]]:
        """The value of ``lora`` in a request; adapters that it does not list get 0."""
        return [{"id": number, "scale": scale} for number, scale in self.lora]


def export_gguf(
    tree: AdapterTree,
    blend: Blend,
    to: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    max_error: float | None = None,
) -> Adapter:
    """Write a path or a blend as one GGUF adapter, and return the flattened adapter.

    Args:
        to: the file; it appears whole or not at all.
        base: the base's folder or hub id, for its architecture; None: the tree's base.
        rank, max_error: as for `AdapterTree.flatten`.

    Raises:
        MissingExtra: gguf is not installed.
        SpecError: no base is known, or its architecture is not in `ARCHITECTURES`.
        FormatError: GGUF can't hold a module; names it.
    """
    form = _Form.of(tree, base)
    flat = tree.flatten(blend, rank, max_error=max_error, base=form.model)
    _write(form.render(flat), Path(os.path.abspath(as_path(to))))
    return flat


def export_gguf_nodes(
    tree: AdapterTree,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write every node that has an adapter as ``folder/<path>.gguf``; return the files by id.

    A node's weight is not in its file: `llama_request` puts it into the scale. Weights per module
    are in the file, because the server has only one scale per file.

    Raises:
        MissingExtra, SpecError, FormatError: as `export_gguf`; names the node.
    """
    form = _Form.of(tree, base)
    rendered: dict[Path, bytes] = {}
    for path, file in _files(tree, Path(os.path.abspath(as_path(folder)))).items():
        # In a tree of its own, because `flatten` adds the nodes above.
        adapter = tree.adapter(path)
        assert adapter is not None
        weight = tree[path].weight
        alone = AdapterTree()
        alone.add("node", adapter=adapter, weight=1.0 if isinstance(weight, float) else weight)
        try:
            rendered[file] = form.render(alone.flatten("node", base=form.model))
        except LoraTreeError as error:
            raise error.within(path) from error
    # Write only after every node has been rendered without an error.
    for file, data in rendered.items():
        _write(data, file)
    return list(rendered)


def llama_request(
    tree: AdapterTree, folder: str | os.PathLike[str], blend: Blend = ""
) -> LlamaRequest:
    """Return the server's flags for the files of `export_gguf_nodes`, and a path's request.

    Raises:
        PathError, SpecError: no such path, or no such blend; or the blend has weights per module.
        FormatError: a node's file is missing.

    >>> import torch
    >>> tree = AdapterTree()
    >>> q = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    >>> for path in ("fr", "fr/legal"): _ = tree.add(path, adapter=Adapter({"q": q}))
    >>> LlamaRequest((), ((0, 1.0), (1, 0.5))).body
    [{'id': 0, 'scale': 1.0}, {'id': 1, 'scale': 0.5}]
    """
    files = _files(tree, Path(os.path.abspath(as_path(folder))))
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise FormatError(
            f"{listing(missing, most=3)}: no such file",
            f"write the nodes first: lora-tree export ZOO --as gguf --nodes --out {folder}",
        )
    numbers = {path: number for number, path in enumerate(files)}
    lora: list[tuple[int, float]] = []
    for path, share in tree.shares(blend).items():
        if path not in numbers:
            continue
        if not isinstance(share, float):
            raise SpecError(
                f"{spelled(blend)}: {path}: llama.cpp has one scale for a file, and no weights per "
                "module",
                "give the weights to nodes, whose files hold them; or export the blend as one file",
            )
        node_weight = tree[path].weight
        # A weight per module is in the factors of the file: see `export_gguf_nodes`.
        scale = share * node_weight if isinstance(node_weight, float) else share
        if scale != 0.0:
            lora.append((numbers[path], scale))
    if not lora:
        # The server treats an empty list as no list, and uses the scales that it started with.
        lora = [(number, 0.0) for number in numbers.values()]
    return LlamaRequest(tuple(files.values()), tuple(lora))


def _files(tree: AdapterTree, folder: Path) -> dict[str, Path]:
    """Node → its file, for the nodes that have an adapter, in the order of the ids."""
    found: dict[str, Path] = {}
    for path in tree.paths():
        if tree[path].has_adapter:
            found[path] = folder / f"{path}.gguf"
    if not found:
        raise SpecError("no node of the tree has an adapter")
    return found


def _write(data: bytes, place: Path) -> None:
    with ExitStack() as undo:
        make_all(place.parent, undo)
        disk.replace(place, data)
        undo.pop_all()


@dataclass(frozen=True)
class _Form:
    """The GGUF form of adapters of one base.

    Args:
        gguf: the ``gguf`` package.
        model: the base, with shapes and no memory.
        kind: its ``model_type``.
    """

    gguf: Any
    model: Any
    kind: str

    @staticmethod
    def of(tree: AdapterTree, base: str | os.PathLike[str] | None) -> _Form:
        gguf = need("gguf", extra="gguf", what="export --as gguf")
        name = base if base is not None else tree.base
        if name is None:
            raise SpecError(
                "the tree names no base, and a GGUF adapter says its architecture",
                "name its folder or its hub id: --base FOLDER_OR_ID",
            )
        model = skeleton(name, what="export --as gguf")
        kind = str(model.config.model_type)
        if kind not in ARCHITECTURES:
            raise SpecError(
                f"{name}: model_type is {kind!r}, expected one of {listing(ARCHITECTURES)}: "
                "GGUF export was not tested with other architectures",
                "write a PEFT folder (--as portable), and convert it with llama.cpp's own "
                "convert_lora_to_gguf.py",
            )
        return _Form(gguf, model, kind)

    def render(self, adapter: Adapter) -> bytes:
        """Return the bytes of a GGUF adapter.

        Raises:
            FormatError: GGUF can't hold a module; names it.
            BaseMismatch: the base has no such module, or in another shape.
        """
        architecture = ARCHITECTURES[self.kind]
        check_none(adapter.overrides, "a GGUF adapter")
        tensors = dict(self._tensors(adapter, architecture))
        if not tensors:
            raise FormatError("an adapter without modules can't be written")
        with tempfile.TemporaryDirectory() as folder, foreign("gguf can't write the adapter"):
            # The package can only write to a named file: write a temporary one and read it back.
            file = Path(folder, "adapter.gguf")
            writer = self.gguf.GGUFWriter(file, architecture)
            writer.add_type(self.gguf.GGUFType.ADAPTER)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 0.0)
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor.contiguous().numpy())
            # The order of these three calls matters: the writer raises a ValueError otherwise.
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return file.read_bytes()

    def _tensors(self, adapter: Adapter, architecture: str) -> Mapping[str, Tensor]:
        """GGUF's names → A and B of every module."""
        known = {name: kind for kind, name in self.gguf.MODEL_ARCH_NAMES.items()}
        layers = self.model.config.num_hidden_layers
        names = self.gguf.get_tensor_name_map(known[architecture], layers)
        tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        factors: dict[str, Tensor] = {}
        for module, value in adapter.modules.items():
            gguf_name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            # A base with tied embeddings has no output.weight in its GGUF file, so llama.cpp would
            # find nothing to add the factors to.
            if gguf_name is None or (gguf_name == "output.weight" and tied):
                raise FormatError(
                    f"{module}: GGUF has no tensor of its own for it in {architecture}",
                    "leave the module out of the adapter",
                )
            if value.layout != LINEAR or value.A.ndim != 2 or value.bias is not None:
                raise FormatError(
                    f"{module}: llama.cpp takes factors of Linear layers without a bias, and these "
                    f"are {value.layout}",
                    "leave the module out of the adapter",
                )
            find_site(self.model, module).check_shape(value)
            A, B = self._factors(module, value)
            factors[f"{gguf_name}.lora_a"], factors[f"{gguf_name}.lora_b"] = A, B
        return factors

    def _factors(self, module: str, value: LowRank) -> tuple[Tensor, Tensor]:
        """Return A and B in fp32, with the rows of B in the order of GGUF."""
        folded = value.to(dtype=torch.float32).folded()
        A, B = folded.A.detach().cpu(), folded.B.detach().cpu()
        config = self.model.config
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads or config.num_attention_heads,
        }
        count = heads.get(module.rpartition(".")[2])
        if self.kind in PERMUTED and count is not None:
            # transformers stores the two rotary halves of a head one after the other, GGUF
            # interleaved.
            B = B.reshape(count, 2, -1, B.shape[-1]).transpose(1, 2).reshape(B.shape)
        return A, B
