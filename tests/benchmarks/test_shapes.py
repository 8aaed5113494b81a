"""Tests the random models of the benchmarks, and the verdict of the benchmark of a mixture on
its speed."""

import bench_moe
import pytest
import shapes

from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.validation import validate_nvfp4_checkpoint


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_a_random_checkpoint_is_a_valid_one(tmp_path, shape):
    folder = shapes.write_nvfp4(tmp_path / shape, shape)
    validate_nvfp4_checkpoint(folder)
    layers = range(shapes.SHAPES[shape]["num_hidden_layers"])
    adapted = {f"model.layers.{i}.{name}": s for i in layers for name, s in shapes.linears(shape).items()}
    found = adaptable_shapes(folder)
    assert {name: found[name] for name in found if ".experts." not in name} == adapted


def test_a_shape_may_have_fewer_layers():
    whole = shapes.SHAPES["30B-A3B"]
    assert shapes.SHAPES["30B-A3B-24"] == whole | {"num_hidden_layers": 24}
    assert shapes.SHAPES["7B-2"]["vocab_size"] == 32768  # an entry of its own
    for name in ("30B-A3B-x", "9B-2", "9B"):
        with pytest.raises(KeyError, match="choose one of 7B, "):
            shapes.SHAPES[name]


@pytest.mark.parametrize(
    ("sequences", "ratio", "verdict"),
    [(1, 2.0, "the aim is met"), (1, 1.9, "enough"), (1, 1.2, "too slow"), (256, 1.0, "enough")],
)
def test_a_speed_is_judged_by_its_target(sequences, ratio, verdict):
    line = bench_moe.judge({f"decode {sequences}": ratio}, sequences)
    assert line.startswith(f"{sequences} sequences: {ratio:.2f}x") and line.endswith(f": {verdict}")
