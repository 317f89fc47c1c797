"""Page-locked memory: each piece is as large as was asked, is locked once, is used again only when
the copies from it are done, and is unlocked before it goes back to the system.
"""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path

import pytest
import torch
from cached import RANKS, adapter, zoo
from oracle import net as base
from torch import Tensor

import lora_tree as lt
from benchmarks.host_link import HostLink
from lora_tree.cache import page_locked as module
from lora_tree.cache.link import Arrived, CudaLink
from lora_tree.cache.pack import buffer_of, pack, packed_bytes, vacate
from lora_tree.cache.page_locked import PageLocked
from lora_tree.cache.shelf import PAGED
from lora_tree.cache.staging import send_staged
from lora_tree.engine.slab import Slab

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere torch's allocator has the memory"
)


class Event:
    """A copy that is done when it is waited for."""

    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def mapped_bytes(address: int) -> int:
    """Return the bytes of the mapping that holds an address; 0 if none does."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return end - begin
    return 0


@linux
def test_a_piece_that_comes_back_stays_locked_and_is_used_again_for_its_size() -> None:
    link = HostLink()
    memory = PageLocked(link)
    one = memory.take(3 * PAGED)
    one.fill_(7)
    assert link.locked == {}, "it is locked when the numbers are in it"
    memory.lock(one)
    memory.lock(one)
    address = one.data_ptr()
    assert link.locked == {address: 3 * PAGED}
    del one
    assert memory.ready_bytes == 3 * PAGED
    other = memory.take(2 * PAGED)
    assert (memory.ready_bytes, link.locked) == (0, {}), "it made room for the other"
    memory.lock(other)
    address = other.data_ptr()
    del other
    again = memory.take(2 * PAGED - 5)
    assert again.data_ptr() == address
    assert again.numel() == 2 * PAGED - 5
    memory.lock(again)
    assert link.locked == {address: 2 * PAGED}


@linux
def test_a_piece_waits_for_the_copy_from_it_before_it_is_used_again_or_freed() -> None:
    link, copies = HostLink(), [Event(), Event()]
    memory = PageLocked(link)
    piece = memory.take(PAGED)
    address = piece.data_ptr()
    memory.note_copy(piece, copies[0])
    del piece
    assert copies[0].waited == 0, "the thread that lets go of it does not wait"
    piece = memory.take(PAGED)
    assert piece.data_ptr() == address
    assert copies[0].waited == 1
    memory.note_copy(piece, copies[1])
    memory.lock(piece)
    del piece
    memory.close()
    assert [copy.waited for copy in copies] == [1, 1]
    assert link.locked == {}
    assert mapped_bytes(address) == 0


@linux
def test_ready_memory_is_bounded_also_while_no_thread_takes_any() -> None:
    link = HostLink()
    memory = PageLocked(link, most_bytes=2 * PAGED)
    pieces = [memory.take(PAGED) for _ in range(4)]
    addresses = [piece.data_ptr() for piece in pieces]
    for piece in pieces:
        memory.lock(piece)
    del piece
    pieces.clear()
    # Before the memory is asked: a question would release what is too much.
    assert sum(address in link.locked for address in addresses) == 2
    assert memory.ready_bytes == 2 * PAGED
    memory.trim_to(PAGED)
    assert memory.ready_bytes == PAGED
    held = memory.take(2 * PAGED)
    memory.lock(held)
    memory.close()
    assert list(link.locked) == [held.data_ptr()], "what is in use stays locked"
    held.fill_(1)
    address = held.data_ptr()
    del held
    assert link.locked == {}
    assert mapped_bytes(address) == 0


def test_small_pieces_and_other_systems_take_the_memory_of_the_device_s_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = HostLink()
    memory = PageLocked(link)
    small = memory.take(PAGED - 1)
    monkeypatch.setattr(module, "LIBC", None)
    large = memory.take(PAGED)
    for piece in (small, large):
        memory.lock(piece)
        memory.note_copy(piece, Event())
    assert (small.numel(), large.numel()) == (PAGED - 1, PAGED)
    assert link.locked == {}


@linux
def test_a_system_that_refuses_to_lock_pages_changes_nothing_else() -> None:
    class Refusing(HostLink):
        def lock_pages(self, address: int, nbytes: int) -> bool:
            return False

    link = Refusing()
    memory = PageLocked(link)
    piece = memory.take(PAGED).fill_(3)
    memory.lock(piece)
    del piece
    memory.close()  # would raise KeyError if it unlocked what was not locked


# ---------------------------------------------------------------------- in a cache
@linux
def test_any_traffic_is_sent_from_locked_memory_within_the_host_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGED", 1)

    class Checking(HostLink):
        """Refuses what is sent from memory that is not locked."""

        def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
            for value in adapter.modules.values():
                assert value.A.untyped_storage().data_ptr() in self.locked
            return super().send(adapter, again)

    link = Checking()
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: link)
    tree = lt.load(zoo(tmp_path / "zoo"))
    room = 700
    model = lt.attach(tree, base(), host_budget=room, device_budget=3000)
    rng = random.Random(0)
    for _ in range(60):
        path = rng.choice(sorted(RANKS))
        model.activate(path, mode="unmerged")
        host = model.cache.stats().tiers[0]
        assert host.held_bytes + host.ready_bytes <= room
        assert len(link.locked) <= len(RANKS)
        for name, value in adapter(path).modules.items():
            seen = model.tree.adapter(path)
            assert seen is not None
            assert all(map(torch.equal, seen.modules[name].tensors, value.tensors))
        del seen
    assert host.evictions > 0
    model.detach()
    del model
    assert link.locked == {}


# ---------------------------------------------------------------------- through staging buffers
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_staging_buffer_is_filled_again_only_when_its_copy_is_done(count: int) -> None:
    """The device reads each buffer as late as it may: when it is waited for."""
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(7, 5, generator=draw),
        torch.randn(9, 4, generator=draw).to(torch.bfloat16).T,
        torch.zeros(0),
        torch.randn((), generator=draw).double(),
        torch.randn(50, generator=draw),
    ]
    slab_bytes = sum(Slab.padded_bytes(tensor.nbytes) for tensor in tensors)
    there = torch.full((slab_bytes,), 255, dtype=torch.uint8)
    stages = [torch.empty(64, dtype=torch.uint8) for _ in range(count)]
    late: list[Late] = []

    class Late:
        def __init__(self, to: Tensor, stage: Tensor) -> None:
            self.to, self.stage, self.is_done = to, stage, False
            late.append(self)

        def synchronize(self) -> None:
            if not self.is_done:
                self.to.copy_(self.stage)
            self.is_done = True

    send_staged(tensors, there, stages, Late)
    for copy in late:
        copy.synchronize()
    assert len(late) == -(-slab_bytes // 64)
    slab = Slab(there)
    for tensor in tensors:
        assert torch.equal(slab.cut(tensor.dtype, tensor.shape), tensor)


def test_an_adapter_that_is_put_together_in_memory_is_sent_without_a_packed_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = HostLink()
    asked: list[int] = []
    plain = link.allocate
    monkeypatch.setattr(link, "allocate", lambda n: asked.append(n) or plain(n))  # type: ignore[func-returns-value]
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: link)
    tree, rows = lt.AdapterTree(), torch.randn(3, 5)
    tree.add("a", adapter=adapter("a"))
    one, other = base(), base()
    model, beside = lt.attach(tree, one), lt.attach(tree, other, host_budget="1MiB")
    for attached in (model, beside):
        attached.activate("a", mode="unmerged")
    assert set(asked) == {64}, "staging buffers, and none of the adapter's size"
    assert torch.equal(one(rows), other(rows))
    by_hand = base()
    lt.attach(tree, by_hand).activate("a", mode="merged")
    torch.testing.assert_close(one(rows), by_hand(rows))


# ---------------------------------------------------------------------- the link to CUDA
class Cuda:
    """The part of ``torch.cuda`` that a link calls, over host memory; it counts.

    Args:
        refuses: the system locks no pages.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.asked: list[tuple[str, int]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked.append(("lock", nbytes))
        return 1 if self.refuses else 0

    def cudaHostUnregister(self, address: int) -> int:
        self.asked.append(("unlock", address))
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()

    class Recorded(Event):
        def record(self, stream: object) -> None:
            made.asked.append(("event", 0))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(
        CudaLink, "allocate", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8)
    )
    return made


