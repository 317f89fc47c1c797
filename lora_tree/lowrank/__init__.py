"""One increment of one weight, kept as its factors, and the algebra on them.

    ΔW = scale · B A            A: (*batch, r, in)    B: (*batch, out, r)

    layout.py    how the (out, in) matrix lies in a module's weight
    fitting.py   whether A, B and a bias make one increment
    magnitude.py how large its numbers are, and which dtypes hold them
    value.py     LowRank, and what one value becomes: scaled, cast, truncated, dense
    cast.py      a value moved or rounded, and whether that lost a number
    qr_core.py   the (r, r) core of a product, and its nearest smaller rank
    adding.py    what several values make: their sum, their inner product
    drawing.py   new factors, whose product is nothing yet

Law: no operation builds an (out, in) matrix except `LowRank.dense`, and that one can be had in
blocks of rows.

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
