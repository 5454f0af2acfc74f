import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.shared_device.models import KEPT_LAYERS, write_cut


def test_a_cut_keeps_layers_in_their_order_and_all_else(tmp_path: Path) -> None:
    source, cut = tmp_path / "source", tmp_path / "cut"
    source.mkdir()
    layers = {f"model.layers.{n}.mlp.up_proj.weight": np.full((2, 2), n, dtype=np.float16) for n in range(12)}
    save_file(layers | {"model.norm.weight": np.ones(2, dtype=np.float16)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 12, "hidden_size": 2}))
    (source / "tokenizer.json").write_text("{}")
    write_cut(source, cut, [0, 2, 10])
    written = load_file(cut / "model.safetensors")
    assert len(written) == 4
    assert [written[f"model.layers.{n}.mlp.up_proj.weight"][0, 0] for n in range(3)] == [0, 2, 10]
    assert json.loads((cut / "config.json").read_text()) == {"num_hidden_layers": 3, "hidden_size": 2}
    assert (cut / "tokenizer.json").exists()


def test_the_cut_of_smollm2_has_26_of_its_30_layers() -> None:
    assert len(KEPT_LAYERS) == 26
    assert sorted(set(range(30)) - set(KEPT_LAYERS)) == [12, 13, 14, 17]
