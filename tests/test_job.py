"""The document by which the processes of a run learn its settings."""

import json
import subprocess
import sys

import pytest

from qerl_verl import __version__
from qerl_verl.config.settings import AQNSettings, QeRLSettings, RolloutSettings
from qerl_verl.job import (
    JOB_ENV,
    BaseSharing,
    Job,
    JobError,
    LoraSettings,
    RolloutLayers,
    find_job,
    this_job,
)
from qerl_verl.switch import running_arm, switched_on

JOB = Job(
    QeRLSettings(arm="mxfp4", kernel="pytorch", aqn=AQNSettings(enable=False, seed=7)),
    LoraSettings(8, 16),
    "float32",
    BaseSharing("key", "/model"),
    {"actor": "someone/model"},
)


@pytest.mark.parametrize("job", [JOB, Job()])
def test_a_process_reads_what_the_driver_wrote(monkeypatch, job):
    for name, value in job.environment().items():
        monkeypatch.setenv(name, value)
    assert find_job() == this_job() == job
    assert switched_on() and running_arm() == job.settings.arm


def test_a_process_outside_of_a_run_has_none(monkeypatch):
    monkeypatch.delenv(JOB_ENV, raising=False)
    assert find_job() is None and running_arm() is None and not switched_on()
    with pytest.raises(JobError, match="QERL_JOB is not set: this process does not belong to a run"):
        this_job()


def changed(**changes):
    content = json.loads(Job().environment()[JOB_ENV])
    return json.dumps({key: value for key, value in (content | changes).items() if value != "gone"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvfp4", "is not a run's document .*JSONDecodeError"),
        ("[]", "is not a run's document"),
        ("{}", "is not a run's document .*version"),
        (
            changed(version="0.0.1"),
            f"written by QeRL 0.0.1 .* has {__version__}; install one version on every node",
        ),
        (changed(settings="gone"), "is not a run's document .*settings"),
        (changed(lora="gone"), "is not a run's document .*lora"),
        (changed(more=1), "is not a run's document .*more"),
        (changed(lora={"rank": 8}), "is not a run's document .*alpha"),
        (changed(settings={"kernel": "cutlass"}), "qerl.kernel=cutlass: choose one of"),
        (
            changed(settings={"recompte": "full"}),
            "qerl.recompte: no such setting; did you mean qerl.recompute?",
        ),
    ],
)
def test_a_document_that_cannot_be_followed_is_refused(monkeypatch, text, expected):
    monkeypatch.setenv(JOB_ENV, text)
    with pytest.raises(JobError, match=expected):
        this_job()


def test_an_engine_is_told_what_the_document_says():
    job = Job(QeRLSettings(rollout=RolloutSettings("triton", sleep_level=2)), LoraSettings(8, 16))
    expected = {
        "kernel": "triton",
        "lora": {"rank": 8, "alpha": 16, "experts": False},
        "sleep_level": 2,
        "noise": True,
    }
    assert job.layers.additional_config() == {"qerl": expected}
    assert RolloutLayers.of_engine(job.layers.additional_config()) == job.layers
    assert JOB.layers == RolloutLayers("auto", LoraSettings(8, 16), 1, noise=False)


@pytest.mark.parametrize("additional", [None, {}, {"theirs": 1}])
def test_an_engine_that_is_not_the_rollouts_is_told_nothing(additional):
    assert RolloutLayers.of_engine(additional) is None


def test_an_entry_of_another_version_is_refused():
    with pytest.raises(JobError, match="additional_config.qerl: unknown fp8"):
        RolloutLayers.of_engine({"qerl": {"kernel": "auto", "fp8": True}})


def test_a_process_that_cannot_read_its_document_ends_at_the_import_of_verl():
    """verl itself would log the exception at DEBUG and run without QeRL."""
    code = "import qerl_verl.plugin"
    environment = {**JOB.environment(), JOB_ENV: changed(version="0.0.1")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
    )
    assert done.returncode == 1 and b"written by QeRL 0.0.1" in done.stderr
