from dataclasses import dataclass

from muxmesh.errors import Unavailable
from muxmesh.tenants.tenant import Tenant
from router.tenant_batches import send_by_tenant
from tests.support.tenants import tenant


@dataclass(frozen=True)
class One:
    tenant: Tenant
    number: int


async def test_items_of_a_tenant_are_sent_together_and_those_that_fail_come_back() -> None:
    sent: list[list[int]] = []

    async def send(to: Tenant, items: list[One]) -> None:
        if to.name == "b":
            raise Unavailable("gone")
        sent.append([one.number for one in items])

    batch = [One(tenant(name), number) for number, name in enumerate("abacb")]
    failed, error = await send_by_tenant(batch, send)
    assert sent == [[0, 2], [3]]
    assert [one.number for one in failed] == [1, 4]
    assert isinstance(error, Unavailable)


async def test_nothing_comes_back_if_nothing_fails() -> None:
    async def send(to: Tenant, items: list[One]) -> None:
        pass

    assert await send_by_tenant([One(tenant("a"), 1)], send) == ([], None)
    assert await send_by_tenant([], send) == ([], None)
