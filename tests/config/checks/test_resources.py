"""CPUs, GPUs, a Ray that runs and folders for temporary files: one row a case."""

import inspect

import pytest

from qerl_verl.config.checks import resources
from qerl_verl.config.draft import Draft
from qerl_verl.config.host import Host
from qerl_verl.config.reserved import reserved
from qerl_verl.config.rules import apply_rules
from qerl_verl.platform.ray_cluster import RayCluster

INIT = "ray_kwargs.ray_init"
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
ONE_GPU = ("trainer.n_gpus_per_node=1", "actor_rollout_ref.rollout.tensor_model_parallel_size=1")
SEPARATE = (
    "trainer.v1.trainer_mode=separate_async",
    "trainer.n_gpus_per_node=4",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=4",
)


def problems_of(composed, host, overrides, cluster=None, on_cpu=False):
    config = composed("algorithm.adv_estimator=grpo", *overrides)
    apply_rules(Draft(config), set(), on_cpu=on_cpu, starts_ray=cluster is None)
    return resources.find_problems(config, host, cluster)


@pytest.mark.parametrize(
    ("cpus", "gpus", "overrides", "expected"),
    [
        (13, 1, ONE_GPU, None),
        (8, 1, ONE_GPU, f"this machine has 8 CPUs: verl reserves 13 of Ray's CPUs (3 for each of 1 GPUs, 9 for TransferQueue, "
         f"1 to start others with) and would wait for 5 without end; set {INIT}.num_cpus=13"),
        (8, 1, (*ONE_GPU, f"{UNITS}=1"), None),
        (8, 1, (*ONE_GPU, f"{INIT}.num_cpus=13"), None),
        (64, 1, (*ONE_GPU, f"{INIT}.num_cpus=4"), f"{INIT}.num_cpus=4: verl reserves 13 of Ray's CPUs"),
        (33, 8, (), "this machine has 33 CPUs: verl reserves 34"),
        (34, 8, (), None),
        (31, 8, SEPARATE, None),
        (29, 8, SEPARATE, "verl reserves 30 of Ray's CPUs (3 for each of 4 GPUs, 2 for each of 4 GPUs of the rollout, 9 for"),
        (64, 1, (), "trainer.n_gpus_per_node=8: the run needs 8 GPUs and this machine has 1; lower it, or set RAY_ADDRESS"),
        (64, 4, SEPARATE, "the run needs 8 GPUs and this machine has 4"),
        (64, 8, (f"+{INIT}.num_gpus=2",), f"the run needs 8 GPUs and {INIT}.num_gpus=2"),
        (64, 8, ("trainer.nnodes=2",), "trainer.nnodes=2: the run would start Ray on this machine alone; join a cluster with"),
        (64, 8, ("actor_rollout_ref.rollout.tensor_model_parallel_size=3",),
         "tensor_model_parallel_size=3: one copy of the rollout model takes 3 GPUs, and 8 are no multiple"),
        (64, 1, ONE_GPU[:1], "tensor_model_parallel_size=2: one copy of the rollout model takes 2 GPUs, and 1 are no multiple"),
        (64, 8, ("+actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2",),
         "attn_implementation=flash_attention_2: flash-attn is not installed; install it, or set sdpa"),
    ],
)  # fmt: skip
def test_what_ray_would_wait_for_is_refused_with_both_numbers(composed, cpus, gpus, overrides, expected):
    problems = problems_of(composed, Host(cpus=cpus, gpus=gpus, cpu_vllm=False), overrides)
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


@pytest.mark.parametrize("overrides", [(), (f"{UNITS}=20",), ("trainer.v1.trainer_mode=separate_async",)])
def test_the_cpu_platform_declares_what_is_reserved(composed, overrides):
    """Slots and CPUs are logical there, so the switch declares as many as the run takes, on any
    machine."""
    assert problems_of(composed, Host(cpus=2, gpus=0, cpu_vllm=True), overrides, on_cpu=True) == []


def test_verl_and_transfer_queue_still_reserve_what_is_counted(composed):
    """Fails when they reserve another number of CPUs."""
    import transfer_queue.controller
    import transfer_queue.storage.simple_storage
    from verl.single_controller.ray.base import RayResourcePool, ResourcePoolManager
    from verl.workers.rollout.replica import RolloutReplica

    assert ResourcePoolManager.max_colocate_count == 3
    assert 'bundle = {"CPU": self.max_colocate_count}' in inspect.getsource(RayResourcePool.get_placement_groups)
    assert "max_colocate_count=2" in inspect.getsource(RolloutReplica.init_standalone)
    for module, name in (
        (transfer_queue.controller, "TransferQueueController"),
        (transfer_queue.storage.simple_storage, "SimpleStorageUnit"),
    ):
        assert f"@ray.remote(num_cpus=1)\nclass {name}" in inspect.getsource(module)
    stock = reserved(lambda key: {"trainer.n_gpus_per_node": 1, "trainer.nnodes": 1, UNITS: 8}.get(key))
    assert (stock.gpus, stock.cpus) == (1, 13)


