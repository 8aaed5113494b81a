"""What the switch sets, what it leaves alone and what it refuses, on verl's real configuration."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.trainer.ppo.utils import need_critic

from qerl_verl.config import rules
from qerl_verl.config.publish import published
from qerl_verl.config.settings import QeRLSettings
from qerl_verl.job import RolloutLayers
from qerl_verl.platform import compilers

VERL_CONFIG = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")


def test_a_stock_grpo_run_gets_what_qerl_needs_and_has_no_problem(switched):
    config, lines, problems = switched()
    assert problems == []
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    assert (model.lora_rank, model.lora_alpha, model.target_modules) == (32, 32, "all-linear")
    assert rollout.name == "vllm" and rollout.load_format == "safetensors"
    assert rollout.engine_kwargs.vllm.worker_extension_cls == rules.WORKER_EXTENSION
    assert config.actor_rollout_ref.actor.strategy == config.actor_rollout_ref.actor.fsdp_config.strategy == "fsdp2"
    assert config.actor_rollout_ref.actor.checkpoint.save_lora_only is True
    assert config.algorithm.rollout_correction.rollout_is == "token"
    assert config.trainer.v1.trainer_mode == "qerl_sync"
    assert dict(config.ray_kwargs.ray_init.runtime_env.env_vars) == {
        **published(config).environment(),
        "VERL_ENGINE_VENDOR": "qerl",
    }
    assert any(line.startswith("actor_rollout_ref.model.lora_rank: 0 -> 32") for line in lines)
    assert rollout.engine_kwargs.vllm.compilation_config == rules.COMPILATION


AGENTS = "actor_rollout_ref.rollout.agent.num_workers"
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"


@pytest.mark.parametrize(
    ("overrides", "agents", "rewards", "units"),
    [
        ((), 8, 8, 8),  # verl's batch of 1024 prompts
        (("data.train_batch_size=4", "actor_rollout_ref.rollout.n=4"), 1, 1, 1),
        (("data.train_batch_size=16", "actor_rollout_ref.rollout.n=8"), 2, 8, 2),
        (("data.train_batch_size=5", "actor_rollout_ref.rollout.n=13"), 2, 5, 2),
        (("data.train_batch_size=64", "actor_rollout_ref.rollout.n=8"), 8, 8, 8),
        # the user's stay
        (("data.train_batch_size=4", "reward.num_workers=8", f"{UNITS}=3"), 1, 8, 3),
        (("data.train_batch_size=4", "actor_rollout_ref.rollout.multi_turn.enable=True"), 8, 8, 8),
    ],
)
def test_a_small_step_has_few_helper_processes(switched, overrides, agents, rewards, units):
    config, lines, problems = switched(*overrides)
    assert problems == []
    counts = [OmegaConf.select(config, key) for key in (AGENTS, "reward.num_workers", UNITS)]
    assert counts == [agents, rewards, units]
    said = [any(line.startswith(key) for line in lines) for key in rules.HELPERS]
    assert said == [agents < 8, units < 8 and units != 3, rewards < 8]


def test_verl_starts_as_many_helpers_as_the_rules_take_for_its_own(composed):
    """Without that the rules would find another number, take it for the user's and do nothing."""
    config = composed()
    assert {OmegaConf.select(config, key) for key in rules.HELPERS} == {rules.VERLS_HELPERS}


def test_torch_has_the_option_that_the_rollout_is_compiled_with():
    import torch._inductor.config as inductor

    for name in json.loads(rules.COMPILATION)["inductor_compile_config"]:
        assert name in inductor.get_config_copy()


def test_the_users_compilation_config_stays(switched):
    own = "actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config"
    config, _, problems = switched(f"+{own}.mode=0")
    assert problems == [] and OmegaConf.select(config, own) == {"mode": 0}


