"""Tests rollout servers that are started while the actor is being built, with fakes for Ray."""

import asyncio
import logging
from concurrent.futures import Future

import pytest
from hydra import compose, initialize_config_module
from omegaconf import open_dict
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from qerl_verl.rollout import ahead
from qerl_verl.rollout import server as server_module
from qerl_verl.rollout.server import QeRLHttpServer, QeRLReplica

NODE, OTHER = "a" * 56, "b" * 56
"""Ids as Ray's are: 28 bytes in hexadecimal."""


class Call:
    """Stands for a method of an actor."""

    def __init__(self, calls, name, result=None):
        self._calls, self._name, self._result = calls, name, result

    def remote(self, *args, **kwargs):
        self._calls.append((self._name, args, kwargs))
        return _Ready(self._result)


class _Ready:
    def __init__(self, result):
        self._result = result

    def __await__(self):
        return self._result
        yield

    def future(self):
        done = Future()
        done.set_result(self._result)
        return done


class Server:
    """Stands for the handle of a server's actor, and records the calls."""

    def __init__(self):
        self.calls = []
        for name, result in (
            ("qerl_begin", None),
            ("get_master_address", ("host", 1, 2)),
            ("launch_server", None),
            ("get_server_address", ("host", 8000)),
        ):
            setattr(self, name, Call(self.calls, name, result))


class Remote:
    """Stands for ``ray.remote(QeRLHttpServer)``."""

    def __init__(self):
        self.created = []

    def options(self, **options):
        self._options = options
        return self

    def remote(self, **arguments):
        self.created.append((self._options, arguments))
        return Server()


class Worker:
    """Stands for a worker of the actor, on a node and a GPU."""

    def __init__(self, node, gpu):
        self.__ray_call__ = Call([], "call", (node, str(gpu)))


@pytest.fixture(scope="module")
def verl_config():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer")
    with open_dict(config):
        config.actor_rollout_ref.rollout.update(name="vllm", n_gpus_per_node=4, tensor_model_parallel_size=2)
        config.trainer.update(n_gpus_per_node=4, nnodes=1)
    return config


@pytest.fixture
def config(verl_config):
    return verl_config.copy()


@pytest.fixture
def remote(monkeypatch):
    """Replaces Ray by one node whose actors are fakes."""
    made = Remote()
    monkeypatch.setattr(ahead.ray, "remote", lambda cls: made)
    monkeypatch.setattr(
        ahead.ray, "nodes", lambda: [{"Alive": True, "NodeID": NODE}, {"Alive": False, "NodeID": OTHER}]
    )
    return made


def start(config):
    servers = ahead.ServersAhead()
    servers.start(config)
    servers._thread.join()
    return servers


def launch(replica, servers, node=NODE):
    """Runs verl's own launch of a replica on two GPUs of a node."""
    replica.server_class._ahead = servers
    replica.workers = [Worker(node, 0), Worker(node, 1)]
    asyncio.run(replica.launch_servers())
    return replica


def replica_of(config, rank):
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    return QeRLReplica(rank, rollout, model, rollout.n_gpus_per_node)


def test_verl_asks_for_the_servers_that_were_started(config, remote, capsys):
    """Names, node, environment and concurrency follow verl's launch_servers, whatever it
    becomes."""
    servers = start(config)
    assert "[qerl] start: rollout servers that start beside the actor: 2" in capsys.readouterr().out
    assert [options["name"] for options, _ in remote.created] == ["vllm_server_0_0", "vllm_server_1_0"]
    assert all(arguments == {} for _, arguments in remote.created)
    started, remote.created = [dict(options) for options, _ in remote.created], []
    for rank in (0, 1):
        replica = launch(replica_of(config, rank), servers)
        assert remote.created == []
        calls = [name for name, _, _ in replica.server_handle.calls]
        assert calls == ["qerl_begin", "get_master_address", "launch_server", "get_server_address"]
        (arguments,) = replica.server_handle.calls[0][1]
        assert arguments["replica_rank"] == rank and arguments["cuda_visible_devices"] == "0,1"
    # none is left, so verl starts one: with the same options
    again = launch(replica_of(config, 0), servers)
    (options, arguments) = remote.created[0]
    assert arguments["workers"] == again.workers and "qerl_begin" not in dict.fromkeys(
        c[0] for c in again.servers[0].calls
    )
    place, ours = options.pop("scheduling_strategy"), started[0].pop("scheduling_strategy")
    assert (place.node_id, place.soft) == (ours.node_id, ours.soft) and options == started[0]


