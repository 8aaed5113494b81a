"""A job whose processes are killed goes on bit for bit: some cases of ``killed_job.py``, about two
minutes each; and a signal to the driver.

``test_main_ppo.py`` has a kill in the middle of a save.
"""

import signal

import pytest

from qerl_verl.trainer.checkpoints import find_resumable
from tests.integration.killed_job import START_SECONDS, overrides, run
from tests.integration.tiny_job import Job, make_inputs, traces

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]
CASES = {
    ("driver", "rollout"): (-signal.SIGKILL, []),
    ("agent loop", "rollout"): (1, ["AgentLoopWorkerTQ"]),
    ("engine core", "old_log_prob"): (1, []),
    ("queue", "update"): (1, ["TransferQueueController"]),
    ("job", "update"): (-signal.SIGKILL, []),
    ("reward worker", "rollout"): (1, ["RewardLoopWorker"]),
    ("actor", "save"): (1, ["WorkerDict"]),
    ("storage", "old_log_prob"): (1, ["SimpleStorageUnit"]),
    ("server", "sync"): (1, ["QeRLHttpServer"]),
}
"""What is killed in which phase: the exit code of the job and what it names as lost."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {(row["victim"], row["phase"]): row for row in run(list(CASES), tmp_path_factory.mktemp("crash"), print)}


@pytest.mark.parametrize(("victim", "phase"), CASES)
def test_after_a_kill_and_a_resume_three_steps_are_those_of_the_unbroken_run(rows, victim, phase):
    row, (code, named) = rows[victim, phase], CASES[victim, phase]
    assert row["code"] == code and set(named) <= set(row["named"]), row["message"]
    assert row["differences"] == [] and row["outlived"] == [] and row["lost"] <= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143)])
def test_a_signal_to_the_driver_in_the_middle_of_a_step_ends_the_job_and_leaves_nothing(
    tmp_path, bf16_checkpoint, number, code
):
    """As ``scancel`` and the end of a pod send it."""
    before = traces()
    inputs = make_inputs(tmp_path, bf16_checkpoint)
    job = Job(tmp_path / "job", overrides(inputs, tmp_path / "job" / "checkpoints"), hold_folder=tmp_path / "hold")
    job.start()
    try:
        job.hold("update", 2)
        job.wait_until(job.held, START_SECONDS, "update of step 2")
        job.process.send_signal(number)
        ended = job.wait(60)
        log = job.log.read_text(errors="replace")
    finally:
        outlived = job.end()
    assert ended == code, log[-3000:]
    assert log.count(f"[qerl] {number.name} ends this process") == 1 and "*** SIGTERM received" not in log
    assert outlived == []
    left = {path.name for path in traces() - before}
    assert not [name for name in left if name.startswith(("qerl-job-", "psm_", "sem.mp-", "verl_weights_", "vllm"))]
    assert find_resumable(tmp_path / "job" / "checkpoints", print).name == "global_step_1"