def in_engine(config):
    """Returns what the rollout engine learns."""
    return OmegaConf.to_container(config.actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"kernel": "auto", "lora": {"rank": 32, "alpha": 32, "experts": False}, "sleep_level": 1, "noise": True}),
        (
            ["actor_rollout_ref.model.lora_rank=8"],
            {"kernel": "auto", "lora": {"rank": 8, "alpha": 16, "experts": False}, "sleep_level": 1, "noise": True},
        ),
        (["qerl.rollout.lora=punica"], {"kernel": "auto", "lora": None, "sleep_level": 1, "noise": True}),
        (
            ["actor_rollout_ref.model.target_modules=[q_proj,gate_proj,up_proj,down_proj]"],
            {
                "kernel": "auto",
                "lora": {"rank": 32, "alpha": 32, "experts": True},
                "sleep_level": 1,
                "noise": True,
            },
        ),
        (
            ["qerl.rollout.kernel=marlin", "qerl.rollout.sleep_level=2"],
            {"kernel": "marlin", "lora": {"rank": 32, "alpha": 32, "experts": False}, "sleep_level": 2, "noise": True},
        ),
        (
            ["qerl.aqn.enable=False"],
            {"kernel": "auto", "lora": {"rank": 32, "alpha": 32, "experts": False}, "sleep_level": 1, "noise": False},
        ),
    ],
)
def test_the_rollout_learns_kernel_adapter_and_sleep_level(switched, overrides, expected):
    config, lines, problems = switched(*overrides)
    assert problems == [] and in_engine(config) == {"qerl": expected}
    layers = RolloutLayers.of_engine(in_engine(config))
    assert layers == published(config).layers and layers.additional_config() == {"qerl": expected}
    assert any("additional_config.qerl" in line and "the NVFP4 layers" in line for line in lines)


def test_an_additional_config_of_the_user_stays(switched):
    theirs = "+actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config={theirs: {a: 1}}"
    config, _, problems = switched(theirs)
    assert problems == [] and in_engine(config) == {"theirs": {"a": 1}, **published(config).layers.additional_config()}


def test_the_processes_of_a_run_learn_every_setting(switched):
    config, _, problems = switched("qerl.kernel=pytorch", "qerl.recompute=full", "qerl.aqn.seed=7")
    assert problems == []
    settings = published(config).settings
    assert (settings.kernel, settings.recompute, settings.aqn.seed) == ("pytorch", "full", 7)
    assert settings == QeRLSettings.of(config)
    assert in_engine(config)["qerl"]["kernel"] == "auto"  # that is qerl.rollout.kernel


def test_the_users_values_win(switched):
    config, lines, problems = switched(
        "actor_rollout_ref.model.lora_rank=64",
        "algorithm.rollout_correction.rollout_is=sequence",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.rollout.enforce_eager=False",
        "actor_rollout_ref.rollout.agent.num_workers=8",
        on_cpu=True,
    )
    assert problems == []
    assert config.actor_rollout_ref.model.lora_rank == 64
    # verl's own, since the rank is the user's
    assert config.actor_rollout_ref.model.lora_alpha == 16
    assert config.algorithm.rollout_correction.rollout_is == "sequence"
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "eager"
    # said on the command line, though verl's default
    assert config.actor_rollout_ref.rollout.enforce_eager is False
    assert config.actor_rollout_ref.rollout.agent.num_workers == 8
    assert not any("agent.num_workers" in line or "enforce_eager" in line for line in lines)


def test_a_whole_group_that_the_user_gave_is_left_alone(switched):
    config, _, _ = switched("actor_rollout_ref.rollout.agent={num_workers: 8}", on_cpu=True)
    assert config.actor_rollout_ref.rollout.agent.num_workers == 8


