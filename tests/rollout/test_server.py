"""Tests QeRL's vLLM server with fake engines: what verl does not see, and when the base is read
again."""

import argparse
import asyncio
import inspect
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from qerl_verl.job import Job, JobError, LoraSettings, RolloutLayers
from qerl_verl.rollout import server as rollout_server
from qerl_verl.rollout.rope import rope_overrides
from qerl_verl.rollout.server import QeRLHttpServer, QeRLReplica
from tests.helpers.jobs import sharing_job
from tests.helpers.tiny_families import make_config

PATHS = {
    "inline": {"additional_config": {"qerl": {"lora": {"rank": 8, "alpha": 16}, "sleep_level": 1}, "theirs": 1}},
    "punica": {"additional_config": {"qerl": {"lora": None, "sleep_level": 1}}},
    "no config of ours": {},
}


class Engine:
    """Records what the server asks of vLLM."""

    errored = False

    def __init__(self):
        self.calls = []

    async def wake_up(self, tags=None):
        self.calls.append(("wake_up", *tags))

    async def sleep(self, level):
        self.calls.append(("sleep", level))

    async def collective_rpc(self, method):
        self.calls.append((method,))

    async def reset_prefix_cache(self, **kwargs): ...

    async def reset_encoder_cache(self): ...


def server(vllm=None, level=None, mode=RolloutMode.HYBRID, node_rank=0, config=None):
    """Returns a server in the state that verl's constructor leaves after its first lines."""
    made = QeRLHttpServer.__new__(QeRLHttpServer)
    if level:
        vllm = {"additional_config": {"qerl": {"lora": {"rank": 8, "alpha": 16}, "sleep_level": level}}}
    made.config = {"engine_kwargs": {"vllm": vllm}} if config is None else config
    made.rollout_mode, made.node_rank, made.engine = mode, node_rank, Engine()
    return made


@pytest.fixture(scope="module")
def model_config(nvfp4_checkpoint):
    return HFModelConfig(path=str(nvfp4_checkpoint), lora_rank=8, lora={"type": "lora"})


@pytest.mark.parametrize("path", PATHS)
def test_the_rank_is_hidden_from_vllms_lora_path_only_where_the_layers_hold_the_adapter(model_config, path):
    made = server(PATHS[path])
    made.model_config = made._init_model_config(model_config)
    hidden = path == "inline"
    assert made.model_config.lora_rank == (0 if hidden else 8)
    assert made.lora_as_adapter is not hidden  # decides about enable_lora and about LoRA requests
    assert made.model_config.hf_config is model_config.hf_config and made.model_config.path == model_config.path
    # the caller's stays
    assert model_config.lora_rank == 8 and model_config.lora == {"type": "lora"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["Ministral3ForCausalLM", "LlamaForCausalLM"])
def test_vllm_is_told_how_transformers_rotates_in_our_runs_alone(path, name):
    config = make_config(name)
    made = server(config=DictConfig({"engine_kwargs": {"vllm": PATHS[path]}, "quantization": None}))
    made.model_config = SimpleNamespace(hf_config=config)
    _, overrides = made._apply_quantization()
    assert overrides == ({} if path == "no config of ours" else rope_overrides(config))
    assert bool(overrides) == (name == "Ministral3ForCausalLM" and path != "no config of ours")


@pytest.mark.parametrize("config", [{}, {"engine_kwargs": None}, {"engine_kwargs": {"vllm": None}}])
def test_a_server_without_engine_arguments_is_verls(model_config, config):
    made = server(config=config)
    assert made._init_model_config(model_config).lora_rank == 8


def test_the_sleep_level_is_ours_where_there_is_a_node_of_ours(model_config):
    assert [server(level=level)._resolve_sleep_level() for level in (1, 2)] == [1, 2]
    assert server({"additional_config": {"qerl": {"lora": None}}})._resolve_sleep_level() == 1
    for lora_rank, level in ((8, 1), (0, 2)):  # verl's own rule
        made = server({})
        made.config = type("Config", (dict,), {"mtp": None})(made.config)
        made.model_config = type("Model", (), {"lora_rank": lora_rank, "lora": {}})()
        assert made._resolve_sleep_level() == vLLMHttpServer._resolve_sleep_level(made) == level


@pytest.mark.parametrize("level", [1, 2])
def test_a_base_that_is_the_actors_is_neither_copied_to_the_host_nor_read_again(monkeypatch, level):
    for name, value in sharing_job().environment().items():
        monkeypatch.setenv(name, value)
    made = server(level=level)
    asyncio.run(made._sleep_hybrid())
    asyncio.run(made.wake_up(["weights"]))
    assert made.engine.calls == [("sleep", 1), ("wake_up", "weights")]


@pytest.mark.parametrize(
    ("level", "tags", "reloads"),
    [(2, ["weights"], True), (2, None, True), (2, ["kv_cache"], False), (1, ["weights"], False), (1, None, False)],
)
def test_the_base_is_read_again_exactly_when_its_memory_comes_back_empty(level, tags, reloads):
    made = server(level=level)
    asyncio.run(made._sleep_hybrid())
    asyncio.run(made.wake_up(tags))
    expected = [("sleep", level), ("wake_up", *(tags or ("kv_cache", "weights")))]
    assert made.engine.calls == expected + [("qerl_reload_base",)] * reloads


@pytest.mark.parametrize(
    ("mode", "node_rank"),
    [(RolloutMode.HYBRID, 1), (RolloutMode.COLOCATED, 0), (RolloutMode.STANDALONE, 0)],
)
def test_a_server_that_does_not_sleep_at_level_2_reads_nothing(mode, node_rank):
    made = server(level=2, mode=mode, node_rank=node_rank)
    asyncio.run(made.wake_up())
    assert ("qerl_reload_base",) not in made.engine.calls


