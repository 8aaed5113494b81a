"""Tests that an engine on the actor's memory equals one with its own base bit for bit, for every
family."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qerl_verl.nvfp4.architectures import get_architecture, supported_architectures
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from tests.helpers.tiny_families import make_family

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,  # tests/rollout/test_live_engine.py has one family in the quick tier
    pytest.mark.skipif(torch.cuda.is_available(), reason="drives vLLM's CPU engine"),
]

PROGRAM = ["-m", "tests.rollout.shared_families_process"]
ROOT = Path(__file__).parents[2]
PROMPTS = [list(range(3, 35)), [7, 7, 8, 9] * 9]
FAMILIES = [name for name in supported_architectures() if get_architecture({"architectures": [name]}).shares_base]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def seen(request, tmp_path_factory):
    """Returns the results of both engines by family. In float32 only the packed weights are
    shared."""
    folder, places = tmp_path_factory.mktemp("families"), {}
    for name in FAMILIES:
        places[name] = folder / name / "quantized"
        make_family(name, folder / name / "source")
        quantize_checkpoint(folder / name / "source", places[name], progress=False)
    out, log = folder / "seen.json", folder / "log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    command = [sys.executable, *PROGRAM, out, json.dumps(PROMPTS), request.param, *map(str, places.values())]
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, check=False)
    assert out.exists(), log.read_text()[-4000:]
    found = json.loads(out.read_text())
    return request.param, {name: found[str(place)] for name, place in places.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_on_the_actors_memory_is_the_same_engine(seen, name):
    dtype, found = seen[0], seen[1][name]
    assert "error" not in found, found["error"]
    assert found["shared"] == found["separate"]
    assert ("model.embed_tokens.weight" in found["in_place"]) is (dtype == "bfloat16")
