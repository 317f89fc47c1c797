"""safetensors files against the package of that name: what it writes for us, and what our reader
makes of a header.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_tree.errors import FormatError
from lora_tree.formats.safetensors import open_tensors, parse_header, read_tensors, render_tensors
from lora_tree.overlay import over

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


# ---------------------------------------------------------------------- written
def laid_out(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The file by hand, number by number."""
    header: dict[str, Any] = (
        {"__metadata__": dict(sorted(metadata.items()))} if tensors or metadata else {}
    )
    body = b""
    for kind, dtype in DTYPES.items():  # wide ones first, bf16 before fp16
        for name in sorted(tensors):
            t = tensors[name]
            if t.dtype == dtype:
                numbers = (
                    bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist())
                    if t.numel()
                    else b""
                )
                offsets = [len(body), len(body) + len(numbers)]
                header[name] = {"dtype": kind, "shape": [*t.shape], "data_offsets": offsets}
                body += numbers
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda n: n != "__metadata__"
)


@given(
    st.lists(NAMES, unique=True, max_size=6),
    st.dictionaries(NAMES, NAMES, max_size=5),
    st.randoms(),
)
def test_a_file_is_the_same_bytes_whatever_the_order(
    names: list[str], metadata: dict[str, str], draw: random.Random
) -> None:
    kinds = list(DTYPES.values())
    tensors = {
        n: torch.randn([draw.randint(1, 3) for _ in range(draw.randint(0, 3))]).to(
            draw.choice(kinds)
        )
        for n in names
    }
    data = render_tensors(tensors, metadata)
    assert data == laid_out(tensors, metadata)
    turned = dict(draw.sample(sorted(tensors.items(), key=lambda item: item[0]), len(tensors)))
    assert render_tensors(turned, dict(reversed(metadata.items()))) == data


def test_tensors_may_share_memory_and_lie_askew() -> None:
    whole = torch.randn(4, 6)
    tensors = {
        "a": whole,
        "b": whole,
        "c": whole.mT,
        "d": whole[1:3, ::2],
        "e": whole.half()[0],
        "none": whole[:0],
    }
    assert render_tensors(tensors, {"format": "pt"}) == laid_out(tensors, {"format": "pt"})


def test_what_can_not_be_written_is_an_error_of_ours() -> None:
    with pytest.raises(FormatError, match=r"x: dtype torch\.int64 is not written"):
        render_tensors({"x": torch.ones(1, dtype=torch.int64)}, {})
    with pytest.raises(FormatError, match="safetensors can't write it"):
        render_tensors({"\ud800": torch.ones(1)}, {})


