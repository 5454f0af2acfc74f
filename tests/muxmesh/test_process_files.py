"""Names of the files of a process."""

import pytest

from muxmesh.process_files import process_file


@pytest.mark.parametrize(
    ("process", "suffix", "expected"),
    [
        ("router", ".sock", "router.sock"),
        ("decode/cpu0/small#2", ".log", "decode-cpu0-small#2.log"),
    ],
)
def test_a_file_of_a_process_has_its_name_without_slashes(process: str, suffix: str, expected: str) -> None:
    assert process_file(process, suffix) == expected
