"""What the callback does around the rules."""

from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from qerl_verl.config import callback
from qerl_verl.config.settings import SettingsError
from qerl_verl.platform.lost_processes import LostProcess


def test_another_program_of_verls_is_refused(monkeypatch):
    monkeypatch.setattr(callback, "_check_that_verl_loaded_the_plugin", lambda: None)
    with pytest.raises(SettingsError, match="verl.trainer.main_ppo"):
        callback.prepare(OmegaConf.create({"qerl": {}}), set())


NODE = "node2 (10.0.0.2): Connection closed by peer"
PROCESS = LostProcess("AgentLoopWorkerTQ (process 7 on 10.0.0.1)", "it ended abruptly")


@pytest.mark.parametrize(
    ("failed", "nodes", "processes", "said"),
    [
        (True, [NODE], [PROCESS], [f"because a node is gone: {NODE}", "when the cluster has its nodes again"]),
        (True, [], [PROCESS], [f"because a process is gone: {PROCESS.name};", "when the reason is fixed"]),
        (True, [], [LostProcess("WorkerDict", "ValueError: bad", started=False)], []),
        (True, [], [], []),
        (False, [NODE], [PROCESS], []),
    ],
)
def test_a_run_that_fails_because_of_a_loss_names_it_and_how_to_go_on(capsys, failed, nodes, processes, said):
    result, made = JobReturn(), callback.QeRLCallback()
    result.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    result.return_value = RuntimeError("Connection closed by peer") if failed else None
    ended = []
    made._nodes = SimpleNamespace(find_lost=lambda error, say: nodes)
    made._processes = SimpleNamespace(end=lambda failed: ended.append(failed) or processes)
    made.on_run_end(OmegaConf.create({"trainer": {"default_local_dir": "/shared/checkpoints"}}), result)
    lines = capsys.readouterr().out.splitlines()
    assert ended == [failed] and len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))
    assert not lines or lines[-1].endswith(" in /shared/checkpoints")
