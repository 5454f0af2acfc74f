"""What the documentation names exists: files, links and headings."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from muxmesh.cli.command_parser import command_parser
from muxmesh.clock import SystemClock
from muxmesh.config.contradictions import order_without_effect
from muxmesh.config.listen_address import public_listen_warning
from muxmesh.config.load import load_mesh_config, parse_mesh_config
from muxmesh.cuda.driver import DeviceInfo
from muxmesh.models.device_capacity import gpu_problems
from muxmesh.models.prepared_model import model_problems
from muxmesh.rpc.pem_files import read_key_pair
from muxmesh.rpc.server_certificates import certificate_problems
from muxmesh.types import Role

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "compose/README.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"),
)
"""Pages that describe the present. The log and the decisions keep the names of their day."""
PACKAGES = ("muxmesh", "kvstore", "worker", "prefill_svc", "decode_svc", "router", "simulator", "loadtest")
OTHER_FOLDERS = ("benchmarks", "scripts", "tests", "protos", "docs", "compose")
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]*)(?:#([^)]*))?\)")


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def source_files() -> list[str]:
    folders = (*PACKAGES, *OTHER_FOLDERS)
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (page.parent / target) if target else page
        assert file.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            assert anchor in headings(file), f"{name} links to {target}#{anchor}, and there is no such heading"


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_of_muxmesh_can_be_parsed(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\n", " ")
    for line in re.findall(r"^\$ (?:\S+/)?muxmesh (.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        command_parser().parse_args(words[:-1] if words[-1:] == ["&"] else words)


@pytest.mark.parametrize("name", PAGES)
def test_every_option_of_a_service_exists(name: str) -> None:
    options = {"--runtime", "--unit", "--model", "--name", "--listen", "--parent", "--metrics", "--drain"}
    for line in re.findall(r"python -m (?:kvstore|prefill_svc|decode_svc|router|muxmesh\.supervisor\.\w+) ([^\n`]*)",
                           (ROOT / name).read_text()):  # fmt: skip
        assert set(re.findall(r"--[a-z]+", line)) <= options


@pytest.mark.parametrize("name", PAGES)
def test_every_python_file_that_is_named_exists(name: str) -> None:
    files = source_files()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", (ROOT / name).read_text()))
    missing = sorted(path for path in named if not any(f"/{file}".endswith(f"/{path}") for file in files))
    assert not missing, f"{name} names files that do not exist: {missing}"


@pytest.mark.parametrize("title", ["One request", "One decode step", "One swap"])
def test_the_reading_lists_of_the_architecture_count_what_they_list(title: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = re.search(rf"^\*\*{title}\*\*: (.+?)\.$", text, re.MULTILINE | re.DOTALL)
    row = re.search(rf"^\| {title.lower()} \| (\d+) / ([\d,]+) ", text, re.MULTILINE)
    assert listed is not None
    assert row is not None
    files = re.findall(r"`([^`]+\.py)`", listed.group(1))
    assert len(set(files)) == len(files) == int(row.group(1))
    num_lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert abs(int(row.group(2).replace(",", "")) - num_lines) <= 0.03 * num_lines, (
        f"the files have {num_lines:,} lines"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid_and_every_setting_in_it_has_an_effect(path: Path) -> None:
    config = load_mesh_config(path, order_without_effect).config
    assert public_listen_warning(config) is None
    shares = [model.compute_share.of(role) for _, model in config.placements() for role in Role]
    assert all(unit.is_cuda for unit in config.units) and all(share < 100 for share in shares)
    memory = DeviceInfo(0, "GPU-0", "80 GB", 132, (9, 0), 80 * 10**9, True, True, False)
    assert list(gpu_problems(config, {0: memory}, lambda model: None)) == []


def test_the_configuration_to_simulate_is_valid() -> None:
    text = (ROOT / "docs/load_and_simulation.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (unit,) = parse_mesh_config(text, "docs/load_and_simulation.md").config.units
    assert all(model.engine == "sim" for model in unit.models)


def test_the_configuration_of_many_models_is_valid() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/many_models.md").read_text(), re.MULTILINE | re.DOTALL)
    (unit,) = parse_mesh_config(text, "docs/many_models.md").config.units
    assert (unit.max_awake_models, len(unit.models)) == (3, 3)


def test_the_examples_say_how_to_start_them_and_are_listed() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.yaml"):
        name = path.relative_to(ROOT).as_posix()
        assert f"`muxmesh up -c {name}`" in path.read_text() and f"]({name})" in readme


def test_the_example_of_mesh_yaml_is_valid_and_listens_on_this_machine_only(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"^```yaml\n(# mesh\.yaml\n.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "mesh.yaml").write_text(text)
    loaded = load_mesh_config(
        tmp_path / "mesh.yaml", order_without_effect, lambda config: model_problems(config, tmp_path, tmp_path)
    )
    assert public_listen_warning(loaded.config) is None


def test_the_commands_for_a_certificate_make_what_the_configuration_beside_them_needs(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    page = (ROOT / "docs/operations.md").read_text()
    (example,) = re.findall(r"^```yaml\n(listen: .*?tls:.*?)^```$", page, re.MULTILINE | re.DOTALL)
    tls = parse_mesh_config(example, "docs/operations.md").config.tls
    assert tls is not None
    (commands,) = re.findall(r"^\$ (new\(\) .*?\n)\$ muxmesh", page, re.MULTILINE | re.DOTALL)
    subprocess.run(["bash", "-ec", commands.replace("\n$ ", "\n")], cwd=tmp_path, check=True, capture_output=True)
    assert list(certificate_problems(tls.absolute(tmp_path), SystemClock().unix_s())) == []
    read_key_pair(tmp_path / "client.pem", tmp_path / "client.key", "client")


def test_the_certificates_of_the_containers_are_in_the_folder_that_is_mounted() -> None:
    variables = {"MODEL": "m", "SOURCE": "smollm2-135m-instruct"}
    tls = load_mesh_config(ROOT / "compose/mesh-tls.yaml", variables=variables).config.tls
    services = yaml.safe_load((ROOT / "compose/tls.yaml").read_text())["services"]
    assert tls is not None
    for name in ("prepare", "router"):
        mounted = {mount["target"] for mount in services[name]["volumes"]}
        assert {str(Path(file).parent) for file in (tls.cert, tls.key)} <= mounted
