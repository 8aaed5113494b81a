"""Checks of CPUs, GPUs and folders for temporary files against what verl and Ray need.

verl waits without a message for resources that Ray never gets, so a shortage that is known
beforehand is refused.
"""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig

from qerl_verl.config.host import Host
from qerl_verl.config.keys import Get, get_value
from qerl_verl.config.reserved import is_separate, reserved
from qerl_verl.config.rules import ROLLOUT, has_flash_attention, trained_models
from qerl_verl.platform.ray_cluster import RAY_INIT, RayCluster, answers

SOCKET_PATH = 107
"""Characters that the path of a Unix socket has room for (sun_path of unix(7), less the closing
zero)."""

RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray adds to its folder (ray/_private/node.py)."""

JOB_SOCKET = "/qerl-job-12345678/00000000-0000-0000-0000-000000000000"
"""What a job's folder and a socket of vLLM's in it add to the folder for temporary files."""

STARTED_ONLY = ("num_cpus", "num_gpus", "resources", "labels", "object_store_memory")
"""Arguments of ``ray.init`` that it refuses where it joins a cluster (ray/_private/worker.py)."""


def find_problems(config: DictConfig, host: Host, cluster: RayCluster | None) -> list[str]:
    """Returns the resources for which Ray would wait without end, or fail, one sentence each.

    Args:
        config: the configuration after the rules.
        host: the driver's machine, if the run starts Ray.
        cluster: the cluster that is joined, None if the run starts Ray.
    """
    get = partial(get_value, config)
    out = _parallel_problems(get) + _attention_problems(config, host)
    if cluster is not None:
        return out + _joining_problems(get, cluster)
    return out + _started_problems(get, host) + folder_problems(host, get(f"{RAY_INIT}._temp_dir"))


def _started_problems(get: Get, host: Host) -> list[str]:
    needed, out = reserved(get), []
    on_cpu = get("trainer.device") == "cpu"
    cpus, gpus = get(f"{RAY_INIT}.num_cpus"), get(f"{RAY_INIT}.num_gpus")
    if get("trainer.nnodes") > 1:
        out.append(
            f"trainer.nnodes={get('trainer.nnodes')}: the run would start Ray on this machine "
            "alone; join a cluster with RAY_ADDRESS (docs/launching.md), or set it to 1"
        )
    elif (host.gpus if gpus is None else gpus) < needed.gpus and not on_cpu:
        where = f"{RAY_INIT}.num_gpus={gpus}" if gpus is not None else f"this machine has {host.gpus}"
        out.append(
            f"trainer.n_gpus_per_node={get('trainer.n_gpus_per_node')}: the run needs "
            f"{needed.gpus} GPUs and {where}; lower it, or set RAY_ADDRESS to join a cluster that "
            "has them"
        )
    elif (found := host.cpus if cpus is None else cpus) < needed.cpus:
        where = f"{RAY_INIT}.num_cpus={cpus}" if cpus is not None else f"this machine has {host.cpus} CPUs"
        unit = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
        out.append(
            f"{where}: verl reserves {needed.cpus} of Ray's CPUs ({needed.parts}) and would wait "
            f"for {needed.cpus - found} without end; set {RAY_INIT}.num_cpus={needed.cpus} (Ray "
            f"counts CPUs and binds none), or lower {unit}"
        )
    return out


def _joining_problems(get: Get, cluster: RayCluster) -> list[str]:
    if cluster.address.startswith(("http://", "https://")):
        return [
            f"{cluster.found_by}={cluster.address}: that is an address for `ray job submit`; start "
            "the run with recipes/ray_job.sh, or give host:port of the cluster's head"
        ]
    if not answers(cluster.address):
        what = "no Ray runs on this machine" if cluster.address == "auto" else f"no Ray answers at {cluster.address}"
        return [
            f"{cluster.found_by}: {what}; start the cluster, give its address, or start a Ray of "
            f"this run's own with +{RAY_INIT}.address=local"
        ]
    return [
        f"{RAY_INIT}.{name}={get(f'{RAY_INIT}.{name}')}: the run joins the Ray cluster at "
        f"{cluster.address} ({cluster.found_by}), which has resources of its own; remove the "
        f"setting, or start a Ray of this run's own with +{RAY_INIT}.address=local"
        for name in STARTED_ONLY
        if get(f"{RAY_INIT}.{name}") is not None
    ]


def _parallel_problems(get: Get) -> list[str]:
    own = is_separate(get)
    gpus = get(f"{ROLLOUT}.n_gpus_per_node") if own else get("trainer.n_gpus_per_node")
    nodes = get(f"{ROLLOUT}.nnodes") if own else get("trainer.nnodes")
    names = [f"{kind}_parallel_size" for kind in ("tensor_model", "data", "pipeline_model")]
    sizes = {name: get(f"{ROLLOUT}.{name}") or 1 for name in names}
    one = sizes["tensor_model_parallel_size"] * sizes["data_parallel_size"] * sizes["pipeline_model_parallel_size"]
    total = (gpus or 0) * (nodes or 0)
    if total % one == 0:
        return []
    said = ", ".join(f"{ROLLOUT}.{name}={size}" for name, size in sizes.items() if size > 1)
    return [
        f"{said}: one copy of the rollout model takes {one} GPUs, and {total} are no multiple of that; set it to fit"
    ]


def _attention_problems(config: DictConfig, host: Host) -> list[str]:
    if not host.gpus:
        return []
    keys = (f"{model}.override_config.attn_implementation" for model in trained_models(config))
    asked = [key for key in keys if get_value(config, key) == "flash_attention_2"]
    if not asked or has_flash_attention():
        return []
    return [f"{key}=flash_attention_2: flash-attn is not installed; install it, or set sdpa" for key in asked]


def folder_problems(host: Host, ray_folder: str | None = None) -> list[str]:
    """Returns folders for temporary files whose sockets would have too long a path. Ray would end
    with "AF_UNIX path length".

    Args:
        host: the driver's machine.
        ray_folder: Ray's own folder, ``ray_init._temp_dir``; None is ``ray`` in RAY_TMPDIR, TMPDIR
            or /tmp.
    """
    environment = host.environment
    out = []
    if ray_folder:
        key, folder, added = f"{RAY_INIT}._temp_dir", ray_folder, RAY_SOCKET
    else:
        key = next((name for name in ("RAY_TMPDIR", "TMPDIR") if environment.get(name)), "")
        folder, added = environment.get(key, "/tmp"), f"/ray{RAY_SOCKET}"
    out.append(_too_long(key, folder, added, "Ray"))
    out.append(_too_long("TMPDIR", host.temporary_folder, JOB_SOCKET, "vLLM"))
    return [problem for problem in out if problem]


def _too_long(key: str, folder: str, added: str, whose: str) -> str | None:
    fits = SOCKET_PATH - len(added)
    if len(folder.rstrip("/")) <= fits:
        return None
    other = " or set RAY_TMPDIR=/tmp" if key == "TMPDIR" and whose == "Ray" else ""
    return (
        f"{key}={folder}: {len(folder)} characters are too long for the path of a socket of "
        f"{whose}'s; give a folder of at most {fits} characters{',' if other else ''}{other}"
    )


def find_remarks(config: DictConfig, cluster: RayCluster | None) -> list[str]:
    """Returns one line on the cluster that the run joins and the resources that it needs there."""
    if cluster is None:
        return []
    needed = reserved(partial(get_value, config))
    return [
        f"Ray: joins the cluster at {cluster.address} ({cluster.found_by}); needs {needed.gpus} GPUs and {needed.cpus} CPUs of it"
    ]
