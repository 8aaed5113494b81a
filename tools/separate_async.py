"""Runs main_ppo with ``separate_async`` on the tiny model and looks into the engines while it
trains. By hand, not in CI.

    python -m tools.separate_async [--out FOLDER] [--hybrid]

Four steps of two updates each, validated and saved; then the same command once more from the
checkpoint of step 2. ``--hybrid``: with a second replica on the actor's slot, verl's default.
Checked at every step: the rollout has the adapter that the actor saved (digests), its norms are the
clean ones plus the noise of the step bit for bit, and clean in a validation; the metrics tell the
noise that stale samples were drawn under. On two cores about five minutes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from qerl_verl.aqn.noise import draw_noise
from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.config.settings import AQNSettings
from tests.helpers.tiny_model import make_model
from tests.integration.tiny_job import Job, make_inputs

STEPS, UPDATES, SEED = 4, 2, 42
SCHEDULE = AQNSchedule(AQNSettings(sigma_start=0.05, sigma_end=0.005, num_stages=STEPS), STEPS)
OVERRIDES = [
    "trainer.v1.trainer_mode=separate_async",
    f"trainer.v1.separate_async.parameter_sync_step={UPDATES}",
    "trainer.v1.separate_async.num_warmup_batches=2",
    # slow enough for samples that a sync interrupts
    "data.max_response_length=32",
    "actor_rollout_ref.rollout.max_model_len=96",
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "trainer.v1.sampler.custom_sampler.path=pkg://tools.spy",
    "trainer.v1.sampler.custom_sampler.name=SpyReplayBuffer",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    f"qerl.aqn.num_stages={STEPS}",
    f"trainer.total_training_steps={STEPS}",
    "trainer.val_before_train=True",
    "trainer.test_freq=2",
    "trainer.save_freq=1",
]


def run(folder: Path, inputs: list[str], hybrid: bool) -> dict[int, dict]:
    """Starts the job once in ``folder``, where its checkpoints and the spy's files are. Returns the
    metrics by step."""
    os.environ["QERL_TEST_SPY"] = str(folder)
    overrides = [f"trainer.default_local_dir={folder / 'checkpoints'}", f"actor_rollout_ref.hybrid_engine={hybrid}"]
    job = Job(folder, [*inputs, *OVERRIDES, *overrides]).start()
    code = job.wait(600)
    if left := job.end():
        print("long after the driver there were still:", [title.split()[0] for title in left])
    assert code == 0, f"exit code {code}\n{job.tail()}"
    return job.metrics()


def check_engines(folder: Path, clean: dict[str, torch.Tensor], hybrid: bool, steps: range) -> list[str]:
    """Asserts what the spy saw; a line for each look."""
    lines = []
    standalone = int(hybrid)  # its replica's number
    for partition in ("train", "val"):
        for step in steps:
            replicas = [standalone, 0] if partition == "val" and hybrid else [standalone]
            for replica in replicas:
                file = folder / f"{partition}-{step}-{replica}.json"
                if partition == "val" and not file.exists():
                    continue
                found = json.loads(file.read_text())
                sigma = SCHEDULE.sigma(step) if partition == "train" else 0.0
                for name, live in found["norms"].items():
                    expected = clean[f"{name}.weight"].float()
                    if sigma:
                        expected = expected + draw_noise(SEED, step, name, expected.numel(), sigma)
                    assert torch.equal(torch.tensor(live), expected), (file, name)
                version = step - (partition == "train")
                assert version == 0 or found["adapter"] == found["checkpoint"], file
                lines.append(
                    f"{partition:5} step {step}, replica {replica}: sigma {sigma:.4g} on {len(found['norms'])} norms, adapter "
                    f"{found['adapter'][:12]}, the actor's of step {version} {(found['checkpoint'] or '-' * 12)[:12]}"
                )
    return lines


def check_metrics(metrics: dict[int, dict], steps: range) -> list[str]:
    """Asserts the noise and the staleness of each step; a line for each."""
    lines = []
    for step in steps:
        m = metrics[step]
        assert m["qerl/aqn_sigma"] == SCHEDULE.sigma(step) and m["actor/grad_norm"] > 0
        stalest = int(m["training/off_policy/trajectory_staleness_worst/max"])
        freshest = int(m["training/off_policy/trajectory_staleness/min"])
        under = [SCHEDULE.sigma(step - stale) for stale in range(freshest, stalest + 1)]
        of_samples = [m[f"qerl/aqn_sigma_of_samples/{what}"] for what in ("min", "max")]
        assert set(of_samples) <= set(under), (step, of_samples, under)
        assert of_samples[0] <= min(under[0], under[-1]) and max(under[0], under[-1]) <= of_samples[1]
        lines.append(
            f"step {step}: sigma {m['qerl/aqn_sigma']:.4g}, of its samples {of_samples[0]:.4g} to {of_samples[1]:.4g}, staleness "
            f"{freshest} to {stalest}, policies a sample up to {m['training/off_policy/trajectory_spans/max']}, sync "
            f"{m['timing_s/update_weights']:.2f} s, step {m['timing_s/step']:.2f} s"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--hybrid", action="store_true")
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="separate_async_"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    model = make_model(out / "model")
    clean = {n: t for n, t in load_file(model / "model.safetensors").items() if "layernorm" in n}
    inputs = make_inputs(out, model)

    metrics = run(out / "first", inputs, arguments.hybrid)
    lines = check_engines(out / "first", clean, arguments.hybrid, range(1, STEPS + 1))
    lines += check_metrics(metrics, range(1, STEPS + 1))
    print("\n".join(lines), flush=True)

    again = out / "again"
    for step in (1, 2):
        name = Path("checkpoints", f"global_step_{step}")
        shutil.copytree(out / "first" / name, again / name, dirs_exist_ok=True)
    (again / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run(again, inputs, arguments.hybrid)
    assert sorted(s for s in resumed if "actor/lr" in resumed[s]) == [3, 4]
    lines = check_engines(again, clean, arguments.hybrid, range(3, STEPS + 1)) + check_metrics(
        resumed, range(3, STEPS + 1)
    )
    (key,) = (k for k in metrics[2] if k.startswith("val-core/") and "/mean" in k)
    assert resumed[2][key] == metrics[2][key], "the resumed run validates another policy"
    actor = again / "checkpoints" / f"global_step_{STEPS}" / "actor"
    optimizer = torch.load(actor / "optim_world_size_1_rank_0.pt", weights_only=False)
    assert {int(s["step"]) for s in optimizer["state"].values()} == {STEPS * UPDATES}
    print("resumed from step 2, validation", resumed[2][key], "as before")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
