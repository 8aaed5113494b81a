"""Tests the switch from outside: real processes of `python -m verl.trainer.main_ppo`.

They stop before Ray or only print. Most are forked from a process that has imported the packages
that verl and vLLM import, but neither of the two (``tests/helpers/fork_server.py``).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qerl_verl.job import Job
from tests.helpers import fork_server

MAIN = [sys.executable, "-m", "verl.trainer.main_ppo"]
STATE = """
import verl, sys
import verl.workers.engine, verl.trainer.ppo.v1
from verl.workers.engine.base import EngineRegistry
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout import vllm_async_server
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import get_quantization_config
print(sorted((m, b, str(k), c.__module__) for m, bs in EngineRegistry._engines.items() for b, ks in bs.items() for k, c in ks.items()))
print(sorted((k, c.__module__) for k, c in TRAINER_REGISTRY.items()))
print(PlatformRegistry.registered_names())
print(get_quantization_config("compressed-tensors").__module__)
print(RolloutReplicaRegistry.get("vllm").__module__)
print(sorted(CheckpointEngineRegistry._registry))
print(sorted(m for m in sys.modules if m.startswith("qerl_verl")) if "qerl" not in sys.argv else "")
"""


def run(command, cwd, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=900
    )


IMPORTED = ("torch", "transformers", "peft", "ray", "hydra", "tensordict", "datasets", "fastapi", "openai", "xgrammar")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Provides a process without verl, vLLM and QeRL, from which others are forked."""
    log = tmp_path_factory.mktemp("server") / "log"
    with fork_server.ForkServer(["-m", "tests.helpers.fork_server", *IMPORTED], log) as running:
        yield running


@pytest.fixture(scope="module")
def fork(server):
    """Returns :func:`run` with forks: ``fork(folder, *arguments)`` runs verl's main_ppo, and
    ``fork(folder, *arguments, code=TEXT)`` other code.
    """

    def start(cwd, *arguments, code=None, **environment):
        out, err = (Path(cwd) / name for name in ("out", "err"))
        program = {"module": MAIN[2]} if code is None else {"code": f"import sys\n{NOT_YET}\n{code}"}
        program |= {"arguments": arguments, "environment": environment, "cwd": str(cwd)}
        (status,) = server.run([program | {"out": str(out), "err": str(err)}])
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())

    return start


NOT_YET = "assert not {'verl', 'vllm', 'qerl_verl'} & sys.modules.keys(), 'the server has imported too much'"


def test_without_the_switch_the_configuration_is_byte_identical(fork, tmp_path):
    with_plugin = fork(tmp_path, "--cfg", "job")
    without = fork(tmp_path, "--cfg", "job", VERL_USE_EXTERNAL_PLUGINS="none")
    assert with_plugin.returncode == without.returncode == 0
    assert "actor_rollout_ref" in without.stdout and with_plugin.stdout == without.stdout


@pytest.fixture(scope="module")
def stock(fork, tmp_path_factory):
    """Returns the registrations of a process without plugins."""
    return fork(tmp_path_factory.mktemp("stock"), code=STATE, VERL_USE_EXTERNAL_PLUGINS="none", VLLM_PLUGINS="")


def test_without_the_switch_no_class_of_verl_or_vllm_is_replaced(fork, stock, tmp_path):
    ours = fork(tmp_path, code=STATE)
    assert stock.returncode == ours.returncode == 0, stock.stderr + ours.stderr
    stock, ours = stock.stdout.splitlines()[-7:], ours.stdout.splitlines()[-7:]
    assert "PPOTrainer" not in stock[0] and "verl.workers.engine.fsdp" in stock[0]
    assert stock[4] == "verl.workers.rollout.vllm_rollout.vllm_async_server"
    assert ours[:6] == stock[:6]


def test_with_the_switch_a_worker_registers_everything_and_changes_vllms_quantization_and_replica(
    fork, stock, tmp_path
):
    ours = fork(tmp_path, "qerl", code=STATE, **Job().environment())
    assert ours.returncode == 0, ours.stderr
    stock, ours = (
        [eval(line) if line[0] in "[(" else line for line in o.stdout.splitlines()[-7:-1]] for o in (stock, ours)
    )
    added = set(ours[0]) - set(stock[0])
    assert set(stock[0]) < set(ours[0]) and {(m, b, d) for m, b, d, _ in added} == {
        ("language_model", "fsdp2", "('cuda', 'qerl')"),
        ("language_model", "fsdp2", "('cpu', 'qerl')"),
        ("value_model", "fsdp2", "('cuda', 'qerl')"),
        ("value_model", "fsdp2", "('cpu', 'qerl')"),
    }
    assert set(ours[1]) - set(stock[1]) == {
        ("qerl_sync", "qerl_verl.trainer.ppo"),
        ("qerl_colocate_async", "qerl_verl.trainer.ppo"),
        ("qerl_separate_async", "qerl_verl.trainer.ppo"),
    }
    assert set(ours[2]) - set(stock[2]) == {"cpu"}
    assert ours[3] == "qerl_verl.rollout.quantization" and ours[4] == "qerl_verl.rollout.server"
    assert set(ours[5]) - set(stock[5]) == {"qerl"}