@linux
@pytest.mark.parametrize("refuses", [False, True])
def test_locked_memory_goes_in_one_copy_and_other_memory_in_parts(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    cuda.refuses = refuses
    link = CudaLink(torch.device("cpu"))
    memory = PageLocked(link)
    monkeypatch.setattr(module, "PAGED", 1)
    monkeypatch.setattr("lora_tree.cache.link.STAGE_BYTES", 128)
    packed = pack(adapter("a/b"), memory.take)
    buffer = buffer_of(packed)
    assert buffer is not None
    memory.lock(buffer)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: False)  # torch did not lock it
    again: lt.Adapter | None = None
    for _ in range(2):
        del cuda.asked[1:]
        arrived = link.send(packed, again)
        again = arrived.adapter
        for name, value in adapter("a/b").modules.items():
            assert all(map(torch.equal, again.modules[name].tensors, value.tensors))
        copies = 1 if not refuses else 1 + -(-buffer.numel() // 128)
        assert cuda.asked.count(("event", 0)) == copies
        vacate(again)
    address = buffer.data_ptr()
    del packed, buffer, arrived, again
    memory.close()
    assert (("unlock", address) in cuda.asked) is not refuses


def test_an_adapter_that_is_in_pieces_arrives_in_one_buffer(cuda: Cuda) -> None:
    loose = adapter("a/b")
    arrived = CudaLink(torch.device("cpu")).send(loose)
    assert arrived.buffer is not None
    assert arrived.buffer.numel() == packed_bytes(loose)
    assert buffer_of(arrived.adapter) is not None
    for name, value in loose.modules.items():
        assert all(map(torch.equal, arrived.adapter.modules[name].tensors, value.tensors))
