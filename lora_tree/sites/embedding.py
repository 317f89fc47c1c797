"""Sites of embeddings: the weight is (vocab, dim); PEFT's delta, (dim, vocab), is transposed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BaseMismatch
from ..lowrank import EMBEDDING, Layout, LowRank
from .site import Site

__all__ = ["EmbeddingSite"]


class EmbeddingSite(Site):
    """``y = W[ids]``, times ``embed_scale`` if the module has one (Gemma, BART)."""

    layers = "Embedding"

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return isinstance(module, nn.Embedding)

    @property
    def layout(self) -> Layout:
        return EMBEDDING

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        assert isinstance(self.module, nn.Embedding)
        return self.module.embedding_dim, self.module.num_embeddings

    def check(self, value: LowRank) -> None:
        super().check(value)
        if getattr(self.module, "max_norm", None) is not None:
            raise BaseMismatch(
                f"{self.name}: the embedding renormalises its rows at every look-up (max_norm), "
                "which does not add up",
                "leave this module out of the adapter",
            )

    @property
    def why_merged_only(self) -> str | None:
        is_plain = type(self.module).forward is nn.Embedding.forward
        is_scaled = getattr(self.module, "embed_scale", None) is not None
        # A quantised embedding has a weight of another class and can't be merged, so its forward
        # is trusted: it must differ from nn.Embedding's.
        if is_plain or is_scaled or type(self.weight) is not nn.Parameter:
            return None
        return (
            f"{type(self.module).__name__} has a forward of its own, "
            "which may look up other rows than it is given"
        )

    @property
    def why_no_rows(self) -> str | None:
        return self.why_merged_only

    def with_rows(
        self, out: Tensor, x: Tensor, rows: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        # For each id, the row that it looks up; other ids keep the module's output.
        hits = x.unsqueeze(-1) == rows  # (…, rows)
        looked_up = F.embedding(hits.int().argmax(-1), values)
        return torch.where(hits.any(-1, keepdim=True), self._scaled(looked_up).to(out.dtype), out)

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        return value.A.mT[None], value.B.mT[None]

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        return x.shape[1:]

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.mT)  # (…) → (…, r)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        return self._scaled(F.linear(low, B))  # (…, r) → (…, dim)

    def _scaled(self, looked_up: Tensor) -> Tensor:
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return looked_up
        # An fp32 scale would promote bf16 numbers to a wider dtype than the output's.
        return looked_up * (scale.to(looked_up.dtype) if isinstance(scale, Tensor) else scale)