def test_a_package_that_takes_bytes_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.8 its entries were dicts."""
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(3).bfloat16(), "none": torch.ones(0)}
    wanted = render_tensors(tensors, {"format": "pt"})
    if not hasattr(safetensors, "TensorSpec"):
        return
    made, real = safetensors.TensorSpec, safetensors.serialize
    monkeypatch.delattr(safetensors, "TensorSpec")

    def of_bytes(entries: dict[str, dict[str, Any]], metadata: dict[str, str]) -> bytes:
        held = {
            n: torch.frombuffer(bytearray(e["data"] or b"\0"), dtype=torch.uint8)
            for n, e in entries.items()
        }
        places = {n: (t.data_ptr(), len(entries[n]["data"])) for n, t in held.items()}
        specs = {
            n: made(
                dtype=e["dtype"], shape=e["shape"], data_ptr=places[n][0], data_len=places[n][1]
            )
            for n, e in entries.items()
        }
        return real(specs, metadata)

    monkeypatch.setattr(safetensors, "serialize", of_bytes)
    assert render_tensors(tensors, {"format": "pt"}) == wanted


# ------------------------------------------------------------------- read, by us and by the package
class Headers:
    """Headers with the numbers they speak of: good ones, and ones with something wrong."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def one(self) -> tuple[bytes, bytes]:
        """A header and what follows it."""
        r = self.r
        fields, nbytes = self.good()
        kind = r.random()
        if kind < 0.3:
            head = json.dumps(fields, ensure_ascii=r.random() < 0.5).encode() + b" " * r.randint(
                0, 9
            )
        elif kind < 0.6:
            head = json.dumps(self.bent(fields)).encode()
        elif kind < 0.65:
            around = r.choice(
                [
                    (b"", b"\n"),
                    (b" ", b""),
                    (b"\t", b""),
                    (b"", b"\0"),
                    (b"", b"x"),
                    (b"\xef\xbb\xbf", b""),
                ]
            )
            head = around[0] + json.dumps(fields).encode() + around[1]
        elif kind < 0.7 and fields:
            text = json.dumps(fields)
            head = (text[:-1] + ", " + text[1:]).encode()  # every key twice
        else:
            head = self.scratched(json.dumps(fields, ensure_ascii=r.random() < 0.5).encode())
        off = r.choice([-1, 1, 8]) if r.random() < 0.05 else 0
        return head, r.randbytes(max(0, nbytes + off))

    def good(self) -> tuple[dict[str, Any], int]:
        r, at = self.r, 0
        entries: list[tuple[str, Any]] = []
        for i in range(r.randint(0, 5)):
            kind = r.choice(list(SIZES)) if r.random() < 0.1 else r.choice(list(DTYPES))
            shape = [r.randint(0 if r.random() < 0.05 else 1, 3) for _ in range(r.randint(0, 3))]
            nbytes = SIZES[kind]
            for size in shape:
                nbytes *= size
            name = f"t{i}" + r.choice(["", "é", "\u2028", '"', "\\", "\n", "\x7f", "-0"])
            entries.append(
                (name, {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]})
            )
            at += nbytes
        r.shuffle(entries)
        if r.random() < 0.5:
            said = {str(i): str(r.random()) for i in range(r.randint(0, 3))}
            entries.insert(r.randint(0, len(entries)), ("__metadata__", said))
        return dict(entries), at

    def bent(self, fields: dict[str, Any]) -> dict[str, Any]:
        """One value that should not be there."""
        r = self.r
        names = [name for name in fields if name != "__metadata__"]
        if not names or r.random() < 0.2:
            return fields | {
                "__metadata__": r.choice(
                    [None, [], {"a": 1}, {"a": None}, {"a": {}}, "x", {"": ""}]
                )
            }
        name = r.choice(names)
        entry = dict(fields[name])
        begin, end = entry["data_offsets"]
        match r.randrange(6):
            case 0:
                entry["x"] = 1
            case 1:
                entry.pop(r.choice(list(entry)))
            case 2:
                wrong: list[Any] = [
                    [0],
                    [0, 1, 2],
                    [-1, 0],
                    [0, 2**63],
                    [0.0, 1.0],
                    None,
                    "x",
                    [end, begin],
                    [begin + 1, end + 1],
                ]
                entry["data_offsets"] = r.choice([*wrong, [True, False], [2**64, 2**64]])
            case 3:
                entry["shape"] = r.choice(
                    [None, "x", [-1], [1.0], [2**63, 2], [2**64], [True], [1] * 9, [[]], {}]
                )
            case 4:
                entry["dtype"] = r.choice([None, "f32", "F4", "C64", 3, [], "E8M0", "F6_E2M3"])
            case _:
                return fields | {name: r.choice([None, [], 1, "x"])}
        return fields | {name: entry}

    def scratched(self, text: bytes) -> bytes:
        """A few bytes changed, taken out, put in or repeated."""
        r, found = self.r, bytearray(text)
        for _ in range(r.randint(1, 3)):
            if not found:
                break
            at, kind = r.randrange(len(found)), r.random()
            if kind < 0.3:
                found[at] = r.choice(b'0123456789{}[]",:. -+eEntfu\\ /\x00\xff\n\t')
            elif kind < 0.5:
                del found[at]
            elif kind < 0.7:
                found[at:at] = bytes([r.choice(b'0123456789{}[]",:. -+eE\\ \n\t')])
            elif kind < 0.85:
                words = [
                    b"null",
                    b"true",
                    b"1e3",
                    b"1.0",
                    b"-1",
                    b"-",
                    b"18446744073709551616",
                    b"NaN",
                    b'"a":1,',
                    b"[]",
                    b"{}",
                ]
                found[at:at] = r.choice([*words, b"\\u0000", b"\\ud800", b"\xef\xbb\xbf"])
            else:
                other = r.randrange(len(found))
                found[at:at] = found[min(at, other) : min(at, other) + 30]
        return bytes(found)


