"""One increment of one weight, stored as its factors, and the algebra on them.

    ΔW = scale · B A            A: (*batch, r, in)    B: (*batch, out, r)

    layout.py    the place of the (out, in) matrix in a module's weight
    fitting.py   checks that A, B and a bias make one increment
    magnitude.py whether its numbers are finite and fit into a dtype
    value.py     LowRank, and operations on one value: scale, cast, truncate, dense
    cast.py      moves or rounds a value, and tells whether a number changed
    qr_core.py   the (r, r) core of a product, and its nearest smaller rank
    adding.py    operations on several values: sum, inner product
    drawing.py   initial factors, whose product is zero

Law: no operation builds an (out, in) matrix except `LowRank.dense`; `LowRank.dense_blocks` yields
it in blocks of rows.

References: LoRA, https://arxiv.org/abs/2106.09685 §4.1 (ΔW = α/r · B A);
rsLoRA, https://arxiv.org/abs/2312.03732 (α/√r).
"""

from .adding import concat, inner, same_place, stacked
from .drawing import draw_again, draw_uniform
from .layout import EMBEDDING, LINEAR, PARAMETER, Layout
from .magnitude import all_finite, spans
from .value import LowRank, Truncated, is_sharded

__all__ = [
    "EMBEDDING",
    "LINEAR",
    "PARAMETER",
    "Layout",
    "LowRank",
    "Truncated",
    "all_finite",
    "concat",
    "draw_again",
    "draw_uniform",
    "inner",
    "is_sharded",
    "same_place",
    "spans",
    "stacked",
]
