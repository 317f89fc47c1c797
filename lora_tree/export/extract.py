"""Extract an adapter from a tuned checkpoint and its base: for merged models, DoRA and others.

    D = W_tuned − W_base        one parameter at a time, in fp32 or wider
    D ≈ B A                     randomised SVD: Q = orth(D (Dᵀ D)² Ω), and the SVD of Qᵀ D
    error = ‖D − B A‖ / ‖D‖     of the factors as they are written, computed block by block

A parameter that differs only by a rounding (the tuned one in bf16, the base in fp32) counts as
unchanged. A change that no low rank can hold (norms, biases, a grown vocabulary) is listed by name,
and refused unless the caller says to leave it behind.

Law: the result depends on the two checkpoints and the bounds alone. The random numbers of each
module come from a fresh generator with a fixed seed.

Reference: Halko, Martinsson, Tropp, https://arxiv.org/abs/0909.4061 (Algorithms 4.4 and 5.1).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..algebra.arguments import check_factor_dtype
from ..errors import BaseMismatch, LoraTreeError, SpecError, listing, plural
from ..given import check_max_error, check_rank
from ..lowrank import EMBEDDING, LINEAR, PARAMETER, Layout, LowRank
from ..sites import ParameterSite, Site, find_site
from ..sites.conv import ConvSite
from ..sites.embedding import EmbeddingSite
from ..sites.linear import Conv1DSite
from .checkpoint_pair import CheckpointPair, open_own
from .unloaded_base import skeleton

__all__ = ["Extracted", "extract"]

SEED = 0
FIRST_RANK = 16
OVERSAMPLED = 8
POWER_STEPS = 2
ROUNDING = 1e-6
"""The tolerance added to ``max_error``, for the rounding of the factors themselves."""
BLOCK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Extracted:
    """The difference of two checkpoints as an adapter.

    Args:
        adapter: the factors, and its `Adapter.errors`.
        errors: module → ‖D − BA‖ / ‖D‖; every module that changed is in it.
        left: tensor → the reason why no low rank holds its change; the adapter lacks it.
        unchanged: the number of parameters that are equal in both.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    left: Mapping[str, str] = field(default_factory=dict)
    unchanged: int = 0

    @property
    def worst(self) -> float:
        """The largest error of a module; 0.0 if none changed."""
        return max(self.errors.values(), default=0.0)


@torch.no_grad()
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    ignore: bool = False,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> Extracted:
    """Return the difference between a fine-tuned model and its base, as an adapter.

    Memory: one parameter of both checkpoints in fp32, and its factors.

    Args:
        base, tuned: folders of transformers models saved as safetensors, in shards or one file.
        rank: the rank to keep; or the most to keep, if ``max_error`` is given too.
        max_error: the largest relative error allowed in any module.
        ignore: leave out changes that no low rank holds, instead of refusing them.
        dtype: round the factors to it; None: fp32.
        progress: called with (parameters compared, all parameters).
        trust_remote_code: run the base's own Python code.

    Raises:
        SpecError: neither bound was given, or one is not valid, or they can't both be met, or the
            factors are too large for ``dtype``; names the module.
        BaseMismatch: changes that no low rank holds, and not ``ignore``; or nothing changed; or the
            two are not of one architecture.
        FormatError: a folder has no whole safetensors checkpoint.
    """
    if rank is None and max_error is None:
        raise SpecError(
            "extract needs rank= or max_error=",
            "--rank 64, or --max-error 0.05 for the rank that each module needs",
        )
    if rank is not None:
        check_rank(rank)
    if max_error is not None:
        check_max_error(max_error)
    check_factor_dtype(dtype)
    old, new = open_own(base), open_own(tuned)
    model = skeleton(old.folder, what="extract", trust_remote_code=trust_remote_code)
    pair = CheckpointPair(model, old, new)
    factors = _ModuleFactors(rank, max_error, dtype or torch.float32)
    parameters = dict(model.named_parameters())
    left = dict(pair.unmatched())
    modules: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    unchanged = 0
    for done, name in enumerate(parameters):
        if progress is not None:
            progress(done, len(parameters))
        reason = pair.misfit(name)
        if reason is not None:
            left[name] = reason
            continue
        change = _change(pair, name)
        if change is None:
            unchanged += 1
            continue
        site = _site_of(model, name)
        reason = _why_left(model, name, site, change)
        if reason is not None or site is None:
            left[name] = reason or "no site"
            continue
        value, error = factors.of(site, change)
        modules[site.name], errors[site.name] = value, error
    _check_left(left, tuned, ignore=ignore)
    if not modules:
        raise BaseMismatch(
            f"{tuned}: no weight that can have an increment differs from {base}",
            "check that the two folders are the right ones: extract BASE TUNED",
        )
    nonzero_errors = {name: error for name, error in errors.items() if error}
    adapter = Adapter(modules, base=os.fspath(base), errors=nonzero_errors)
    return Extracted(adapter, dict(sorted(errors.items())), dict(sorted(left.items())), unchanged)


