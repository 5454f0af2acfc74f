"""The name under which the length predictor knows a tenant. Pure.

A tenant is the client's own secret, its cache salt, and often a guessable one. What the predictor keeps is copied to
Redis, so it gets a keyed hash; the key is in the runtime file and in the state folder, never in Redis (ADR 11).
"""

from __future__ import annotations

from hashlib import blake2b

SECRET_BYTES = 32
_KEY_BYTES = 16


def tenant_key(secret: bytes, tenant: str) -> str:
    """The keyed hash of a tenant as hexadecimal text; empty for the empty tenant, which is no secret."""
    if not tenant:
        return ""
    return blake2b(tenant.encode("utf-8", "surrogatepass"), key=secret, digest_size=_KEY_BYTES).hexdigest()
