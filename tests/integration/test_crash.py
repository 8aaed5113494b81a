"""main_ppo is killed while it saves; what is on the disk then, and in the middle of an update, is a checkpoint to go on from.

One start, and a slow one for a signal to the driver. That the next start passes over a half checkpoint is in ``test_main_ppo.py``; ``crash_table.py``, run by hand, kills
every process at every phase, resumes and compares bit for bit.
"""

import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from crash_table import START_SECONDS, kill_at, overrides  # noqa: E402
from tiny_job import Job, checkpoint_differences, make_inputs, traces  # noqa: E402

from qerl_verl.trainer.checkpoints import find_damage, find_resumable, list_checkpoints  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, bf16_checkpoint):
    """The checkpoints in the middle of the update of step 2, and after a kill in the middle of the save of step 3."""
    folder = tmp_path_factory.mktemp("crash")
    inputs = make_inputs(folder, bf16_checkpoint)
    checkpoints = folder / "job" / "checkpoints"
    job = Job(folder / "job", overrides(inputs, checkpoints), hold_folder=folder / "hold").start()
    try:
        job.hold("update", 2)
        job.wait_until(job.held, START_SECONDS, "update of step 2")
        shutil.copytree(checkpoints, folder / "in_update")
        row = kill_at(job, "actor", "save", 3)
    finally:
        job.end()
    return job, row, folder / "in_update", checkpoints


def test_in_the_middle_of_an_update_the_checkpoint_before_is_there_untouched(killed):
    _, _, in_update, checkpoints = killed
    assert [f.name for f in list_checkpoints(in_update)] == ["global_step_1"]
    assert find_resumable(in_update, print) == in_update / "global_step_1"
    assert checkpoint_differences(in_update / "global_step_1", checkpoints / "global_step_1") == []
    assert checkpoint_differences(in_update / "global_step_1", checkpoints / "global_step_2") != []


def test_a_kill_in_the_middle_of_a_save_ends_the_job_and_leaves_the_checkpoint_before(killed, capsys):
    job, row, _, checkpoints = killed
    assert row["ended"].endswith("code 1") and row["outlived"] == []
    assert 0 < row["files"] < 10 and list((checkpoints / "global_step_3" / "actor").glob("optim_*"))
    assert find_damage(checkpoints / "global_step_3") is not None
    assert find_resumable(checkpoints, print) == checkpoints / "global_step_2"
    assert sorted(job.metrics()) == [1, 2] and job.metrics()[2]["actor/grad_norm"] > 0


@pytest.mark.slow
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