def by_the_package(
    head: bytes, body: bytes
) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name → dtype, shape and bytes; None where it refuses."""
    try:
        found = safetensors.deserialize(len(head).to_bytes(8, "little") + head + body)
    except safetensors.SafetensorError:
        return None
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found
    }


def by_us(head: bytes, body: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same by our own reader.

    Raises:
        FormatError: it refuses.
    """
    header = parse_header(head, len(body), "x")
    memory = torch.zeros(header.nbytes, dtype=torch.uint8)
    file = torch.frombuffer(bytearray(body or b"\0"), dtype=torch.uint8)
    read = 0
    for place, nbytes in header.spans:
        memory[place : place + nbytes] = file[read : read + nbytes]
        read += nbytes
    there, kinds = over(memory), {dtype: kind for kind, dtype in DTYPES.items()}
    return {
        name: (
            kinds[t.dtype],
            tuple(t.shape),
            bytes(there(t).reshape(-1).view(torch.uint8).tolist()),
        )
        for name, t in header.tensors.items()
    }


STRICTER = (
    "occurs twice",
    "expected dtype, shape and data_offsets",  # a field more than the format has
    "is not supported, expected one of",
    "the tensor is empty",
    "dtype, shape or data_offsets are malformed",  # more than eight dimensions
    "nested",
)
"""Why we refuse what the package reads."""


def agree(head: bytes, body: bytes) -> bool:
    """Whether both read it; what one says alone must be one of the reasons above."""
    theirs = by_the_package(head, body)
    try:
        ours = by_us(head, body)
    except FormatError as error:
        assert theirs is None or any(reason in error.what for reason in STRICTER), (
            head,
            error.what,
        )
        return False
    assert ours == theirs, head
    return True


def test_our_reader_agrees_with_the_package_on_thousands_of_headers() -> None:
    headers = Headers(0)
    read = sum(agree(*headers.one()) for _ in range(6000))
    assert 1500 < read < 4500  # good ones and bad ones


@given(st.integers(0, 2**63))
def test_our_reader_agrees_with_the_package_on_any_header(seed: int) -> None:
    headers = Headers(seed)
    for _ in range(20):
        agree(*headers.one())


@pytest.mark.parametrize(
    "text",
    [
        '{"a-0":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
        '{"\\\\-0\\"-0":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
    ],
)
def test_minus_zero_is_no_place(text: str) -> None:
    assert by_the_package(text.encode(), bytes(4)) is None
    with pytest.raises(FormatError, match="-0 is no size and no place"):
        by_us(text.encode(), bytes(4))
    fine = text.replace("[-0", "[0").replace('"shape":[0]', '"shape":[1]').replace("[0,0]", "[0,4]")
    assert agree(fine.encode(), bytes(4))


def test_a_whole_file_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.randn(3).bfloat16(),
        "c": torch.tensor(2.0).double(),
    }
    file = tmp_path / "x.safetensors"
    file.write_bytes(render_tensors(tensors, {"format": "pt", "by": "us"}))
    found, said = read_tensors(file, "x")
    assert said == {"format": "pt", "by": "us"}
    assert all(
        torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items()
    )
    for tensor in found.values():
        tensor.zero_()  # memory of its own
    with open_tensors(file, "x") as reading:
        header = parse_header(reading.head, reading.nbytes, "x")
        there = over(reading.numbers(header))
        assert all(torch.equal(there(header.tensors[name]), t) for name, t in tensors.items())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="the file holds"):
        read_tensors(file, "x")
