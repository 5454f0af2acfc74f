"""How a unit publishes in Redis which blocks its prefix cache holds: names of keys, and their contents in bytes. Pure.

    Redis key (`redis_key`)      type      content
    residency:UNIT:snapshot      string    a `ResidencySnapshot`: everything that the unit holds
    residency:UNIT:changes       stream    a `ResidencyBatch` in field `FIELD` of each entry

Changes are numbered. A snapshot with the number n has all changes before n, a batch those from its own number on, so a
reader continues from a snapshot with the batch of the same number, and a batch of a later number shows that it has
missed some. Numbers belong to one incarnation of a kvstore.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from muxmesh.block_hashes import HASH_BYTES

FIELD = b"b"
"""Of an entry of the stream: the batch."""
_VERSION = 1
_KEY_BYTES = 8
_BATCH = struct.Struct("<BQQII")
_SNAPSHOT = struct.Struct("<BQQI")


@dataclass(frozen=True, slots=True)
class ResidencyBatch:
    """Changes of a prefix cache: block keys that were added and removed, no key in both.

    ``first``: number of the first change. ``incarnation``: of the kvstore, 64 bits.
    """

    incarnation: int
    first: int
    added: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Number of the first change after the batch."""
        return self.first + len(self.added) + len(self.removed)


@dataclass(frozen=True, slots=True)
class ResidencySnapshot:
    """All block keys of a prefix cache. ``number``: of the first change that is not in it."""

    incarnation: int
    number: int
    keys: tuple[int, ...] = ()


def snapshot_name(unit: str) -> str:
    """The name of the snapshot's key, see `redis_key`."""
    return f"residency:{unit}:snapshot"


def changes_name(unit: str) -> str:
    """The name of the stream's key, see `redis_key`."""
    return f"residency:{unit}:changes"


def model_salt(model: str) -> int:
    """Distinguishes the blocks of two models whose KV identities are equal."""
    return int.from_bytes(blake2b(model.encode(), digest_size=_KEY_BYTES, person=b"residency").digest(), "little")


def block_key(salt: int, block_hash: bytes) -> int:
    """64 bits that stand for a block. Two blocks with one key cost at most a worse choice of a unit."""
    return int.from_bytes(block_hash[:_KEY_BYTES], "little") ^ salt


def block_keys(model: str, hashes: Sequence[bytes]) -> tuple[int, ...]:
    """The keys of a chain of block hashes of ``model``, in order."""
    if not hashes:
        return ()
    salt = model_salt(model)
    firsts = struct.unpack(f"<{2 * len(hashes)}Q", b"".join(hashes))[:: HASH_BYTES // _KEY_BYTES]
    return tuple(first ^ salt for first in firsts)


def encode_batch(batch: ResidencyBatch) -> bytes:
    """What `decode_batch` decodes: a head, then 8 bytes for each key, little-endian."""
    head = _BATCH.pack(_VERSION, batch.incarnation, batch.first, len(batch.added), len(batch.removed))
    return head + _encode_keys((*batch.added, *batch.removed))


def decode_batch(data: bytes) -> ResidencyBatch:
    """Raises ValueError for anything but a batch of this version."""
    version, incarnation, first, num_added, num_removed = _unpack(_BATCH, data)
    keys = _decode_keys(version, data[_BATCH.size :], num_added + num_removed)
    return ResidencyBatch(incarnation, first, keys[:num_added], keys[num_added:])


def encode_snapshot(snapshot: ResidencySnapshot) -> bytes:
    """What `decode_snapshot` decodes: a head, then 8 bytes for each key, little-endian."""
    head = _SNAPSHOT.pack(_VERSION, snapshot.incarnation, snapshot.number, len(snapshot.keys))
    return head + _encode_keys(snapshot.keys)


def decode_snapshot(data: bytes) -> ResidencySnapshot:
    """Raises ValueError for anything but a snapshot of this version."""
    version, incarnation, number, num_keys = _unpack(_SNAPSHOT, data)
    return ResidencySnapshot(incarnation, number, _decode_keys(version, data[_SNAPSHOT.size :], num_keys))


def _encode_keys(keys: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(keys)}Q", *keys)


def _unpack(head: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) < head.size:
        raise ValueError(f"{len(data)} bytes are too few for the head of {head.size} bytes")
    return head.unpack_from(data)


def _decode_keys(version: int, data: bytes, num_keys: int) -> tuple[int, ...]:
    if version != _VERSION:
        raise ValueError(f"is of version {version}, expected {_VERSION}")
    if len(data) != num_keys * _KEY_BYTES:
        raise ValueError(f"has {len(data)} bytes of keys, expected {num_keys * _KEY_BYTES}")
    return struct.unpack(f"<{num_keys}Q", data)
