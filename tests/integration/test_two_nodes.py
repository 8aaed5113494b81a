"""Training on two nodes through ``recipes/ray_job.sh``: it trains, loses a node, and goes on from
the checkpoint.

Each node holds a rank of the actor and a replica of the rollout; data, cache and checkpoints lie in
the folder that both see. The test sets the nodes up itself (``two_nodes.py``).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qerl_verl.trainer.checkpoints import find_damage
from qerl_verl.trainer.noise import NOISE_FILE
from tests.integration.tiny_job import make_inputs, title
from tests.integration.two_nodes import BIN, DASHBOARD, Node, TwoNodes, cluster_environment

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 4, 2
MEMORY_GB = 12
START_SECONDS, END_SECONDS = 900, 240


class SubmittedJob:
    """``recipes/ray_job.sh``, run by somebody who reaches the head's dashboard."""

    def __init__(self, cluster: TwoNodes, log: Path, overrides: list[str], model: Path):
        head = cluster.nodes[0]
        environment = {
            **cluster.environment,
            "RAY_ADDRESS": f"http://{head.address}:{DASHBOARD}",
            "NNODES": "2",
            "GPUS_PER_NODE": "1",
            "SHARED": str(cluster.shared),
            "MODEL": str(model),
            "JOB_PYTHON": sys.executable,
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        self.log = log
        command = head.from_outside(["bash", str(ROOT / "recipes" / "ray_job.sh"), *overrides])
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    def wait_until(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.text()[-6000:]}"
            assert time.monotonic() < end, f"no {what} within {seconds} s:\n{self.text()[-6000:]}"
            time.sleep(0.1)

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job has not ended within {seconds} s:\n{self.text()[-6000:]}") from None


def whole(checkpoint: Path) -> bool:
    return checkpoint.is_dir() and find_damage(checkpoint) is None


def titles(node: Node) -> list[str]:
    """Returns the title of every process of a node."""
    return [title(process) for process in node.processes()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, bf16_checkpoint):
    """Returns both jobs and what they left, and the second node's name and address."""
    if (free := psutil.virtual_memory().available / 1e9) < MEMORY_GB:
        pytest.skip(f"two ranks and two engines take {MEMORY_GB} GB of memory, {free:.0f} are free")
    folder = tmp_path_factory.mktemp("two_nodes")
    shared = folder / "shared"
    shared.mkdir()
    model = shared / "model"
    shutil.copytree(bf16_checkpoint, model)
    metrics = shared / "metrics.jsonl"
    environment = cluster_environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}
    overrides = [o for o in make_inputs(shared, model) if not o.startswith(("+qerl=", "actor_rollout_ref.model.path"))]
    overrides += [
        f"trainer.total_training_steps={STEPS}",
        f"trainer.save_freq={SAVED}",
        "trainer.logger=[console,file]",
        "qerl.aqn.schedule=adaptive",
        "qerl.aqn.target_kl=1e-2",
        "qerl.aqn.sigma_end=1e-4",
    ]
    checkpoints = shared / "checkpoints" / "qerl" / "gsm8k_grpo_nodes"
    found = {"checkpoints": checkpoints, "shared": shared}
    with TwoNodes(folder, shared, environment) as cluster:
        found["name"], found["address"], found["isolated"] = (
            cluster.nodes[1].name,
            cluster.nodes[1].address,
            cluster.isolated,
        )
        job = SubmittedJob(cluster, folder / "first.log", overrides, model)
        job.wait_until(lambda: whole(checkpoints / f"global_step_{SAVED}"), START_SECONDS, "checkpoint")
        found["titles"] = [titles(node) for node in cluster.nodes]
        cluster.nodes[1].take_away()
        began = time.monotonic()
        found["first"], found["first_code"] = job, job.wait(END_SECONDS)
        found["seconds"] = time.monotonic() - began
        found["first_metrics"] = read_metrics(metrics)
        cluster.replace(1)
        found["left"] = [
            t for t in titles(cluster.nodes[0]) if re.search("ray::(WorkerDict|QeRLHttpServer|TaskRunner)", t)
        ]
        again = SubmittedJob(cluster, folder / "second.log", overrides, model)
        found["second"], found["second_code"] = again, again.wait(START_SECONDS)
        found["second_metrics"] = read_metrics(metrics)
    return found


def read_metrics(path: Path) -> dict[int, dict]:
    out: dict[int, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        out.setdefault(entry["step"], {}).update(entry["data"])
    return out


def test_every_node_has_a_rank_and_a_replica(run):
    for found in run["titles"]:
        assert sum("ray::WorkerDict" in t for t in found) == 1, found
        assert sum("ray::QeRLHttpServer" in t for t in found) == 1 and any("VLLM::Worker" in t for t in found), found


def test_the_ranks_train_and_the_rollout_agrees_with_them(run):
    metrics = run["first_metrics"]  # a step's come after its checkpoint, with which the node goes
    assert set(range(1, SAVED)) <= set(metrics)
    for step in range(1, SAVED):
        assert metrics[step]["actor/grad_norm"] > 0
    assert metrics[1]["training/rollout_probs_diff_mean"] < 2e-3  # with hardly any noise


def test_without_the_node_the_job_ends_in_time_and_names_it(run):
    assert run["first_code"] != 0, run["first"].text()[-4000:]
    assert run["seconds"] < END_SECONDS
    named = f"{re.escape(run['name'])} \\({re.escape(run['address'])}\\)" if run["isolated"] else ""
    told = re.search(rf"\[qerl\] the run has ended because a node is gone: {named}", run["first"].text())
    assert told, run["first"].text()[-6000:]
    assert run["left"] == []
    assert whole(run["checkpoints"] / f"global_step_{SAVED}")


def test_the_same_command_goes_on_from_the_checkpoint(run):
    assert run["second_code"] == 0, run["second"].text()[-6000:]
    assert set(run["second_metrics"]) >= {SAVED + 1, STEPS}
    assert run["second"].text().count("quantized") <= 1
    assert whole(run["checkpoints"] / f"global_step_{STEPS}")


def test_the_adaptive_noise_goes_on_where_the_checkpoint_left_it(run):
    saved = json.loads((run["checkpoints"] / f"global_step_{SAVED}" / NOISE_FILE).read_text())
    decided = {int(step): sigma for step, sigma in saved["sigmas"].items()}
    # the divergence is far below the target, so sigma grows
    assert decided[SAVED + 1] > decided[1] == 1e-4
    assert run["second_metrics"][SAVED + 1]["qerl/aqn_sigma"] == decided[SAVED + 1]
    assert run["second_metrics"][SAVED + 1]["qerl/aqn_sigma_effective"] == pytest.approx(decided[SAVED + 1], rel=0.2)