def test_environment_variables_of_the_shell_reach_the_workers(switched, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    config, _, _ = switched(on_cpu=True)
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VLLM_CPU_KVCACHE_SPACE == "7"


def test_a_value_of_a_recipe_wins_too(switched):
    config, _, _ = switched("actor_rollout_ref.rollout.load_format=auto", "actor_rollout_ref.model.lora_alpha=128")
    assert config.actor_rollout_ref.rollout.load_format == "auto"
    assert config.actor_rollout_ref.model.lora_alpha == 128


def test_bypass_mode_is_left_alone(switched):
    config, _, problems = switched("algorithm.rollout_correction.bypass_mode=True")
    assert problems == [] and config.algorithm.rollout_correction.rollout_is is None


def test_the_cpu_gets_its_platform_and_sizes(switched):
    config, _, problems = switched(on_cpu=True)
    assert problems == []
    assert config.trainer.device == "cpu" and config.trainer.n_gpus_per_node == 1
    assert config.actor_rollout_ref.rollout.tensor_model_parallel_size == 1
    assert config.ray_kwargs.ray_init.num_gpus == 1
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM == "cpu"


def test_environment_variables_of_the_user_stay(switched):
    config, _, _ = switched("+ray_kwargs.ray_init.runtime_env.env_vars={NCCL_DEBUG: INFO}")
    environment = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert environment.NCCL_DEBUG == "INFO" and published(config).settings.arm == "nvfp4"


SEPARATE = (
    "trainer.v1.trainer_mode=separate_async",
    "actor_rollout_ref.rollout.nnodes=1",
    "data.train_batch_size=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
)


def test_engines_of_their_own_get_a_transport_for_adapters(switched):
    config, lines, problems = switched(*SEPARATE)
    assert problems == [] and config.trainer.v1.trainer_mode == "qerl_separate_async"
    sync = config.actor_rollout_ref.rollout.checkpoint_engine
    assert (sync.backend, sync.update_weights_bucket_megabytes) == (rules.TRANSPORT, 256)
    assert any("backend: naive -> qerl" in line for line in lines)
    assert switched()[0].actor_rollout_ref.rollout.checkpoint_engine.backend == "naive"


@pytest.mark.parametrize("backend", ["nccl", "nixl", "mooncake", rules.TRANSPORT])
def test_the_users_transport_stays(switched, backend):
    setting = f"actor_rollout_ref.rollout.checkpoint_engine.backend={backend}"
    config, _, problems = switched(*SEPARATE, setting)
    assert problems == [] and config.actor_rollout_ref.rollout.checkpoint_engine.backend == backend


def test_the_cpu_declares_slots_for_engines_of_their_own(switched):
    config, _, problems = switched(SEPARATE[0], *SEPARATE[2:], on_cpu=True)
    assert problems == [] and config.actor_rollout_ref.rollout.nnodes == 1
    assert config.ray_kwargs.ray_init.num_gpus == 2
    assert config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes == 64
    config, _, _ = switched(
        *SEPARATE, "trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.n_gpus_per_node=3", on_cpu=True
    )
    assert config.ray_kwargs.ray_init.num_gpus == 5


def test_a_critic_gets_what_the_actor_gets(switched):
    config, lines, problems = switched("algorithm.adv_estimator=gae", on_cpu=True)
    assert problems == []
    critic = config.critic
    assert (critic.model.lora_rank, critic.model.lora_alpha, critic.model.target_modules) == (32, 32, "all-linear")
    assert critic.strategy == critic.fsdp.strategy == "fsdp2" and critic.checkpoint.save_lora_only is True
    assert critic.model.override_config == config.actor_rollout_ref.model.override_config
    assert critic.fsdp.use_torch_compile is False
    assert any(line.startswith("critic.model.lora_rank: 0 -> 32") for line in lines)


@pytest.mark.parametrize("checkpoint", ["actor_rollout_ref.actor.checkpoint", "critic.checkpoint"])
def test_a_merged_model_is_left_out_of_checkpoints_with_a_line(switched, checkpoint):
    """verl would write packed bytes as float32 under PEFT's names."""
    contents = f"{checkpoint}.save_contents=[model,optimizer,extra,hf_model]"
    config, lines, problems = switched("algorithm.adv_estimator=gae", contents, on_cpu=True)
    assert problems == [] and OmegaConf.select(config, checkpoint).save_contents == ["model", "optimizer", "extra"]
    before, after = "['model', 'optimizer', 'extra', 'hf_model']", "['model', 'optimizer', 'extra']"
    said = f"{checkpoint}.save_contents: {before} -> {after} (a checkpoint holds no base to write a model from; `qerl export`"
    assert any(line.startswith(said) for line in lines)


def test_the_users_values_of_the_critic_win(switched):
    config, lines, problems = switched("algorithm.adv_estimator=gae", "critic.model.lora_rank=8")
    assert problems == [] and (config.critic.model.lora_rank, config.critic.model.lora_alpha) == (8, 16)
    assert not any("critic.model.lora" in line for line in lines)


@pytest.mark.filterwarnings("ignore:Disabled critic")
@pytest.mark.parametrize(
    ("overrides", "critic"),
    [
        (["algorithm.adv_estimator=grpo"], False),
        (["algorithm.adv_estimator=gae"], True),
        (["algorithm.adv_estimator=grpo", "critic.enable=True"], True),
        (["algorithm.adv_estimator=gae", "critic.enable=False"], False),
    ],
)
def test_a_critic_is_there_when_verl_says_so(switched, overrides, critic):
    config, _, _ = switched(*overrides)
    assert (rules.CRITIC in rules.trained_models(config)) is critic is need_critic(config)
    assert config.critic.model.lora_rank == (32 if critic else 0)


@pytest.mark.parametrize("loss", sorted(POLICY_LOSS_REGISTRY))
def test_every_policy_loss_of_verls_passes(switched, loss):
    config, _, problems = switched(f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
    assert problems == [] and config.actor_rollout_ref.actor.policy_loss.loss_mode == loss


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor_rollout_ref.model.use_remove_padding=True"],
        ["actor_rollout_ref.actor.use_dynamic_bsz=True"],
        ["actor_rollout_ref.actor.fsdp_config.param_offload=True", "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True"],
        ["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.ref.fsdp_config.param_offload=True"],
        ["algorithm.use_kl_in_reward=True"],
        ["actor_rollout_ref.rollout.layered_summon=True", "actor_rollout_ref.rollout.load_format=safetensors"],
        ["actor_rollout_ref.actor.use_torch_compile=True"],
        ["actor_rollout_ref.actor.entropy_checkpointing=True"],
    ],
)  # fmt: skip
def test_settings_of_verls_example_scripts_stay_as_they_are(switched, overrides):
    config, _, problems = switched(*overrides, on_cpu=True)
    assert problems == []
    for key, _, value in (o.partition("=") for o in overrides):
        assert str(OmegaConf.select(config, key)) == value, key


