"""Two ranks on two nodes, and one node is taken away: the driver ends in time and knows which.

Ray and gloo alone, in 1 GB; ``test_two_nodes.py`` does the same to a whole training run.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.two_nodes import BIN, DASHBOARD, TwoNodes, cluster_environment

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(900)]

BEGIN_SECONDS, END_SECONDS = 240, 200


def test_the_driver_names_the_node_that_is_gone(tmp_path):
    """Both hosts' names stand for a loopback address, as Debian has it: the ranks find each other
    all the same."""
    shared = tmp_path / "shared"
    shared.mkdir()
    job, begun, log = shared / "job.py", shared / "begun", tmp_path / "log"
    shutil.copy(Path(__file__).with_name("lost_node_job.py"), job)
    with TwoNodes(tmp_path, shared, cluster_environment()) as cluster:
        head, other = cluster.nodes
        address = f"--address=http://{head.address}:{DASHBOARD}"
        command = [str(BIN / "ray"), "job", "submit", address, "--", sys.executable, str(job), str(begun)]
        with log.open("wb") as output:
            submitted = subprocess.Popen(
                head.from_outside(command), env=cluster.environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            end = time.monotonic() + BEGIN_SECONDS
            while not begun.exists():
                assert submitted.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(0.2)
            other.take_away()
            code = submitted.wait(END_SECONDS)
        finally:
            submitted.kill()
    text = log.read_text()
    assert code == 1, text[-4000:]
    named = rf"lost: {re.escape(other.name)} \({re.escape(other.address)}\): " if cluster.isolated else "lost: "
    assert re.search(named, text), text[-4000:]
    if cluster.isolated:
        assert f"ranks on ['{head.address}', '{other.address}']" in text
