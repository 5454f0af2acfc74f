"""The unit's shared memory: pool, swap region and grant page, memfds that live as long as somebody maps them."""

from __future__ import annotations

import os

from kvstore.arbiter import next_slot
from kvstore.grant import MAX_WORKERS, PAGE_BYTES, GrantPage, Word
from muxmesh.errors import Overloaded


class UnitMemory:
    """Owns the memfds and the slots of the grant page."""

    def __init__(self, pool_bytes: int, swap_bytes: int = 0) -> None:
        self.pool_fd = os.memfd_create("muxmesh-kv-pool", os.MFD_CLOEXEC)
        os.ftruncate(self.pool_fd, pool_bytes)
        self.swap_fd = os.memfd_create("muxmesh-kv-swap", os.MFD_CLOEXEC)
        os.ftruncate(self.swap_fd, swap_bytes)
        self.page_fd = os.memfd_create("muxmesh-grants", os.MFD_CLOEXEC)
        os.ftruncate(self.page_fd, PAGE_BYTES)
        self.doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.page = GrantPage(self.page_fd)
        self._bells: dict[int, int] = {}
        self._last_granted = -1

    def take_slot(self) -> tuple[int, int]:
        """A free slot and the bell of its worker. Raises Overloaded if there are MAX_WORKERS already."""
        slot = next((slot for slot in range(MAX_WORKERS) if slot not in self._bells), None)
        if slot is None:
            raise Overloaded(f"a unit has at most {MAX_WORKERS} workers")
        self.page.clear(slot)
        self._bells[slot] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return slot, self._bells[slot]

    def give_back_slot(self, slot: int) -> None:
        """The slot's worker is certainly gone: whatever it held is free."""
        os.close(self._bells.pop(slot))
        self.page.clear(slot)
        self.arbitrate()

    def on_doorbell(self) -> None:
        """A worker changed its words."""
        try:
            os.eventfd_read(self.doorbell_fd)
        except BlockingIOError:
            return
        self.arbitrate()

    def arbitrate(self) -> None:
        """Grants the device to the next worker in turn if it is free; tells its holder if somebody waits."""
        holding = {slot for slot in self._bells if self.page.read(slot, Word.GRANTED)}
        demanding = {slot for slot in self._bells if self.page.read(slot, Word.DEMAND)} - holding
        if not holding:
            chosen = next_slot(demanding, self._last_granted)
            if chosen is not None:
                demanding.discard(chosen)
                self._last_granted = chosen
                self.page.wanted = bool(demanding)
                self.page.write(chosen, Word.GRANTED, 1)
                os.eventfd_write(self._bells[chosen], 1)
                return
        self.page.wanted = bool(demanding)