@pytest.mark.parametrize(
    ("on_cpu", "compiler", "disabled"), [(True, None, True), (True, "g++", False), (False, None, False)]
)
def test_without_a_cpp_compiler_nothing_is_compiled_on_a_cpu(switched, monkeypatch, on_cpu, compiler, disabled):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilers.shutil, "which", lambda name: compiler and name == compiler)
    config, lines, problems = switched(on_cpu=on_cpu)
    assert problems == []
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.get("TORCH_COMPILE_DISABLE") == ("1" if disabled else None)
    assert any("install g++" in line for line in lines) is disabled


FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
ACTORS = "actor_rollout_ref.actor.fsdp_config.mixed_precision"


@pytest.mark.parametrize(
    ("overrides", "on_cpu", "reason", "rollout", "actor", "critic"),
    [
        ([], True, "no bfloat16", "float32", FLOAT32, None),
        (["algorithm.adv_estimator=gae"], True, "no bfloat16", "float32", FLOAT32, FLOAT32),
        ([], True, None, "bfloat16", None, None),
        ([], False, "no bfloat16", "bfloat16", None, None),
        (["actor_rollout_ref.rollout.dtype=bfloat16"], True, "no bfloat16", "bfloat16", None, None),
        (["actor_rollout_ref.rollout.dtype=float16"], True, "no bfloat16", "float16", None, None),
        ([f"+{ACTORS}.param_dtype=bf16"], True, "no bfloat16", "bfloat16", {"param_dtype": "bf16"}, None),
    ],
)
def test_without_bfloat16_arithmetic_actor_and_rollout_compute_in_float32(
    switched, monkeypatch, overrides, on_cpu, reason, rollout, actor, critic
):
    """A dtype of the user's for either of the two stays, and then the other one is left alone as
    well."""
    monkeypatch.setattr(rules, "missing_bfloat16", lambda environment: reason)
    config, lines, problems = switched(*overrides, on_cpu=on_cpu)
    assert problems == []
    assert config.actor_rollout_ref.rollout.dtype == rollout
    assert config.actor_rollout_ref.actor.fsdp_config.get("mixed_precision") == actor
    assert config.critic.fsdp.get("mixed_precision") == critic
    assert any("float32 (no bfloat16, float32 is faster)" in line for line in lines) is (rollout == "float32")


@pytest.mark.parametrize(
    ("on_cpu", "threads", "cores", "expected"),
    [
        (True, "1", 8, "2"),
        (True, None, 1, "2"),
        (True, None, 2, None),
        (True, "4", 1, None),
        (False, "1", 8, None),
    ],
)
def test_vllm_never_gets_one_thread_on_a_cpu(switched, monkeypatch, on_cpu, threads, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    config, lines, problems = switched(on_cpu=on_cpu)
    assert problems == []
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.get("OMP_NUM_THREADS") == expected
    assert any(line.startswith("OMP_NUM_THREADS=2") for line in lines) is (expected == "2")


def test_vllm_compiles_sampling_on_a_cpu_itself():
    """What makes a C++ compiler necessary; if vLLM stops doing so, TORCH_COMPILE_DISABLE need not
    be set."""
    source = find_spec("vllm").submodule_search_locations[0] + "/v1/sample/ops/topk_topp_sampler.py"
    assert "@torch.compile(dynamic=True)\ndef compiled_random_sample" in Path(source).read_text()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),
        (["actor_rollout_ref.actor.use_torch_compile=False"], False),
        (["actor_rollout_ref.actor.fsdp_config.use_torch_compile=False"], False),
        (["actor_rollout_ref.actor.use_torch_compile=False", "actor_rollout_ref.actor.fsdp_config.use_torch_compile=True"], True),
    ],
)  # fmt: skip
def test_either_of_verls_keys_turns_compiling_off(switched, overrides, expected):
    config, _, problems = switched(*overrides)
    assert problems == [] and config.actor_rollout_ref.actor.fsdp_config.use_torch_compile is expected


