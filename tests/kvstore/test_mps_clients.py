"""What answers of an MPS daemon mean for the clients of a unit: a table of histories."""

from collections.abc import Sequence

import pytest

from kvstore.mps_clients import MpsClients, MpsFindings, WatchedClient
from muxmesh.cuda.mps import MpsServer, ServerStatus

ACTIVE, FAULT = ServerStatus.ACTIVE, ServerStatus.FAULT
SERVER, OTHER_SERVER = 489, 490


def server(*clients: int, status: ServerStatus = ACTIVE, pid: int = SERVER) -> MpsServer:
    return MpsServer(pid, status, frozenset(clients))


class Clients:
    """Clients 1 and 2, and answers at given times. A client is released 5 s after its exit, or it is overdue."""

    def __init__(self) -> None:
        self.ledger = MpsClients(release_within_s=5.0)
        self.one, self.two = self.ledger.add(1), self.ledger.add(2)

    def answer(self, now_s: float, servers: Sequence[MpsServer] | str, alive: Sequence[int] = (SERVER,)) -> MpsFindings:
        return self.ledger.apply(servers, alive, now_s, now_s)


@pytest.fixture
def clients() -> Clients:
    clients = Clients()
    assert clients.answer(0.0, [server(1, 2)]) == MpsFindings()
    assert clients.ledger.servers == {SERVER}
    return clients


def exit_of(client: WatchedClient, at_s: float) -> None:
    client.exited_at_s = at_s


def test_a_client_that_runs_is_never_released(clients: Clients) -> None:
    assert clients.answer(9.0, [server()]) == MpsFindings()
    assert not clients.ledger.some_have_exited


def test_a_client_that_has_exited_is_released_when_its_server_does_not_list_it(clients: Clients) -> None:
    exit_of(clients.one, 1.0)
    assert clients.ledger.some_have_exited
    assert clients.answer(1.1, [server(1, 2)]) == MpsFindings()
    assert clients.answer(1.2, [server(2)]) == MpsFindings(released=(clients.one,))


def test_an_answer_to_an_older_question_releases_nothing(clients: Clients) -> None:
    exit_of(clients.one, 1.0)
    assert clients.ledger.apply([server(2)], (SERVER,), asked_at_s=0.9, now_s=1.1) == MpsFindings()


def test_a_process_that_never_was_a_client_is_released_by_the_first_answer() -> None:
    clients = Clients()
    exit_of(clients.one, 1.0)
    assert clients.answer(1.1, []).released == (clients.one,)


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_client_of_a_server_that_the_daemon_does_not_know_is_released_when_the_server_has_exited(
    clients: Clients, is_alive: bool
) -> None:
    """The server of a daemon that was killed may still have work of the client."""
    exit_of(clients.one, 1.0)
    exit_of(clients.two, 1.0)
    found = clients.answer(1.1, [server(pid=OTHER_SERVER)], [SERVER] if is_alive else [])
    assert found.released == (() if is_alive else (clients.one, clients.two))


@pytest.mark.parametrize(
    ("servers", "cause"),
    [([server(1, 2)], "the MPS daemon still lists it"), ("no daemon answers", "no daemon answers")],
)
def test_a_client_that_is_not_released_is_overdue_once_and_hopeless_later(
    clients: Clients, servers: Sequence[MpsServer] | str, cause: str
) -> None:
    exit_of(clients.one, 1.0)
    reason = f"exited and not released in time: process 1: {cause}"
    assert clients.answer(5.9, servers) == MpsFindings()
    assert clients.answer(6.0, servers) == MpsFindings(overdue=reason)
    assert clients.answer(9.0, servers) == MpsFindings()
    assert clients.answer(11.0, servers) == MpsFindings(hopeless=reason)
    assert clients.answer(12.0, servers) == MpsFindings(hopeless=reason)
    assert clients.answer(13.0, [server(2)]) == MpsFindings(released=(clients.one,))


def test_a_daemon_that_does_not_answer_while_all_clients_run_ends_nothing(clients: Clients) -> None:
    assert clients.answer(100.0, "no daemon answers") == MpsFindings()


def test_a_server_in_fault_is_found_once_for_its_clients(clients: Clients) -> None:
    reason = "MPS server 489 is in FAULT: the work of all its clients has failed"
    assert clients.answer(1.0, [server(1, 2, status=FAULT)]) == MpsFindings(fault=reason)
    assert clients.answer(2.0, [server(1, 2, status=FAULT)]) == MpsFindings()
    new = clients.ledger.add(3)
    assert clients.answer(3.0, [server(3)]) == MpsFindings()
    assert clients.answer(4.0, [server(3, status=FAULT)]) == MpsFindings(fault=reason)
    assert new.is_faulted


def test_a_fault_is_found_even_if_all_clients_of_the_unit_have_exited_by_then(clients: Clients) -> None:
    exit_of(clients.one, 1.0)
    exit_of(clients.two, 1.0)
    found = clients.answer(1.1, [server(77, status=FAULT)])
    assert found.released == (clients.one, clients.two)
    assert "FAULT" in found.fault


def test_a_fault_of_a_server_without_clients_of_the_unit_is_not_its_fault(clients: Clients) -> None:
    assert clients.answer(1.0, [server(1, 2), server(7, status=FAULT, pid=OTHER_SERVER)]) == MpsFindings()


def test_a_server_that_is_gone_while_its_clients_run_is_a_fault(clients: Clients) -> None:
    found = clients.answer(1.0, [])
    assert found == MpsFindings(fault="MPS server 489 is gone: its daemon has restarted or stopped it")


def test_a_client_that_is_discarded_is_not_watched(clients: Clients) -> None:
    exit_of(clients.one, 1.0)
    clients.ledger.discard(clients.one)
    assert clients.answer(20.0, [server(1, 2)]) == MpsFindings()