CLUSTER = RayCluster("10.0.0.1:6379", "RAY_ADDRESS")


@pytest.mark.parametrize(
    ("overrides", "answers", "expected"),
    [
        ((), True, None),
        (("trainer.nnodes=4",), True, None),  # the cluster's nodes are not this one
        ((f"{INIT}.num_cpus=8",), True, f"{INIT}.num_cpus=8: the run joins the Ray cluster at 10.0.0.1:6379 (RAY_ADDRESS), which"),
        ((f"+{INIT}.resources={{a: 1}}",), True, f"{INIT}.resources="),
        ((), False, f"RAY_ADDRESS: no Ray answers at 10.0.0.1:6379; start the cluster, give its address, or start a Ray of "
         f"this run's own with +{INIT}.address=local"),
    ],
)  # fmt: skip
def test_a_cluster_that_is_joined_has_its_own_resources(composed, monkeypatch, overrides, answers, expected):
    monkeypatch.setattr(resources, "answers", lambda address: answers)
    for on_cpu in (False, True):
        problems = problems_of(composed, Host(cpus=2, gpus=0, cpu_vllm=on_cpu), overrides, CLUSTER, on_cpu=on_cpu)
        assert len(problems) == (expected is not None), problems
        assert expected is None or problems[0].startswith(expected)


def test_the_address_of_a_dashboard_is_none_to_join(composed):
    cluster = RayCluster("http://head:8265", "RAY_ADDRESS")
    (problem,) = problems_of(composed, Host(cpus=2, gpus=0, cpu_vllm=False), (), cluster)
    assert problem.startswith("RAY_ADDRESS=http://head:8265: that is an address for `ray job submit`")


SHORT, LONG, LONGER = "/scratch/" + "a" * 26, "/scratch/" + "a" * 36, "/scratch/" + "a" * 51


@pytest.mark.parametrize(
    ("environment", "temporary", "ray_folder", "expected"),
    [
        ({}, "/tmp", None, []),
        ({"TMPDIR": SHORT}, SHORT, None, []),
        ({"TMPDIR": LONG}, LONG, None, ["45 characters are too long for the path of a socket of Ray's; give a folder of at most 39"]),
        ({"TMPDIR": LONGER}, LONGER, None, ["TMPDIR={LONGER}: 60 characters", "socket of vLLM's; give a folder of at most 52"]),
        ({"TMPDIR": LONG, "RAY_TMPDIR": "/tmp"}, LONG, None, []),
        ({"RAY_TMPDIR": LONG}, "/tmp", None, ["RAY_TMPDIR={LONG}: 45 characters"]),
        ({"TMPDIR": LONGER, "RAY_TMPDIR": "/tmp"}, LONGER, None, ["of vLLM's; give a folder of at most 52"]),
        ({}, "/tmp", LONG, ["_temp_dir={LONG}: 45 characters are too long for the path of a socket of Ray's; give a folder of at most 43"]),
        ({"TMPDIR": LONG}, LONG, "/tmp/r", []),
    ],
)  # fmt: skip
def test_folders_whose_sockets_have_too_long_a_path(environment, temporary, ray_folder, expected):
    host = Host(cpus=8, gpus=0, cpu_vllm=True, environment=environment, temporary_folder=temporary)
    problems = resources.folder_problems(host, ray_folder)
    assert len(problems) == len(expected), problems
    for problem, part in zip(problems, expected, strict=True):
        assert part.format(LONG=LONG, LONGER=LONGER) in problem


def test_the_lengths_are_those_that_ray_and_the_job_folder_make(tmp_path, monkeypatch):
    import tempfile
    import uuid

    import ray._private.node as node

    from qerl_verl.platform import job_folder

    source = inspect.getsource(node.Node)
    assert 'default_prefix="plasma_store"' in source and 'f"session_{date_str}_{os.getpid()}"' in source
    assert len("2026-01-01_00-00-00_000000") == len(resources.RAY_SOCKET.split("_")[1] + "_00-00-00_000000")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(job_folder.atexit, "register", lambda *arguments: None)
    folder = job_folder.open_job_folder()
    assert len(f"{folder}/{uuid.uuid4()}") - len(str(tmp_path)) == len(resources.JOB_SOCKET)
