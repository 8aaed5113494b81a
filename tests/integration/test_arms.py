"""Three steps of main_ppo with RLOO in the arm whose actor and rollout are verl's and vLLM's own,
with the noise.

Steps 2 and 3 sample under noise (three stages), so what the engine puts on its norms shows in the
difference between sampling and training probabilities, which without it is rounding."""

import json

import pytest
from safetensors.torch import load_file

from tests.integration.tiny_job import Job, make_inputs

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=["bf16"])
def run(request, tmp_path_factory, bf16_checkpoint):
    """Returns the arm, its metrics by step, its log and its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = [o for o in make_inputs(folder, bf16_checkpoint) if not o.startswith("+qerl=")]
    overrides += [f"+qerl={request.param}", "qerl.aqn.num_stages=3", "trainer.total_training_steps=3"]
    overrides += [
        "algorithm.adv_estimator=rloo",
        "trainer.save_freq=3",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
    ]
    job = Job(folder / "run", overrides).start()
    try:
        assert job.wait(800) == 0, job.tail()
    finally:
        job.end()
    return request.param, job.metrics(), job.log.read_text(errors="replace"), folder / "checkpoints" / "global_step_3"


def test_trains_under_the_noise_schedule(run):
    _, metrics, _, _ = run
    assert [metrics[step]["qerl/aqn_sigma"] for step in (1, 2, 3)] == pytest.approx([0, 0.05, 0.005])
    assert all(metrics[step]["actor/grad_norm"] > 0 for step in (1, 2, 3))


def test_the_noise_acts_on_the_sampling_policy_alone(run):
    """The base is one in actor and rollout: bfloat16's rounding is all that parts them in the step
    without noise."""
    _, metrics, _, _ = run
    difference = {step: metrics[step]["training/rollout_probs_diff_mean"] for step in (1, 2)}
    assert difference[1] < 2e-3 and difference[2] > 2 * difference[1]


def test_no_layer_is_packed_and_the_checkpoint_is_the_arms(run):
    arm, _, log, checkpoint = run
    assert "NVFP4 linear" not in log
    assert json.loads((checkpoint / "qerl_checkpoint.json").read_text())["policy"]["qerl.arm"] == arm
    adapter = load_file(checkpoint / "actor" / "lora_adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2 and any(t.abs().sum() > 0 for n, t in adapter.items() if "lora_B" in n)
