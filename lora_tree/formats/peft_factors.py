"""Turn the factors of one module or parameter into its `LowRank`.

    kind             A in the file      B in the file      LowRank
    Linear, Conv1D   (r, in)            (out, r)           the same
    Embedding        (r, vocab)         (dim, r)           the same
    ConvNd           (r, in, *kernel)   (out, r, 1, …)     A (r, in·kernel), B (out, r)
      with groups    (r, in, *kernel)   (out, r/G, 1, …)   A (G, r/G, in·kernel), B (G, out/G, r/G)
    raw parameter    (E·r, in)          (out, r·E)         A (E, r, in), B (E, out, r)

The rows of a raw parameter's A are expert-major, the columns of its B rank-major. Conv1D is the
transformers class of GPT-2: its weight is stored (in, out), but PEFT's factors are those of a
Linear.

Law: a factor whose shape does not follow from r is refused, never reshaped to fit.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import FormatError
from ..lowrank import EMBEDDING, PARAMETER, Layout, LowRank
from .peft_config import PeftConfig

__all__ = ["FactorReader", "Parts"]

Parts = dict[str, Tensor]
"""The tensors of one wrapper by their names in a key: ``lora_A``, ``lora_B``, ``lora_B.bias``, …"""


class FactorReader:
    """Turn the tensors of one wrapper into a `LowRank`, by the config of their file.

    Args:
        config: of the same folder.
        where: the weights file, as errors name it.
    """

    def __init__(self, config: PeftConfig, where: str) -> None:
        self._config = config
        self._where = where

    def module(self, name: str, parts: Parts, *, rank_of: str) -> LowRank:
        """Return the increment of a Linear, Conv1D, Embedding or convolution.

        Args:
            rank_of: the module whose r and lora_alpha apply.

        Raises:
            FormatError: a factor is missing, or its shape is not the one that r gives; names the
                module.
        """
        A, B = self._pair(name, parts)
        r = self._config.rank(rank_of)
        scale = self._config.scale(rank_of)
        is_embedding = "lora_embedding_A" in parts
        dimensions = (2,) if is_embedding else (2, 3, 4, 5)
        if A.ndim not in dimensions or A.shape[0] != r:
            expected = f"({r}, in)" if A.ndim == 2 else f"({r}, in, *kernel)"
            raise self._misshapen(name, "A", A, expected, r)
        if A.ndim > 2:
            return self._convolution(name, parts, r, scale)
        if B.ndim != 2 or B.shape[1] != r:
            raise self._misshapen(name, "B", B, f"(out, {r})", r)
        if is_embedding:
            return LowRank(A, B, scale, None, EMBEDDING)
        return LowRank(A, B, scale, self._bias(name, parts, B.shape[0]), Layout("linear"))

    def parameter(self, name: str, parts: Parts) -> LowRank:
        """Return the increment of a raw parameter, of one matrix or of one per expert.

        Raises:
            FormatError: as `module`; or there is a bias, which PEFT does not have for a parameter.
        """
        A, B = self._pair(name, parts)
        r = self._config.rank(name)
        if "lora_B.bias" in parts or "lora_A" not in parts:
            raise FormatError(
                f"{self._where}: {name}: got {sorted(parts)} for a raw parameter, "
                "expected lora_A and lora_B and nothing else",
                "save the adapter again with PEFT",
            )
        if A.ndim != 2 or A.shape[0] % r:
            raise self._misshapen(name, "A", A, f"(experts · {r}, in)", r)
        if B.ndim != 2 or B.shape[1] != A.shape[0]:
            raise self._misshapen(name, "B", B, f"(out, {A.shape[0]})", r)
        # PEFT (0.21) computes all experts in one product: it reshapes A to (E, r, in), but
        # B to (out, r, E).
        A = A.reshape(-1, r, A.shape[1])  # (E, r, in)
        B = B.reshape(B.shape[0], r, -1).permute(2, 0, 1)  # (E, out, r)
        return LowRank(A, B, self._config.scale(name), None, PARAMETER)

    def _convolution(self, name: str, parts: Parts, r: int, scale: float) -> LowRank:
        A, B = parts["lora_A"], parts["lora_B"]
        # PEFT builds B as a convolution with the base's groups, so its second size is r / groups.
        groups = 0
        if B.ndim == A.ndim and B.shape[1]:
            groups = r // B.shape[1]
        if (
            groups == 0
            or groups * B.shape[1] != r
            or B.shape[0] % groups
            or math.prod(B.shape[2:]) != 1
        ):
            ones = ", 1" * (A.ndim - 2)
            raise self._misshapen(name, "B", B, f"(out, {r} / groups{ones})", r)
        bias = self._bias(name, parts, B.shape[0])
        layout = Layout("conv", tuple(A.shape[2:]))
        A = A.flatten(1)  # (r, in·kernel)
        B = B.flatten(1)  # (out, r/G)
        if groups > 1:
            # Not block-diagonal: PEFT's A is not a grouped convolution, so each group's A reads all
            # input channels.
            A = A.reshape(groups, -1, A.shape[1])  # (G, r/G, in·kernel)
            B = B.reshape(groups, -1, B.shape[1])  # (G, out/G, r/G)
        return LowRank(A, B, scale, bias, layout)

    def _pair(self, name: str, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return A and B.

        Raises:
            FormatError: one is missing, or there is more than A, B and the bias that the config
                announces.
        """
        is_embedding = any(part.startswith("lora_embedding") for part in parts)
        kind = "lora_embedding" if is_embedding else "lora"
        first, second = f"{kind}_A", f"{kind}_B"
        present = set(parts)
        if self._config.lora_bias and not is_embedding:
            present.discard("lora_B.bias")
        missing = {first, second} - present
        extra = present - {first, second}
        if missing:
            raise FormatError(
                f"{self._where}: {name}: {' and '.join(sorted(missing))} missing, found "
                f"{sorted(parts)}",
                "half a pair adds nothing: save the adapter again, or download it again",
            )
        if extra == {"lora_B.bias"}:
            raise FormatError(
                f"{self._where}: {name}: unexpected lora_B.bias; adapter_config.json has lora_bias "
                "= false",
                "the two files are not of one adapter: save it again with PEFT",
            )
        if extra:
            raise FormatError(
                f"{self._where}: {name}: unexpected {' and '.join(sorted(extra))}, "
                f"expected {first} and {second} alone",
                "a module is either an embedding or a Linear: save the adapter again with PEFT",
            )
        return parts[first], parts[second]

    def _bias(self, name: str, parts: Parts, out: int) -> Tensor | None:
        if not self._config.lora_bias:
            return None
        bias = parts.get("lora_B.bias")
        if bias is None:
            raise FormatError(
                f"{self._where}: {name}: lora_B.bias missing; adapter_config.json has lora_bias = "
                "true",
                "the two files are not of one adapter: save it again with PEFT",
            )
        if bias.shape != (out,):
            raise FormatError(
                f"{self._where}: {name}: lora_B.bias is {tuple(bias.shape)}, expected ({out},)"
            )
        return bias

    def _misshapen(self, name: str, half: str, t: Tensor, expected: str, r: int) -> FormatError:
        return FormatError(
            f"{self._where}: {name}: lora_{half} is {tuple(t.shape)}, expected {expected}",
            f"{self._config.where} gives it r = {r}",
        )