def _check_left(left: Mapping[str, str], tuned: object, *, ignore: bool) -> None:
    """Refuse changes that would be lost.

    Raises:
        BaseMismatch: there are some, and the caller did not say to leave them.
    """
    if not left or ignore:
        return
    reasons = [f"{name}: {reason}" for name, reason in sorted(left.items())]
    raise BaseMismatch(
        f"{tuned}: {plural(len(left), 'tensor')} changed in a way that no adapter can hold",
        *reasons[:20],
        *([f"and {len(reasons) - 20} more"] if len(reasons) > 20 else []),
        "to leave these changes behind: --ignore, ignore=True",
    )


def _change(pair: CheckpointPair, parameter: str) -> Tensor | None:
    """Return the difference of a parameter, in fp32 or wider; None if nothing changed."""
    both = pair.read_both(parameter)
    if both is None:
        return None
    old, new = both
    # One of the two may have been saved in a narrower dtype: rounding alone is no change.
    if torch.equal(old.to(new.dtype), new) or torch.equal(new.to(old.dtype), old):
        return None
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    return new.to(wide) - old.to(wide)


def _site_of(model: nn.Module, parameter: str) -> Site | None:
    """Return the site whose weight the parameter is, or the raw parameter's own site."""
    module, _, leaf = parameter.rpartition(".")
    try:
        site = find_site(model, module)
        if site.weight_name == leaf:
            return site
    except LoraTreeError:
        pass  # the module takes no delta; the parameter itself may
    try:
        return find_site(model, parameter)
    except LoraTreeError:
        return None


def _why_left(model: nn.Module, name: str, site: Site | None, change: Tensor) -> str | None:
    """Return the reason why a changed parameter can't be in the adapter; None if it can."""
    if change.ndim < 2 or site is None:
        return f"{tuple(change.shape)}: a norm, a bias or another vector"
    if not change.isfinite().all():
        return "its difference is not finite"
    if isinstance(site, ConvSite) and site.conv.groups > 1:
        return "a grouped convolution, whose kernel is no one matrix"
    if isinstance(site, ParameterSite) and change.ndim not in (2, 3):
        return f"{tuple(change.shape)}: no matrix, and no batch of them"
    own = model.get_parameter(name)
    sharing = []
    # By default named_parameters lists a shared parameter once, which would hide the tie.
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is own and other != name:
            sharing.append(other)
    if sharing:
        return f"tied to {listing(sharing)}: merging it would change both"
    return None


