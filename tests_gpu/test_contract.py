"""The contract of every kind of site and of every form of a routed batch, on CUDA.

The tests are those of the CPU, which compare with dense float64 algebra; here they make all tensors
on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_route import (
    test_every_row_is_what_it_is_with_the_dense_weight_of_its_own_path,
)
from test_sites import (
    test_a_narrow_base_differs_from_the_rounded_sum_in_one_entry_of_a_thousand_at_most,
    test_merged_weight_is_the_dense_sum_rounded_once,
    test_unmerged_output_and_input_gradient_are_those_of_the_dense_weight,
    test_unmerged_the_factors_have_the_gradients_of_the_dense_sum,
)

__all__ = [
    "test_a_narrow_base_differs_from_the_rounded_sum_in_one_entry_of_a_thousand_at_most",
    "test_every_row_is_what_it_is_with_the_dense_weight_of_its_own_path",
    "test_merged_weight_is_the_dense_sum_rounded_once",
    "test_unmerged_output_and_input_gradient_are_those_of_the_dense_weight",
    "test_unmerged_the_factors_have_the_gradients_of_the_dense_sum",
]

# torch warns of this in the thread of a first backward, and then sets the context.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a test's tensors on the device; convolutions compute in fp32 like the base, not TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device("cuda"):
        yield
