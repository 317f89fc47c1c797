"""Check whether a merged checkpoint holds a path: compare every tensor with its expected sum.

    equal       the bits of the sum, computed once in fp32 and rounded once
    rounding    the same sum by another arithmetic: node by node, or in fp16 or bf16
    other       another sum

If it is another sum, inner products with the factors tell which. With D_n the increments of node n
and M = W_merged − W_base, the squared distance of any sum Σ m_n D_n from M is

    ‖M − Σ m_n D_n‖² = ‖M‖² − 2 mᵀ b + mᵀ G m        b_n = ⟨M, D_n⟩,  G_nk = ⟨D_n, D_k⟩

b and G are a few numbers per tensor. So every common mistake (`merge_guess`) is tried on all
tensors at once, and the best multiples m are a least-squares problem of the size of the lineage.

Memory: one parameter of both checkpoints, and a block of its rows in fp64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..blend import Blend, spelled
from ..engine.arithmetic import Scratch, add_bias, add_weight, exact_mode
from ..errors import agreeing, listing, plural
from ..renaming import Renaming
from ..tree import AdapterTree
from ..weights import Weight, weight_at
from .checkpoint import base_folder
from .checkpoint_pair import CheckpointPair, open_own
from .merge_guess import (
    EXPECTED,
    NEAR,
    Fit,
    Guess,
    best_guess,
    hypotheses,
    multiples_text,
    solve_multiples,
)
from .node_search import NodeSearch, base_with_overrides
from .tensor_comparison import NARROW, WeightPart, compare_tensor, rounding_unit, same_bits
from .unloaded_base import skeleton
from .writes import Write, writes

__all__ = ["MergedCheck", "TensorCheck", "check_merged"]

Verdict: TypeAlias = Literal["equal", "rounding", "other"]


@dataclass(frozen=True)
class TensorCheck:
    """One parameter of a merged checkpoint.

    Args:
        name: of the parameter, as the model calls it.
        verdict: ``equal``, ``rounding`` or ``other``.
        error: ‖got − expected‖ / ‖expected − base‖; of a parameter that the path does not change,
            ‖got − base‖ / ‖base‖.
        said: the likely cause, if one was found.
    """

    name: str
    verdict: Verdict
    error: float = 0.0
    said: str = ""


@dataclass(frozen=True)
class MergedCheck:
    """A merged checkpoint, compared with a path.

    Args:
        path: the path or blend.
        tensors: every parameter of the base.
        guess: a sentence about what happened.
        multiples: node → how many times its increments are in the checkpoint, by least squares;
            1.0 is right. Empty if nothing differs.
    """

    path: str
    tensors: tuple[TensorCheck, ...]
    guess: str
    multiples: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_that_path(self) -> bool:
        """Return whether every tensor is equal to its sum, up to rounding."""
        return all(tensor.verdict != "other" for tensor in self.tensors)

    def count(self, verdict: Verdict) -> int:
        """Return the number of tensors with a verdict."""
        return sum(tensor.verdict == verdict for tensor in self.tensors)


@torch.no_grad()
def check_merged(
    tree: AdapterTree,
    blend: Blend,
    merged: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> MergedCheck:
    """Compare a merged checkpoint with the path that it should hold, and guess what happened.

    Args:
        tree: the tree of the path. Its other nodes are tried as well if the path's own don't
            explain the checkpoint.
        blend: the path or blend.
        merged: the folder of the merged model, in safetensors.
        base: the folder of the base that it was merged into, or its hub id; None: the tree's base.
        progress: called with (parameters compared, all parameters).
        trust_remote_code: run the base's own Python code.

    Raises:
        PathError: a node does not exist.
        SpecError: no base is known, or transformers can't read its config.
        FormatError: a folder has no whole safetensors checkpoint.
        BaseMismatch: the path does not fit the base.

    See docs/export.md for an example that runs.
    """
    source = base_folder(tree, base)
    model = skeleton(source, what="check --merged", trust_remote_code=trust_remote_code)
    pair = CheckpointPair(model, open_own(source), open_own(merged))
    by_parameter = {write.parameter: write for write in writes(tree, blend, model, pair.old_names)}
    comparing = _Comparing(pair, by_parameter, tree, tree.coefficients(blend))
    for name, reason in sorted(pair.unmatched().items()):
        comparing.checks.append(TensorCheck(name, "other", 1.0, reason))
    names = [name for name, _ in model.named_parameters()]
    with exact_mode(torch.device("cpu")):
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names))
            comparing.compare(name)
        guess = comparing.guess(model)
    return MergedCheck(spelled(blend), tuple(comparing.checks), guess.text, guess.multiples)


class _Comparing:
    """The state of a comparison, which takes one parameter after the other.

    Args:
        pair: the base and the merged checkpoint.
        by_parameter: parameter → what the path adds to it.
        tree: with the nodes of the path.
        coefficients: node → its coefficient in the path.
    """

    def __init__(
        self,
        pair: CheckpointPair,
        by_parameter: Mapping[str, Write],
        tree: AdapterTree,
        coefficients: Mapping[str, Weight],
    ) -> None:
        self._pair, self._writes = pair, by_parameter
        self._tree, self._coefficients = tree, coefficients
        weighted = [node for node in coefficients if tree[node].weight != 1.0]
        self._tried = hypotheses(list(coefficients), weighted)
        self._scratch = Scratch()
        self._fits: list[Fit] = []
        self.checks: list[TensorCheck] = []

    # ------------------------------------------------------------------ one parameter
    def compare(self, name: str) -> None:
        """Compare one parameter, and append the result to `checks`."""
        reason = self._pair.misfit(name)
        if reason is not None:
            self.checks.append(TensorCheck(name, "other", 1.0, reason))
            return
        both = self._pair.read_both(name)
        if both is None:
            return  # tied to another parameter, which is compared
        old, new = both
        write = self._writes.get(name)
        base, old = old, base_with_overrides(write, old)
        if not new.isfinite().all():
            check = TensorCheck(name, "other", math.inf, "not finite")
        elif not old.isfinite().all():
            check = TensorCheck(name, "other", math.inf, "the base's own is not finite")
        elif write is None:
            check = _untouched(name, old, new)
        elif write.overrides and same_bits(base.to(new.dtype), new) and not same_bits(old, base):
            check = TensorCheck(name, "other", 1.0, "the base's own: what replaces it was left out")
        elif not write.values:
            check = _replaced(name, old, new)
        elif write.is_bias:
            check = self._bias(name, write, old, new)
        else:
            check = self._weight(name, write, old, new)
        self.checks.append(check)

    def _bias(self, name: str, write: Write, old: Tensor, new: Tensor) -> TensorCheck:
        want = old.double()
        add_bias(want, old, write.values)
        if same_bits(want.to(new.dtype), new) or same_bits(want.to(old.dtype).to(new.dtype), new):
            return TensorCheck(name, "equal")
        change = float((want - old.double()).norm())
        error = float((new.double() - want).norm()) / (change or 1.0)
        close = rounding_unit(old.dtype, new.dtype) * (len(write.values) + 1)
        is_close = (new.double() - want).abs() <= close * (old.double().abs() + want.abs())
        if is_close.all():
            return TensorCheck(name, "rounding", error)
        return TensorCheck(name, "other", error, "another bias")

    def _weight(self, name: str, write: Write, old: Tensor, new: Tensor) -> TensorCheck:
        """Compare a weight with its sum: first its bits, then its elements, then as a fit."""
        is_equal = any(same_bits(want, new) for want in self._sums(write, old, new.dtype))
        comparison = compare_tensor(write, self._parts(write), name, old, new)
        self._fits.append(comparison.fit)
        if is_equal:
            return TensorCheck(name, "equal")
        if same_bits(_node_by_node(write, old, new.dtype), new):
            return TensorCheck(
                name, "rounding", comparison.error, "rounded node by node, as by PEFT"
            )
        best, _ = best_guess([comparison.fit], self._tried)
        if best is EXPECTED:
            for dtype, worst in comparison.worst.items():
                if worst <= 1.0:
                    is_own = dtype in (old.dtype, new.dtype)
                    cause = "" if is_own else f"as of {str(dtype)[6:]} arithmetic"
                    return TensorCheck(name, "rounding", comparison.error, cause)
            return TensorCheck(name, "other", comparison.error, "some of its elements differ")
        cause = best.text if best is not None else "another sum"
        return TensorCheck(name, "other", comparison.error, cause)

    def _sums(self, write: Write, old: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the sum in the base's dtype, and also in the merged one's if that differs."""
        target = old.clone()
        add_weight(write.site, target, old, write.values, self._scratch)
        yield target.to(dtype)
        if dtype != old.dtype:
            cast = old.to(dtype)
            target = cast.clone()
            add_weight(write.site, target, cast, write.values, self._scratch)
            yield target

    def _parts(self, write: Write) -> list[WeightPart]:
        """Return the scale, weight and rank of each node's increments."""
        found = []
        for node, value in zip(write.nodes, write.values, strict=True):
            coefficient = weight_at(self._coefficients[node], write.module)
            scale = value.scale / coefficient if coefficient else value.scale
            weight = weight_at(self._tree[node].weight, write.module)
            found.append(WeightPart(scale, weight, value.rank))
        return found

    # ------------------------------------------------------------------ all of them
    def guess(self, model: Any) -> Guess:
        """Return the likeliest explanation of all differences."""
        others = [check for check in self.checks if check.verdict == "other"]
        if not others:
            ways = {check.said for check in self.checks if check.verdict == "rounding"}
            way = "".join(f", {cause}" for cause in sorted(ways) if cause)
            return Guess(f"the path itself{way}")
        outside = [
            c.name for c in others if c.name not in self._writes or self._writes[c.name].is_bias
        ]
        outside_text = ""
        if outside:
            verb = agreeing(len(outside), "differs", "differ")
            tensors = plural(len(outside), "tensor")
            outside_text = f"; {tensors} beside its weights {verb}: {listing(outside, most=3)}"
        if not self._fits:
            return Guess(f"merged from another model, or into another base{outside_text}")
        nodes = list(self._coefficients)
        nodes = [node for node in nodes if any(node in fit.nodes for fit in self._fits)]
        multiples, unexplained = solve_multiples(self._fits, nodes)
        best, _ = best_guess(self._fits, self._tried)
        if best is EXPECTED:
            wrong = [check.name for check in others if check.name not in outside]
            text = "the path"
            if wrong:
                hold = plural(len(wrong), "tensor holds", "tensors hold")
                text += f", but {hold} something else: {listing(wrong, most=3)}"
            return Guess(text + outside_text, multiples)
        if best is not None:
            return Guess(best.text + outside_text, multiples)
        expected_square = math.fsum(fit.expected for fit in self._fits)
        noise = math.fsum(fit.noise for fit in self._fits)
        weights_text = multiples_text(multiples)
        if unexplained <= max(noise, NEAR**2 * expected_square):
            return Guess(f"the path with other weights: {weights_text}{outside_text}", multiples)
        search = NodeSearch.of(self._pair, self._writes, self._fits, multiples)
        added = search.added(self._tree, Renaming(model), self._coefficients)
        weights_text = multiples_text(search.multiples)
        parts = [weights_text] if weights_text else []
        parts += [f"{node} was merged as well, {times:.3g} times" for node, times in added.items()]
        if not added:
            share = math.sqrt(unexplained / math.fsum(fit.change_square for fit in self._fits))
            parts.append(f"{share:.0%} of the change comes from no node of this tree")
        return Guess("; ".join(parts) + outside_text, {**search.multiples, **added})


