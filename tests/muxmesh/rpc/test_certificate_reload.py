"""Which certificates are used while their files change, and what is logged."""

import logging

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.rpc.certificate_reload import CertificateReload, LogLine
from muxmesh.rpc.pem_files import KeyPair
from muxmesh.rpc.server_certificates import ServerCertificates

DAY_S = 86400


def served(name: str, not_after_s: int = 10 * DAY_S, client_ca: bytes | None = None) -> ServerCertificates:
    return ServerCertificates(KeyPair(name.encode(), b"key of " + name.encode(), 0, not_after_s), client_ca)


OLD, NEW = served("old"), served("new", 20 * DAY_S)


def test_what_is_in_use_stays_without_a_line() -> None:
    reload = CertificateReload(OLD)
    assert [reload.observe(served("old"), now_s) for now_s in (1.0, 2.0, 3.0)] == [None, None, None]
    assert reload.in_use is OLD


def test_a_valid_replacement_is_used_at_once() -> None:
    reload = CertificateReload(OLD)
    line = reload.observe(NEW, 1.0)
    assert line == LogLine(
        logging.INFO, "new connections get the new certificate, valid until 1970-01-21 00:00 UTC"
    )  # fmt: skip
    assert reload.in_use is NEW
    assert reload.observe(NEW, 2.0) is None


def test_another_ca_of_clients_alone_is_a_replacement() -> None:
    reload = CertificateReload(served("old", client_ca=b"one"))
    assert reload.observe(served("old", client_ca=b"two"), 1.0) is not None
    assert reload.in_use.client_ca == b"two"


def test_a_replacement_that_cannot_be_used_is_reported_once_and_the_one_before_stays() -> None:
    reload = CertificateReload(OLD)
    lines = [reload.observe("a.pem: has no certificate", float(second)) for second in range(5)]
    assert lines == [
        None,
        LogLine(
            logging.ERROR,
            "the new certificate is not used: a.pem: has no certificate; the one before stays in use, "
            "valid until 1970-01-11 00:00 UTC",
        ),
        None,
        None,
        None,
    ]
    assert reload.in_use is OLD


def test_a_mixture_of_old_and_new_that_is_gone_at_the_next_look_is_no_error() -> None:
    reload = CertificateReload(OLD)
    assert reload.observe("a.key: is not the key", 1.0) is None
    line = reload.observe(NEW, 2.0)
    assert line is not None
    assert line.level == logging.INFO


def test_another_problem_and_the_same_one_after_a_repair_are_reported_again() -> None:
    reload, errors = CertificateReload(OLD), []
    looks: list[ServerCertificates | str] = ["one", "one", "two", "two", OLD, "two", "two"]
    for second, seen in enumerate(looks):
        line = reload.observe(seen, float(second))
        errors += [] if line is None else [line.text.split(": ")[1].split(";")[0]]
    assert errors == ["one", "two", "two"]


def test_a_replacement_that_has_expired_is_not_used() -> None:
    reload = CertificateReload(OLD)
    lines = [reload.observe(served("expired", DAY_S), 2.0 * DAY_S) for _ in range(2)]
    assert lines[1] is not None
    assert "has expired on 1970-01-02 00:00 UTC" in lines[1].text
    assert reload.in_use is OLD


def test_a_certificate_that_expires_in_use_is_reported_once_and_its_renewal_is_used() -> None:
    reload, late_s = CertificateReload(OLD), 11.0 * DAY_S
    lines = [reload.observe(OLD, late_s + second) for second in range(4)]
    expected = "the certificate in use has expired on 1970-01-11 00:00 UTC; renew it"
    assert lines == [None, LogLine(logging.ERROR, expected), None, None]
    assert reload.observe(NEW, late_s + 5) is not None
    assert reload.in_use is NEW


SEEN = st.one_of(
    st.sampled_from(["unreadable", "damaged"]),
    st.builds(served, st.sampled_from(["a", "b", "c"]), st.integers(0, 5).map(lambda days: days * DAY_S)),
)


@given(st.lists(st.tuples(SEEN, st.integers(0, 2 * DAY_S)), max_size=30))
def test_what_is_used_was_seen_and_valid_then_and_no_problem_is_reported_twice_in_a_row(
    looks: list[tuple[ServerCertificates | str, int]],
) -> None:
    reload, now_s = CertificateReload(OLD), 0
    last_seen: object = None
    errors_of_this = 0
    for seen, passed_s in looks:
        now_s += passed_s
        before = reload.in_use
        line = reload.observe(seen, now_s)
        if reload.in_use != before:
            assert isinstance(seen, ServerCertificates)
            assert reload.in_use is seen
            assert seen.pair.time_problem(now_s) is None
        errors_of_this = errors_of_this if seen == last_seen else 0
        errors_of_this += line is not None and line.level == logging.ERROR
        assert errors_of_this <= 1
        assert (line is not None and line.level == logging.INFO) == (reload.in_use != before)
        last_seen = seen
