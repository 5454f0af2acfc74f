"""The memory of weight images in the page cache."""

from pathlib import Path

import numpy as np

from muxmesh.models.image_memory import release_image


def test_an_image_keeps_its_content_also_where_it_is_still_mapped(tmp_path: Path) -> None:
    image = tmp_path / "image"
    np.arange(100_000, dtype=np.int64).tofile(image)
    mapped = np.memmap(image, dtype=np.int64, mode="r")
    release_image(image)
    assert mapped.sum() == np.fromfile(image, dtype=np.int64).sum() == 99_999 * 50_000


def test_an_image_that_is_gone_has_no_memory(tmp_path: Path) -> None:
    release_image(tmp_path / "gone")
