"""A calibration file is read as far as it is asked for."""

import pytest
import torch

from pikv_megatron.calibrated import FittedLayer, load_calibrated, save_calibrated, section


class Counted:
    """A file that notes what is read of it."""

    def __init__(self, file):
        self._file, self.read = file, []

    def get_tensor(self, key):
        self.read.append(key)
        return self._file.get_tensor(key)


def test_a_section_is_all_that_is_read(tmp_path):
    path = tmp_path / "file.safetensors"
    layers = {
        number: {"gate.weight": torch.full((2,), float(number)), "keys.scatter": torch.zeros(9)}
        for number in range(2)
    }
    save_calibrated(path, {"model": "tiny"}, layers)
    found = load_calibrated(path)
    assert (found.path, found.manifest) == (path, {"model": "tiny"})
    assert {number: set(layer) for number, layer in found.layers.items()} == {
        number: set(layer) for number, layer in layers.items()
    }
    counted = Counted(found.layers[1]._file)
    layer = FittedLayer(counted, found.layers[1]._keys).to(torch.device("cpu"))
    assert section(layer, "router.source gate", "gate")["weight"].tolist() == [1.0, 1.0]
    assert counted.read == ["1.gate.weight"] and "keys.scatter" in layer and len(layer) == 2
    with pytest.raises(ValueError, match="needs the section 'heads'"):
        section(layer, "retention duo", "heads")