def test_a_recipe_with_liger_runs_without_it_and_says_so(switched):
    config, lines, problems = switched(
        "algorithm.adv_estimator=gae", "actor_rollout_ref.model.use_liger=True", "critic.model.use_liger=True"
    )
    assert problems == [] and not config.actor_rollout_ref.model.use_liger and not config.critic.model.use_liger
    said = [line for line in lines if "use_liger: True -> False" in line]
    assert len(said) == 2 and all("use_torch_compile" in line for line in said)


def test_fsdp1_becomes_fsdp2_and_the_user_reads_it(switched):
    config, lines, problems = switched("actor_rollout_ref.actor.strategy=fsdp", "critic.strategy=fsdp")
    assert problems == []
    roles = config.actor_rollout_ref
    assert roles.actor.strategy == roles.ref.strategy == roles.actor.fsdp_config.strategy == "fsdp2"
    assert any(line.startswith("actor_rollout_ref.actor.strategy: fsdp -> fsdp2") for line in lines)


def test_every_default_names_a_key_of_verls_configuration_with_its_stock_value():
    """Fails when verl renames a key or changes a default that a rule replaces."""
    with initialize_config_dir(VERL_CONFIG, version_base=None):
        config = compose("ppo_trainer")
    for rule in rules.DEFAULTS:
        if rule.stock is None and OmegaConf.select(config, rule.key) is None:
            continue  # mandatory or absent in verl's files, or null there
        assert OmegaConf.select(config, rule.key, throw_on_missing=True) == rule.stock, rule.key


@pytest.mark.parametrize(
    ("written", "overrides", "key", "value"),
    [
        ("algorithm.rollout_correction.rollout_is", [], "algorithm.rollout_correction.rollout_is", None),
        ("actor_rollout_ref.model.lora_alpha", [], "actor_rollout_ref.model.lora_alpha", 16),
        ("actor_rollout_ref.rollout.free_cache_engine", [], "actor_rollout_ref.rollout.free_cache_engine", True),
        ("critic.model.lora_alpha", ["algorithm.adv_estimator=gae"], "critic.model.lora_alpha", 16),
    ],
)
def test_a_default_of_verls_that_a_recipe_writes_stays(switched, written, overrides, key, value):
    config, lines, _ = switched(*overrides, on_cpu=True, written=(written,))
    assert OmegaConf.select(config, key) == value and not any(line.startswith(key) for line in lines)
    config, lines, _ = switched(*overrides, on_cpu=True)
    assert OmegaConf.select(config, key) != value and any(line.startswith(key) for line in lines)


@pytest.mark.parametrize(
    ("gpu", "transformers_says", "package", "expected"),
    [
        (True, True, "2.8.3", True),
        (True, False, "2.8.3", False),  # a folder flash_attn of another package
        (False, False, "2.8.3", True),  # no GPU on this machine: the package decides
        (False, False, "2.3.2", False),
        (False, False, None, False),  # flash-attn-4 alone, in the same folder
    ],
)
def test_transformers_decides_whether_flash_attn_is_there(
    monkeypatch, switched, gpu, transformers_says, package, expected
):
    def version(name):
        if package is None:
            raise rules.PackageNotFoundError(name)
        return package

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: transformers_says)
    monkeypatch.setattr(rules, "version", version)
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: object())
    assert rules.has_flash_attention() is expected
    key = "actor_rollout_ref.model.override_config.attn_implementation"
    assert OmegaConf.select(switched()[0], key) == (None if expected else "qerl_packed")
    assert switched()[0].actor_rollout_ref.model.use_fused_kernels is not expected
    assert OmegaConf.select(switched(on_cpu=True)[0], key) == "sdpa"