class _ModuleFactors:
    """The factors of changes, within the bounds that the caller gave.

    Args:
        rank, max_error: as for `extract`.
        dtype: that they are rounded to.
    """

    def __init__(self, rank: int | None, max_error: float | None, dtype: torch.dtype) -> None:
        self._rank, self._max_error, self._dtype = rank, max_error, dtype

    def of(self, site: Site, change: Tensor) -> tuple[LowRank, float]:
        """Return a site's change as factors, and its relative error.

        Raises:
            SpecError: the bounds can't both be met, or the factors are too large for the dtype;
                names the module.
        """
        rows = site.rows(change)  # (batch, a, b): one batch per expert
        # The products below may overflow although the change itself fits, so all numbers are
        # brought below 1. By a power of 4, because each factor gets its root, without rounding.
        _, exponent = math.frexp(float(rows.abs().max()))
        root = 2.0 ** ((exponent + 1) // 2)
        rows = rows / root / root
        # The norm is taken in fp64: `_smallest` subtracts a nearly equal sum from its square, and
        # in fp32 little more than rounding errors would remain.
        norm = float(torch.linalg.vector_norm(rows.double()))
        most = min(rows.shape[-2:])
        bound = min(self._rank or most, most)
        # If only a rank is given, compute that rank at once. For an error, start with a small rank,
        # which is cheap to try, and double it.
        rank = bound if self._max_error is None else min(FIRST_RANK, bound)
        while True:
            left, right, kept = _range_finder(rows, rank)
            keep = self._smallest(kept, norm, rank)
            if keep is not None or rank >= bound:
                break
            rank = min(
                2 * rank, bound
            )  # this rank leaves too large an error: the spectrum falls slowly
        keep = rank if keep is None else keep
        left = (left[..., :keep] * root).to(self._dtype)
        right = (right[..., :keep, :] * root).to(self._dtype)
        if not (left.isfinite().all() and right.isfinite().all()):
            raise SpecError(
                f"{site.name}: the factors of its change are too large for {str(self._dtype)[6:]}",
                "round to a wider dtype: dtype=torch.float64",
            )
        error = _residual(rows, left.to(rows.dtype) / root, right.to(rows.dtype) / root) / norm
        if self._max_error is not None and error > self._max_error + ROUNDING:
            raise SpecError(
                f"{site.name}: relative error {error:.3g} at rank {keep} in "
                f"{str(self._dtype)[6:]}, max_error={self._max_error:g}",
                "allow a larger rank or error, or keep the factors in fp32",
            )
        return _value(site, left.contiguous(), right.contiguous()), error

    def _smallest(self, kept: Tensor, norm: float, rank: int) -> int | None:
        """Return the smallest rank within ``max_error``; None if more than ``rank`` is needed.

        Args:
            kept: (k,) the squared singular values, summed over the batch.
            norm: of the whole change.
        """
        if self._max_error is None:
            return rank
        # Rounding can make the difference a little less than zero, and its root would be NaN.
        rest = (norm**2 - kept.cumsum(0)).clamp(min=0).sqrt() / norm
        within = (rest <= self._max_error).nonzero()
        return None if len(within) == 0 else int(within[0]) + 1


def _range_finder(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return left (batch, a, k), right (batch, k, b) and the squared singular values (k,)."""
    *_, a, b = rows.shape
    width = min(rank + OVERSAMPLED, a, b)
    # The random numbers are drawn on the CPU and then moved: for the same seed a GPU's generator
    # gives others, so the result would depend on the device.
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    omega = torch.randn(b, width, generator=generator, dtype=rows.dtype).to(rows.device)
    Q, _ = torch.linalg.qr(rows @ omega)
    # Each step multiplies the ratio of two singular values by its square, so the small ones fade.
    for _ in range(POWER_STEPS):
        # Orthonormalise after each product: otherwise all columns would turn toward the largest
        # singular vectors, and rounding would lose the others.
        P, _ = torch.linalg.qr(rows.mT @ Q)
        Q, _ = torch.linalg.qr(rows @ P)
    U, S, Vh = torch.linalg.svd(Q.mT @ rows, full_matrices=False)
    k = min(rank, S.shape[-1])
    # Each factor gets the root of every singular value. So both have the same magnitude, and
    # neither overflows or underflows in fp16 before the other.
    root = S[..., :k].sqrt()
    left = (Q @ U[..., :, :k]) * root[..., None, :]
    right = root[..., :, None] * Vh[..., :k, :]
    kept = S[..., :k].double().square().reshape(-1, k).sum(0)
    return left, right, kept


def _residual(rows: Tensor, left: Tensor, right: Tensor) -> float:
    """Return ‖rows − left @ right‖ of the rounded factors, computed in blocks of rows."""
    total = 0.0
    right = right.to(rows.dtype)
    for start in range(0, rows.shape[-2], BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        off = rows[..., block, :] - left[..., block, :].to(rows.dtype) @ right
        total += float(off.double().square().sum())
    return math.sqrt(total)


def _value(site: Site, left: Tensor, right: Tensor) -> LowRank:
    """Return the increment that adds left @ right to the weight as the module stores it."""
    if isinstance(site, ParameterSite):
        if site.is_transposed:
            return LowRank(left.mT.contiguous(), right.mT.contiguous(), layout=PARAMETER)
        return LowRank(right, left, layout=PARAMETER)
    left, right = left[0], right[0]
    if isinstance(site, EmbeddingSite):
        return LowRank(left.mT.contiguous(), right.mT.contiguous(), layout=EMBEDDING)
    if isinstance(site, Conv1DSite):
        return LowRank(left.mT.contiguous(), right.mT.contiguous(), layout=LINEAR)
    if isinstance(site, ConvSite):
        return LowRank(right, left, layout=Layout("conv", tuple(site.conv.kernel_size)))
    return LowRank(right, left, layout=LINEAR)