def slow(*values):
    """Starts a process for each case; ``tests/config`` has the same refusals in one process."""
    return pytest.param(*values, marks=pytest.mark.slow)


def refused(fork, tmp_path, *overrides):
    result = fork(tmp_path, "+qerl=nvfp4", "algorithm.adv_estimator=grpo", *overrides)
    assert result.returncode != 0, result.stdout
    assert "ray init kwargs" not in result.stdout and "Started a local Ray" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor_rollout_ref.model.lora.merge=True"], "actor_rollout_ref.model.lora.merge=True"),
        slow(["+qerl.aqn.sigmas=3"], "qerl.aqn.sigmas: no such setting"),
        slow(["qerl.aqn.num_stages=1"], "qerl.aqn.num_stages=1: must be at least 2"),
        slow(["actor_rollout_ref.model.path=/nowhere"], "/nowhere"),
    ],
)
def test_a_refused_run_stops_before_ray_and_says_why(fork, tmp_path, overrides, expected):
    stderr = refused(fork, tmp_path, *overrides)
    assert "[qerl] The run was not started:" in stderr and expected in stderr


@pytest.mark.slow
def test_an_unsupported_architecture_is_refused(fork, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 8}'
    )
    stderr = refused(fork, tmp_path, f"actor_rollout_ref.model.path={tmp_path}/model")
    assert "GPT2LMHeadModel" in stderr and "Qwen2ForCausalLM" in stderr


def test_multirun_is_refused(fork, tmp_path):
    result = fork(tmp_path, "--multirun", "+qerl=nvfp4", "actor_rollout_ref.rollout.n=1,2")
    assert result.returncode != 0 and "--multirun" in result.stderr


def test_a_plugin_that_fails_to_load_ends_the_run_and_says_why(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise ImportError('planted')")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'qerl_verl.config.search_path':\n"
        "            raise ImportError('planted')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    result = run([*MAIN, "+qerl=nvfp4", "--cfg", "job"], tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "the plugin qerl_verl could not be loaded" in result.stderr and "planted" in result.stderr
    stock = run([*MAIN, "--cfg", "job"], tmp_path, PYTHONPATH=str(tmp_path))
    assert stock.returncode == 0 and "actor_rollout_ref" in stock.stdout


def test_running_from_the_repository_root_leaves_hugging_faces_kernels_alone(tmp_path):
    """transformers looks for a package called kernels. The folder of that name must not answer, nor
    hide a real one.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    ask = "from transformers.utils import is_kernels_available as a; import kernels; print(a(), kernels.__file__)"
    import_ours = "from qerl_verl.kernels.nvfp4_linear import nvfp4_linear"
    twice = "from importlib.util import find_spec; print(find_spec('kernels.nvfp4_linear'))"
    alone = run([sys.executable, "-c", f"{ask}; {import_ours}; {twice}"], root)
    assert alone.returncode == 0 and alone.stdout.startswith("False"), alone.stderr
    assert alone.stdout.splitlines()[-1] == "None"  # no module of ours has two names

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9.9.9'\nfrom kernels.inner import get_kernel\n")
    (tmp_path / "kernels" / "inner.py").write_text("get_kernel = 'the real one'\n")
    (tmp_path / "kernels-9.9.9.dist-info").mkdir()
    (tmp_path / "kernels-9.9.9.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 9.9.9\n")
    (tmp_path / "kernels-9.9.9.dist-info" / "top_level.txt").write_text("kernels\n")
    ask += "; from kernels import get_kernel; print(get_kernel)"
    real = run([sys.executable, "-c", f"{ask}; {import_ours}"], root, PYTHONPATH=str(tmp_path))
    assert real.returncode == 0, real.stderr
    assert real.stdout.startswith(f"True {tmp_path}") and "the real one" in real.stdout
