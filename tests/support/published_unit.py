"""A prefix cache of eight blocks that is published in Redis, as unit u of the mesh `mesh`."""

from __future__ import annotations

from kvstore.block_table import BlockTable
from kvstore.residency_journal import ResidencyJournal
from kvstore.residency_publisher import ResidencyPublisher
from kvstore.slab_pool import SlabPool
from muxmesh.process_registry import redis_key
from muxmesh.residency_format import changes_name, snapshot_name

HASHES = [bytes([value]) * 16 for value in range(10)]
SNAPSHOT, CHANGES = (redis_key("mesh", name("u")) for name in (snapshot_name, changes_name))


class PublishedUnit:
    """A prefix cache of eight blocks, with its publisher."""

    def __init__(self, url: str, incarnation: int = 1) -> None:
        self.blocks = BlockTable(SlabPool(1))
        self.blocks.add_model("m", 8)
        self.journal = ResidencyJournal(incarnation)
        self.blocks.on_published = self.journal.note
        self.publisher = ResidencyPublisher(url, "mesh", "u", self.journal, self.blocks.published)

    def compute(self, *values: int) -> None:
        """Caches the blocks of a sequence whose hashes are ``HASHES[value]``, and evicts others for them if needed."""
        allocated = self.blocks.allocate("m", len(values))
        assert allocated is not None
        self.blocks.insert_prefix("m", allocated.block_ids, [HASHES[value] for value in values])
        self.blocks.free("m", allocated.block_ids)