def test_another_servers_engine_is_left_alone():
    """The engine of a reward model has no arguments of QeRL."""
    made = server({})
    asyncio.run(made.wake_up())
    assert made.engine.calls == [("wake_up", "kv_cache", "weights")]


@pytest.mark.parametrize(
    ("ours", "calls"), [(True, []), (False, [("sleep", 1), ("wake_up", "weights"), ("wake_up", "kv_cache")])]
)
def test_an_engine_of_its_own_does_not_sleep_through_a_weight_sync(ours, calls, monkeypatch):
    """verl's server would drop the base at level 2, and copy it to the host and back at level 1."""
    made = server(level=2, mode=RolloutMode.STANDALONE) if ours else server({}, mode=RolloutMode.STANDALONE)
    made.config = type("Config", (dict,), {"free_cache_engine": True})(made.config)
    if not ours:
        monkeypatch.setattr(QeRLHttpServer, "_resolve_sleep_level", lambda self: 1)
    asyncio.run(made.release_kv_cache())
    asyncio.run(made.resume_kv_cache())
    assert made.engine.calls == calls


def test_the_replica_starts_our_server(nvfp4_checkpoint):
    from verl.workers.config import RolloutConfig

    config = RolloutConfig(name="vllm", mode="async", tensor_model_parallel_size=1)
    replica = QeRLReplica(0, config, HFModelConfig(path=str(nvfp4_checkpoint)), gpus_per_node=1)
    assert replica.server_class.__ray_metadata__.modified_class.__mro__[1:3] == (QeRLHttpServer, vLLMHttpServer)


def test_the_server_hands_on_what_acts_in_its_workers():
    """verl's collective_rpc returns nothing (vllm_async_server.py). Where this fails, the method
    can be removed.
    """
    made, told = server(level=1), []

    async def collective_rpc(method, kwargs):
        told.append((method, kwargs))
        return [{"absolute": 0.1}]

    made.engine.collective_rpc = collective_rpc
    arguments = {"seed": 1, "step": 2, "sigma": 0.1, "unit": "absolute"}
    assert asyncio.run(made.qerl_set_noise(**arguments)) == [{"absolute": 0.1}]
    assert told == [("qerl_set_noise", arguments)]
    assert "return" not in inspect.getsource(vLLMHttpServer.collective_rpc)


def test_a_dead_engine_is_named_on_the_node_that_has_it():
    made = server(level=1)
    made.engine.errored, made.engine.dead_error = False, RuntimeError("dead")
    asyncio.run(made.qerl_check_engine())
    made.engine.errored = True
    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(made.qerl_check_engine())
    made.node_rank = 1
    asyncio.run(made.qerl_check_engine())


@pytest.mark.parametrize("dies", [True, False])
def test_a_server_ends_after_its_engine(monkeypatch, capsys, dies):
    """A trainer that replaces failed prompts would query a dead engine for ever."""
    made, ended, looks = server(level=1), [], []
    arguments = argparse.Namespace(api_key=["mine"])

    async def verls(self, args):
        assert args is arguments

    async def run():
        await made.run_server(arguments)
        for _ in range(50):
            made.engine.errored = dies and len(looks) > 3
            looks.append(len(ended))
            await asyncio.sleep(0.002)

    monkeypatch.setattr(vLLMHttpServer, "run_server", verls)
    monkeypatch.setattr(rollout_server, "ENGINE_LOOK_SECONDS", 0.002)
    monkeypatch.setattr(rollout_server.os, "_exit", ended.append)
    asyncio.run(run())
    assert ended == [1] * dies and looks[4] == 0
    assert capsys.readouterr().err.count("[qerl] vLLM's engine of this server") == dies


def test_vllm_tells_whether_its_engine_is_dead():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert isinstance(AsyncLLM.errored, property) and isinstance(AsyncLLM.dead_error, property)


@pytest.mark.parametrize(
    ("path", "given", "variable", "status"),
    [
        ("inline", None, None, 401),
        ("punica", None, None, 401),
        ("no config of ours", None, None, 200),
        ("inline", ["mine"], None, 401),
        ("inline", None, "mine", 401),
    ],
)
def test_who_has_no_key_is_turned_away(monkeypatch, path, given, variable, status):
    """Uses vLLM's own application, as verl builds it (vllm_async_server.py, run_server)."""
    from starlette.testclient import TestClient
    from vllm.entrypoints.openai.api_server import build_app
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    arguments.api_key = given
    started = []

    async def verls(self, args: argparse.Namespace):
        started.append(args)

    monkeypatch.setattr(vLLMHttpServer, "run_server", verls)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    asyncio.run(server(PATHS[path]).run_server(arguments))
    app = build_app(started[0], ("generate",))
    app.state.args = started[0]

    async def reached():
        return {}

    app.add_api_route("/v1/reached", reached)
    client = TestClient(app)
    assert client.get("/v1/reached").status_code == status
    if key := variable or (given and given[0]):
        assert client.get("/v1/reached", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_an_engine_whose_settings_are_not_the_runs_is_refused(monkeypatch, model_config):
    for name, value in Job(lora=LoraSettings(8, 16)).environment().items():
        monkeypatch.setenv(name, value)
    same = RolloutLayers(lora=LoraSettings(8, 16), noise=True).additional_config()
    assert server({"additional_config": same})._init_model_config(model_config).lora_rank == 0
    other = RolloutLayers("triton", LoraSettings(8, 16), noise=True).additional_config()
    with pytest.raises(JobError, match="additional_config.qerl is .*kernel='triton'.* the run's settings say .*'auto'"):
        server({"additional_config": other})._init_model_config(model_config)