def test_a_server_on_another_node_is_started_by_verl(config, remote, monkeypatch, caplog):
    killed = []
    monkeypatch.setattr(ahead.ray, "kill", killed.append)
    servers = start(config)
    started, remote.created = servers._servers["vllm_server_0_0"][1], []
    with caplog.at_level(logging.WARNING, "qerl_verl"):
        launch(replica_of(config, 0), servers, node=OTHER)
    assert killed == [started] and len(remote.created) == 1
    assert "vllm_server_0_0 was started for" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.rollout.name", "sglang"),
        ("actor_rollout_ref.rollout.disaggregation.enabled", True),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size", 8),  # a replica on two nodes
    ],
)
def test_what_verl_places_otherwise_is_left_to_it(config, remote, key, value):
    from omegaconf import OmegaConf

    OmegaConf.update(config, key, value)
    assert start(config)._servers == {} and remote.created == []


def test_on_several_nodes_nothing_is_started(config, remote, monkeypatch):
    monkeypatch.setattr(ahead.ray, "nodes", lambda: [{"Alive": True, "NodeID": n} for n in (NODE, OTHER)])
    assert start(config)._servers == {} and remote.created == []


def test_a_failure_leaves_the_start_to_verl(config, remote, monkeypatch, caplog):
    monkeypatch.setattr(ahead.ray, "nodes", lambda: 1 / 0)
    with caplog.at_level(logging.WARNING, "qerl_verl"):
        servers = start(config)
    assert "were not started ahead" in caplog.text
    launch(replica_of(config, 0), servers)
    assert len(remote.created) == 1


def test_a_server_that_was_started_before_a_failure_is_taken(config, remote, monkeypatch):
    """Its name is taken, so verl could not start it itself."""
    create = remote.remote

    def fail_after_one(**arguments):
        if remote.created:
            raise RuntimeError("no room")
        return create(**arguments)

    monkeypatch.setattr(remote, "remote", fail_after_one)
    servers = start(config)
    assert list(servers._servers) == ["vllm_server_0_0"]
    launch(replica_of(config, 0), servers)
    assert len(remote.created) == 1


class _Refused(ValueError):
    pass


def _constructor(self, **arguments):
    if arguments["replica_rank"] > 2:
        raise _Refused("no such model")
    self._master_address, self._master_port, self._dp_rpc_port = "host", arguments["replica_rank"], 2


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("asked_first", [True, False])
def test_a_server_works_once_its_arguments_have_come(monkeypatch, rank, asked_first):
    """The calls may arrive in either order, because Ray delivers the smaller one first."""
    monkeypatch.setattr(vLLMHttpServer, "__init__", _constructor)
    monkeypatch.setattr(server_module, "job_name", lambda: "job")

    async def use():
        server = QeRLHttpServer()
        calls = [server.get_master_address(), server.qerl_begin({"replica_rank": rank})]
        calls = calls if asked_first else calls[::-1]
        return await asyncio.wait_for(asyncio.gather(*calls), timeout=10)

    if rank > 2:
        with pytest.raises(_Refused, match="no such model"):
            asyncio.run(use())
    else:
        assert ("host", rank, 2) in asyncio.run(use())


def test_arguments_that_cannot_be_delivered_end_the_wait():
    server, failed = Server(), Future()
    server.qerl_refuse = Call(server.calls, "qerl_refuse")
    failed.set_exception(_Refused("the object is lost"))
    ahead._pass_on(server, failed)
    ((name, (error,), _),) = server.calls

    async def use():
        waiting = QeRLHttpServer()
        await asyncio.wait_for(asyncio.gather(waiting.get_master_address(), waiting.qerl_refuse(error)), timeout=10)

    assert name == "qerl_refuse"
    with pytest.raises(_Refused, match="the object is lost"):
        asyncio.run(use())


def test_a_server_that_verl_starts_has_its_arguments_at_once(monkeypatch):
    monkeypatch.setattr(vLLMHttpServer, "__init__", _constructor)
    monkeypatch.setattr(server_module, "job_name", lambda: "job")
    assert asyncio.run(QeRLHttpServer(replica_rank=1).get_master_address()) == ("host", 1, 2)
