"""Tests which ``quantization_config`` counts as NVFP4, and what the others are refused with."""

import json

import pytest
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import FORMAT, QUANTIZATION_CONFIG, read_quantization


def with_quantization(tmp_path, quantization):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return tmp_path


def changed(*path, value):
    config = json.loads(json.dumps(QUANTIZATION_CONFIG))
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return config


def test_read_quantization(tmp_path):
    assert read_quantization(with_quantization(tmp_path, None)) == "none"
    assert read_quantization(with_quantization(tmp_path, QUANTIZATION_CONFIG)) == "nvfp4"
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])  # quantizes activations as well
    w4a4 = QuantizationConfig(config_groups={"group_0": scheme}, format=FORMAT, ignore=["lm_head"])
    assert read_quantization(with_quantization(tmp_path, w4a4.model_dump(mode="json"))) == "nvfp4"


@pytest.mark.parametrize(
    "quantization, named",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "unknown"),
        (changed("format", value="pack-quantized"), "pack-quantized"),
        (changed("format", value="mixed-precision"), "mixed-precision"),
        (changed("config_groups", "group_0", "weights", "group_size", value=32), "group_0"),
        (changed("config_groups", "group_0", "weights", "type", value="int"), "group_0"),
        (changed("config_groups", "group_0", "weights", value=None), "group_0"),
        (changed("transform_config", value={"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config"),
        (changed("sparsity_config", value={"format": "sparse-bitmask"}), "sparsity_config"),
    ],
)
def test_other_quantizations_are_refused(tmp_path, quantization, named):
    with pytest.raises(CheckpointError) as error:
        read_quantization(with_quantization(tmp_path, quantization))
    assert named in str(error.value) and "original checkpoint" in str(error.value)


def test_modelopt_is_refused(tmp_path):
    with_quantization(tmp_path, None)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="modelopt"):
        read_quantization(tmp_path)
