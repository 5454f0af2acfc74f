import re

import pytest

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.errors import ConfigError
from muxmesh.models.catalog import CATALOG, CatalogModel, find_catalog_model


def test_the_default_model_of_a_mesh_is_in_the_catalog() -> None:
    assert find_catalog_model(DEFAULT_MODEL) is CATALOG[DEFAULT_MODEL]


def test_an_unknown_name_is_rejected_with_the_available_ones() -> None:
    with pytest.raises(ConfigError, match="no model 'gpt' in the catalog; available: smollm2-135m-instruct"):
        find_catalog_model("gpt")


@pytest.mark.parametrize("model", CATALOG.values(), ids=lambda model: model.name)
def test_every_entry_can_be_configured_and_is_pinned(model: CatalogModel) -> None:
    assert ModelConfig(name=model.name).name == model.name
    assert re.fullmatch("[0-9a-f]{64}", model.wheel_sha256) and re.fullmatch("[0-9a-f]{64}", model.member_sha256)
    assert model.member.endswith(".gguf")
