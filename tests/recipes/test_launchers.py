"""Tests the launchers in recipes/ with recording stand-ins for srun, scontrol, ray and kubectl."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qerl_verl.cli.main import main

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(p.name for p in RECIPES.glob("*.sh"))

# Each call becomes a line of JSON in $CALLS. srun plays the cluster: `ray start` stays until it is
# told to stop, `qerl cluster` succeeds, and training does what $TRAIN says.
STAND_IN = f"""#!{sys.executable}
import json, os, sys, time
AUTH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
stdin = sys.stdin.read() if name == "kubectl" else ""
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, arguments, stdin, os.environ.get("RAY_ADDRESS"), *(os.environ.get(v) for v in AUTH)]) + "\\n")
if name == "scontrol":
    print("\\n".join(os.environ.get("NODES", "n1 n2 n3").split()))
elif name == "srun" and "-c" in arguments:
    print("a banner\\n10.0.0.1")
elif name == "srun" and "start" in arguments:
    if "--head" not in arguments and os.environ.get("WORKERS_DIE"):
        sys.exit(5)
    time.sleep(60)
elif name == "srun" and "cluster" in arguments:
    time.sleep(float(os.environ.get("JOIN_SECONDS", 0)))
    sys.exit(int(os.environ.get("CLUSTER", 0)))
elif name == "srun" and "verl.trainer.main_ppo" in arguments:
    seconds, code = os.environ.get("TRAIN", "0 0").split()
    time.sleep(float(seconds))
    sys.exit(int(code))
elif name == "ray":
    sys.exit(int(os.environ.get("JOB", 0)))