# ---------------------------------------------------------------------- one tensor
def _node_by_node(write: Write, old: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum as PEFT computes it: every product and every partial sum is rounded."""
    target = old.to(dtype).clone()
    rows = write.site.rows(target)
    for value in write.values:
        left, right = write.site.sides_of(value)
        product = (left.float() @ right.float()) * value.scale
        rows += product.to(value.A.dtype)
    # `rows` may be a copy, if the weight is not laid out row by row.
    return rows.reshape(target.shape)


def _replaced(name: str, want: Tensor, new: Tensor) -> TensorCheck:
    """Compare a parameter that the path replaces but adds nothing to."""
    check = _untouched(name, want, new)
    if check.verdict != "other":
        return check
    return replace(check, said="not the tensor that the path puts in its place")


def _untouched(name: str, old: Tensor, new: Tensor) -> TensorCheck:
    """Compare a parameter that the path does not change."""
    if same_bits(old.to(new.dtype), new) or same_bits(new.to(old.dtype), old):
        return TensorCheck(name, "equal")
    for dtype in NARROW:
        if same_bits(old.to(dtype).to(new.dtype), new):
            cause = f"as of {str(dtype)[6:]} arithmetic"
            return TensorCheck(name, "rounding", rounding_unit(dtype), cause)
    error = float((new.double() - old.double()).norm() / (old.double().norm() or 1.0))
    return TensorCheck(name, "other", error, "the path does not change it")
