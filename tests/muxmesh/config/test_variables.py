from pathlib import Path

import pytest

from muxmesh.config.load import load_mesh_config, parse_mesh_config
from muxmesh.config.variables import with_variables
from muxmesh.config.yaml_reader import read_fields
from muxmesh.errors import ConfigError

VARIABLES = {"POOL": "2GiB", "EMPTY": "", "SEQS": "7", "TEXT": "a: [b\nc", "NESTED": "${POOL}"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${POOL}", "2GiB"),
        ("a${SEQS}b${SEQS}", "a7b7"),
        ("${MISSING:-1GiB}", "1GiB"),
        ("${EMPTY:-x}", "x"),
        ("${MISSING:-}", ""),
        ("$${POOL}", "${POOL}"),
        ("$POOL costs 5 $", "$POOL costs 5 $"),
        ("${NESTED}", "${POOL}"),
    ],
)
def test_a_variable_is_replaced_by_its_value_once(text: str, value: str) -> None:
    assert with_variables(text, VARIABLES) == value


@pytest.mark.parametrize("text", ["${}", "${POOL", "${1A}", "${A B}", "${POOL:+x}", "${POOL-x}"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write `\$\$\{` for the characters"):
        with_variables(text, VARIABLES)


@pytest.mark.parametrize("text", ["${MISSING}", "${EMPTY}"])
def test_a_variable_without_a_value_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"names the variable (MISSING|EMPTY), which is not set"):
        with_variables(text, VARIABLES)


def test_a_value_becomes_a_number_unless_it_is_quoted() -> None:
    fields = read_fields("a: ${SEQS}\nb: '${SEQS}'\nc: ${MISSING:-2.5}", "f", VARIABLES)
    assert fields.data == {"a": 7, "b": "7", "c": 2.5}


def test_a_value_adds_no_field() -> None:
    assert read_fields("a: ${TEXT}", "f", VARIABLES).data == {"a": VARIABLES["TEXT"]}


def test_names_of_fields_are_not_replaced() -> None:
    assert read_fields("'${POOL}': 1", "f", VARIABLES).data == {"${POOL}": 1}


def test_mesh_yaml_takes_values_from_variables(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "units:\n- kv_pool: ${POOL}\n  models:\n  - {name: a, engine: sim}\n  - name: b\n    max_num_seqs: ${SEQS}"
    )
    (unit,) = load_mesh_config(file, variables=VARIABLES).config.units
    assert (unit.kv_pool, unit.models[1].max_num_seqs) == (2 * 2**30, 7)


def test_errors_name_the_field_and_the_line() -> None:
    with pytest.raises(ConfigError) as error:
        parse_mesh_config("listen: ${LISTEN}\nmesh_id: ${", "mesh.yaml")
    assert str(error.value).splitlines() == [
        "mesh.yaml:1: listen: names the variable LISTEN, which is not set",
        "mesh.yaml:2: mesh_id: has `${` without ${NAME} or ${NAME:-default}; write `$${` for the characters",
    ]