"""

NEEDED = {
    "run.sh": {},
    "slurm.sh": {"SHARED": "/shared", "MODEL": "/shared/model"},
    "ray_job.sh": {"RAY_ADDRESS": "http://head:8265", "NNODES": "2", "SHARED": "/shared", "MODEL": "/shared/model"},
    "kuberay.sh": {"IMAGE": "registry.example/qerl:1", "CLAIM": "claim", "MODEL": "/shared/model"},
}
IN_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture
def launch(tmp_path):
    """Starts a script in a clean environment, with the stand-ins first on PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol", "ray", "kubectl"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    ours = {"SHARED", "MODEL", "RECIPE", "PYTHON", "NNODES", "IMAGE", "CLAIM", "DRY_RUN", "PLATFORM", "REQUEUE"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY_")) and k not in ours}

    def start(script, *arguments, **environment):
        environment = {"PATH": f"{tools}:{clean['PATH']}", "CALLS": str(tmp_path / "calls"), **environment}
        # a copy elsewhere, as sbatch makes one
        path = shutil.copy(RECIPES / script, tmp_path / script) if script == "slurm.sh" else RECIPES / script
        return subprocess.Popen(
            ["bash", str(path), *arguments],
            env={**clean, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(script, *arguments, **environment):
        process = start(script, *arguments, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def calls():
        path = tmp_path / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    run.start, run.calls = start, calls
    return run


def trained_with(arguments):
    """Returns the recipe and overrides of a recorded call that ends in
    `-m verl.trainer.main_ppo ...`.
    """
    rest = arguments[arguments.index("verl.trainer.main_ppo") + 1 :]
    assert rest[:3] == ["--config-path", "pkg://qerl_verl.recipes", "--config-name"]
    return rest[3], rest[4:]


def test_scripts():
    assert set(SCRIPTS) == set(NEEDED)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(RECIPES / script)], check=True)
    assert os.access(RECIPES / script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    result = subprocess.run(["shellcheck", *(str(RECIPES / s) for s in SCRIPTS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def dry_run(launch, tmp_path, monkeypatch, capsys):
    """Returns ``dry_run(script, *arguments, **environment)``, which returns exit code and output.

    The `qerl explain` of ``run.sh`` is a process of its own. The others' runs in this process,
    because it takes seven seconds to start.
    """
    python = tmp_path / "bin" / "python-stand-in"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(script, *arguments, **environment):
        real = script == "run.sh"
        result = launch(script, *arguments, PYTHON=sys.executable if real else str(python), **environment)
        if real or result.returncode:
            assert launch.calls() == []
            return result.returncode, result.stdout + result.stderr
        ((name, words, _, address, *_),) = launch.calls()  # nothing else was started
        assert name == python.name and words[:3] == ["-m", "qerl_verl.cli.main", "explain"]
        monkeypatch.setenv("RAY_ADDRESS", address) if address else monkeypatch.delenv("RAY_ADDRESS", raising=False)
        capsys.readouterr()
        code = main(words[2:])
        return code, result.stdout + capsys.readouterr().out

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(dry_run, gsm8k_files, script):
    arguments = ["gsm8k_grpo"] if script == "run.sh" else []
    code, out = dry_run(script, "--dry-run", *arguments, "trainer.logger=[console]", **NEEDED[script])
    assert code == 0, out
    assert "-m verl.trainer.main_ppo --config-path pkg://qerl_verl.recipes --config-name gsm8k_grpo" in out
    assert "trainer.logger: ['console', 'wandb'] -> ['console']" in out
    assert "trainer.v1.trainer_mode: sync -> qerl_sync (verl's trainer with the noise schedule)" in out
    assert "problems: none" in out
    if script != "run.sh":
        assert "actor_rollout_ref.model.path: ~/models/deepseek-llm-7b-chat -> /shared/model" in out
        assert "qerl.cache_dir: ${shared}/cache" in out and "shared: /shared" in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_finds_problems(dry_run, script):
    arguments = ["gsm8k_grpo"] if script == "run.sh" else []
    code, out = dry_run(script, *arguments, "trainer.use_v1=False", **NEEDED[script], DRY_RUN="1")
    assert code == 2
    assert "- trainer.use_v1=False: QeRL runs on verl's V1 trainer" in out


@pytest.mark.parametrize("script, missing", [(s, m) for s in SCRIPTS for m in NEEDED[s]])
def test_a_missing_variable_is_named(launch, script, missing):
    environment = {k: v for k, v in NEEDED[script].items() if k != missing}
    result = launch(script, **environment, **IN_JOB)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}: {missing} is not set: ") and result.stderr.count("\n") == 1
    assert launch.calls() == []


def test_run_needs_a_recipe(launch):
    for arguments in ([], ["trainer.nnodes=1"], ["--dry-run"]):
        result = launch("run.sh", *arguments)
        assert result.returncode == 2 and "no recipe given" in result.stderr


def test_run_starts_verl(launch, tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    assert launch("run.sh", "gsm8k_grpo", "a=b c", "+d=[1]", PYTHON=str(python)).returncode == 0
    ((_, arguments, *_),) = launch.calls()
    assert trained_with(arguments) == ("gsm8k_grpo", ["a=b c", "+d=[1]"])


# --- Slurm ---


def test_slurm_starts_head_workers_and_training(launch):
    result = launch(
        "slurm.sh", "data.seed=3", **NEEDED["slurm.sh"], **IN_JOB, SLURM_CPUS_ON_NODE="96", PYTHON="/env/python"
    )
    assert result.returncode == 0, result.stderr
    assert launch.calls()[0][:2] == ["scontrol", ["show", "hostnames", "n[1-3]"]]
    steps = [(arguments, address) for name, arguments, _, address, *_ in launch.calls() if name == "srun"][1:]
    assert all("--overlap" in arguments and address == "10.0.0.1:6379" for arguments, address in steps)
    (token,) = {tuple(auth) for name, _, _, _, *auth in launch.calls()[2:] if name == "srun"}
    assert token[0] == "token" and len(token[1]) == 64

    def one(*words):  # steps that run side by side are recorded in either order
        ((arguments, place),) = [(a, i) for i, (a, _) in enumerate(steps) if set(words) <= set(a)]
        on.append(next(a for a in arguments if a.startswith("--nodelist")))
        return " ".join(arguments), place

    on = []
    (head, at_0), (head_up, at_1) = one("start", "--head"), one("cluster", "8")
    (workers, at_2), (up, at_3), (train, at_4) = (
        one("start", "--ntasks=2"),
        one("cluster", "24"),
        one("verl.trainer.main_ppo"),
    )
    assert len(steps) == 5 and max(at_0, at_1) < min(at_2, at_3) and at_4 == 4
    assert on == ["--nodelist=n1", "--nodelist=n1", "--nodelist=n2,n3", "--nodelist=n1", "--nodelist=n1"]
    resources = "--num-gpus=8 --num-cpus=96 --block"
    assert head.endswith(f"env -u RAY_ADDRESS /env/ray start --head --node-ip-address=10.0.0.1 --port=6379 {resources}")
    assert "cluster --nodes 1 --gpus 8 --timeout 600" in head_up
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in workers
    assert workers.endswith(f"/env/ray start --address=10.0.0.1:6379 {resources}")
    assert "cluster --nodes 3 --gpus 24 --timeout 600" in up
    assert "/env/python -u -m verl.trainer.main_ppo" in train
    recipe, settings = trained_with(steps[-1][0])
    assert recipe == "gsm8k_grpo_nodes"
    assert settings == [
        "++shared=/shared",
        "actor_rollout_ref.model.path=/shared/model",
        "trainer.nnodes=3",
        "trainer.n_gpus_per_node=8",
        "data.seed=3",
    ]


def test_slurm_on_one_node_with_a_containers_options(launch):
    environment = {
        "NODES": "n1",
        "HEAD_IP": "10.0.0.9",
        "SRUN_ARGS": "--container-image=/i.sqsh --no-container-mount-home",
    }
    assert launch("slurm.sh", **NEEDED["slurm.sh"], **IN_JOB, **environment).returncode == 0
    steps = [arguments for name, arguments, *_ in launch.calls() if name == "srun"]
    assert len(steps) == 3 and all("--container-image=/i.sqsh" in arguments for arguments in steps)
    assert not any("--address=10.0.0.9:6379" in arguments for arguments in steps)


def test_slurm_without_an_allocation_or_gpus(launch):
    needed = NEEDED["slurm.sh"]
    result = launch("slurm.sh", **needed)
    assert result.returncode == 2 and "no nodes: SLURM_JOB_NODELIST is not set" in result.stderr
    result = launch("slurm.sh", **needed, **{**IN_JOB, "SLURM_GPUS_ON_NODE": ""})
    assert result.returncode == 2 and "no GPUs: neither GPUS_PER_NODE nor SLURM_GPUS_ON_NODE" in result.stderr
    result = launch("slurm.sh", **needed, **IN_JOB, NODES="")
    assert result.returncode == 2 and "scontrol names no node for SLURM_JOB_NODELIST=n[1-3]" in result.stderr


def test_slurm_hands_on_the_exit_code_and_ends_ray(launch):
    started = time.monotonic()
    result = launch("slurm.sh", **NEEDED["slurm.sh"], **IN_JOB, TRAIN="1 37")
    assert result.returncode == 37 and "training ended with exit code 37" in result.stdout
    assert time.monotonic() - started < 30  # `ray start` would have stayed for 60


def test_slurm_gives_up_when_the_cluster_is_not_complete(launch):
    result = launch("slurm.sh", **NEEDED["slurm.sh"], **IN_JOB, CLUSTER="2")
    assert result.returncode == 2
    assert not any("verl.trainer.main_ppo" in arguments for _, arguments, *_ in launch.calls())


@pytest.mark.slow
def test_slurm_notices_a_ray_node_that_ends(launch):
    result = launch("slurm.sh", **NEEDED["slurm.sh"], **IN_JOB, WORKERS_DIE="1", JOIN_SECONDS="5")
    assert result.returncode == 1
    assert "a Ray node ended (exit code 5) before the cluster was up" in result.stderr
    result = launch("slurm.sh", **NEEDED["slurm.sh"], **IN_JOB, WORKERS_DIE="1", TRAIN="50 0")
    assert result.returncode == 1 and "a Ray node ended (exit code 5)" in result.stderr


@pytest.mark.parametrize(
    "number, requeue, code",
    [
        pytest.param(signal.SIGTERM, "1", 143, marks=pytest.mark.slow),
        (signal.SIGUSR1, "1", 124),
        pytest.param(signal.SIGUSR1, "0", 124, marks=pytest.mark.slow),
    ],
)
def test_slurm_cleans_up_when_told_to_stop(launch, number, requeue, code):
    process = launch.start("slurm.sh", **NEEDED["slurm.sh"], **IN_JOB, TRAIN="50 0", REQUEUE=requeue)
    for _ in range(300):
        if any("verl.trainer.main_ppo" in arguments for _, arguments, *_ in launch.calls()):
            break
        time.sleep(0.1)
    process.send_signal(number)
    # the pipes close only when every step has ended too
    process.communicate(timeout=30)
    assert process.returncode == code
    requeued = ["scontrol", ["requeue", "7"]] in [call[:2] for call in launch.calls()]
    assert requeued == (number == signal.SIGUSR1 and requeue == "1")


def test_slurm_options_are_in_the_scripts_head():
    """sbatch reads #SBATCH lines up to the first command only."""
    lines = (RECIPES / "slurm.sh").read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert options and max(options) < min(commands)
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@180"} <= set(lines)


# --- Ray job ---


def test_ray_job(launch):
    environment = {"GPUS_PER_NODE": "4", "RECIPE": "mine", "RAY_JOB_ARGS": "--no-wait --submission-id=x", "JOB": "3"}
    result = launch("ray_job.sh", "data.seed=3", "trainer.logger=[console]", **NEEDED["ray_job.sh"], **environment)
    assert result.returncode == 3
    ((name, arguments, *_),) = launch.calls()
    assert [name, *arguments[:7]] == [
        "ray", "job", "submit", "--address=http://head:8265", "--no-wait", "--submission-id=x", "--", "python3",
    ]  # fmt: skip
    recipe, settings = trained_with(arguments)
    assert recipe == "mine"
    assert settings[2:] == ["trainer.nnodes=2", "trainer.n_gpus_per_node=4", "data.seed=3", "trainer.logger=[console]"]


# --- KubeRay ---


def test_kuberay(launch):
    environment = {"NNODES": "3", "GPUS_PER_NODE": "4", "KUBECTL_ARGS": "--namespace=rl"}
    result = launch(
        "kuberay.sh", "trainer.logger=[console]", "+note=it's & more", **NEEDED["kuberay.sh"], **environment
    )
    assert result.returncode == 0, result.stderr
    ((name, arguments, manifest, *_),) = launch.calls()
    assert [name, *arguments] == ["kubectl", "create", "--namespace=rl", "-f", "-"]
    job = yaml.safe_load(manifest)
    recipe, settings = trained_with(shlex.split(job["spec"]["entrypoint"]))
    assert recipe == "gsm8k_grpo_nodes"
    assert settings == [
        "++shared=/shared",
        "actor_rollout_ref.model.path=/shared/model",
        "trainer.nnodes=3",
        "trainer.n_gpus_per_node=4",
        "trainer.logger=[console]",
        "+note=it's & more",
    ]
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 3
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert workers["rayStartParams"]["num-gpus"] == "4"
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/qerl:1"
        assert {m["mountPath"] for m in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == "claim"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    limits = workers["template"]["spec"]["containers"][0]["resources"]
    assert limits["limits"]["nvidia.com/gpu"] == limits["requests"]["nvidia.com/gpu"] == 4


def test_the_kuberay_manifest_as_it_stands():
    """The manifest is valid before it is filled in, and its entrypoint composes."""
    from qerl_verl.cli.explain import compose

    text = (RECIPES / "kuberay.yaml").read_text()
    assert yaml.safe_load(text)["kind"] == "RayJob"
    for name, value in {
        "RECIPE": "gsm8k_grpo_nodes",
        "MODEL": "m",
        "NNODES": "2",
        "GPUS_PER_NODE": "8",
        "OVERRIDES": "",
    }.items():
        text = text.replace(f"${{{name}}}", value)
    job = yaml.safe_load(text)
    recipe, settings = trained_with(shlex.split(job["spec"]["entrypoint"]))
    config = compose(recipe, settings)
    assert (config.shared, config.trainer.nnodes, config.trainer.n_gpus_per_node) == ("/shared", 2, 8)
    assert "aqn" in config.qerl
