"""Every arm composes, and two arms differ in how the base is stored and in nothing else."""

from importlib.metadata import PackageNotFoundError

import pytest

import qerl_verl.plugin  # noqa: F401  (makes Hydra find the group, as `import verl` does)
from qerl_verl.cli.explain import ExplainError, compose
from qerl_verl.config import rules
from qerl_verl.config.arms import ARMS
from qerl_verl.config.checks import arms, recipe
from qerl_verl.config.draft import Draft
from qerl_verl.config.keys import flatten, override_keys
from qerl_verl.config.publish import published
from qerl_verl.job import JOB_ENV

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
VERSIONS = {"bitsandbytes": "0.50.2", "vllm": "0.28.0", "vllm-bnb-plugin": "0.0.2"}
OF_THE_BASE = {
    "qerl.arm",
    f"ray_kwargs.ray_init.runtime_env.env_vars.{JOB_ENV}",
    f"{ROLLOUT}.engine_kwargs.vllm.additional_config.qerl.kernel",
    f"{ROLLOUT}.engine_kwargs.vllm.additional_config.qerl.lora",
    f"{ROLLOUT}.engine_kwargs.vllm.additional_config.qerl.lora.alpha",
    f"{ROLLOUT}.engine_kwargs.vllm.additional_config.qerl.lora.experts",
    f"{ROLLOUT}.engine_kwargs.vllm.additional_config.qerl.lora.rank",
    f"{ROLLOUT}.engine_kwargs.vllm.compilation_config",
    f"{ROLLOUT}.engine_kwargs.vllm.quantization",
    f"{ROLLOUT}.load_format",
    f"{ACTOR}.fsdp_config.model_dtype",
    # without flash-attn, QeRL's engine has an output layer of its own
    "actor_rollout_ref.model.use_fused_kernels",
}
"""Settings that say how the base is stored and run. Nothing else may depend on the arm: not the
data or their order, not the sampling or its seeds, not the adapter or the seed of its initial
values, not the noise, not the loss."""


def installed(**versions):
    def version(name):
        if (found := {**VERSIONS, **versions}.get(name)) is None:
            raise PackageNotFoundError(name)
        return found

    return version


@pytest.fixture(scope="module")
def switched(composed):
    """Returns ``switched(arm, *overrides)``: verl's configuration in an arm, after the rules, and
    the problems."""

    def switch(arm, *overrides, on_cpu=False, packages=VERSIONS, environment=None):
        overrides = ["algorithm.adv_estimator=grpo", *overrides]
        config = composed(*overrides, arm=arm)
        rules.apply_rules(Draft(config), override_keys(overrides), on_cpu=on_cpu)
        found = arms.find_problems(config, environment or {}, installed(**packages))
        return config, recipe.find_problems(config) + found

    return switch


@pytest.mark.parametrize("enable", [True, False])
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_composes_with_and_without_the_noise(switched, arm, enable):
    config, problems = switched(arm, f"qerl.aqn.enable={enable}")
    assert problems == [] and config.qerl.arm == arm and config.qerl.aqn.enable is enable
    assert published(config).settings.arm == arm
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls == rules.WORKER_EXTENSION
    assert config.trainer.v1.trainer_mode == "qerl_sync"


OF_THE_DTYPE = {
    f"{ROLLOUT}.dtype",
    *(f"{ACTOR}.fsdp_config.mixed_precision.{name}_dtype" for name in ("param", "reduce", "buffer")),
}
"""Settings of nf4 where the other arms compute in float32."""


@pytest.mark.parametrize(
    ("on_cpu", "lacks"),
    [(True, None), (True, "the CPU has no bfloat16 arithmetic"), (False, None)],
    ids=["cpu", "cpu without bfloat16", "cuda"],
)
def test_arms_differ_in_the_base_alone(switched, monkeypatch, on_cpu, lacks):
    monkeypatch.setattr(rules, "missing_bfloat16", lambda environment: lacks)
    found = {arm: flatten(switched(arm, on_cpu=on_cpu)[0]) for arm in ARMS}
    for arm, values in found.items():
        differ = {key for key in values.keys() | found["nvfp4"] if values.get(key) != found["nvfp4"].get(key)}
        in_bfloat16 = OF_THE_DTYPE if arm == "nf4" and lacks else set()
        assert in_bfloat16 <= differ <= OF_THE_BASE | in_bfloat16, arm
    bf16, nf4 = found["bf16"], found["nf4"]
    assert bf16[f"{ACTOR}.fsdp_config.model_dtype"] == "bf16" and bf16[f"{ROLLOUT}.load_format"] == "safetensors"
    assert f"{ROLLOUT}.engine_kwargs.vllm.quantization" not in bf16
    assert nf4[f"{ROLLOUT}.load_format"] == nf4[f"{ROLLOUT}.engine_kwargs.vllm.quantization"] == "bitsandbytes"


@pytest.mark.parametrize(
    ("arm", "overrides", "packages", "expected"),
    [
        ("bf16", ["qerl.kernel=pytorch"], {}, "qerl.kernel=pytorch: a setting of the packed layers"),
        ("bf16", ["qerl.recompute=full"], {}, "qerl.recompute=full: a setting of the packed layers"),
        ("bf16", ["qerl.base=shared"], {}, "qerl.base=shared: a setting of the packed layers"),
        ("nf4", ["qerl.rollout.kernel=pytorch"], {}, "the arm nf4 has none; remove it"),
        ("bf16", ["qerl.rollout.lora=punica"], {}, "qerl.rollout.lora=punica: a setting of the packed layers"),
        ("bf16", ["qerl.rollout.sleep_level=2"], {}, "qerl.rollout.sleep_level=2: a setting"),
        ("bf16", ["qerl.quantization.method=rtn"], {}, "qerl.quantization.method=rtn: how a model becomes NVFP4"),
        ("mxfp4", ["qerl.quantization.method=gptq"], {}, "the arm mxfp4 has another base; remove it"),
        ("nf4", ["qerl.quantization.samples=7"], {}, "qerl.quantization.samples=7: how a model"),
        ("bf16", ["algorithm.adv_estimator=gae"], {}, "algorithm.adv_estimator=gae: it needs a critic"),
        ("nf4", ["algorithm.adv_estimator=gae"], {}, "the arm nf4 does not have"),
        ("nf4", [], {"bitsandbytes": None}, "bitsandbytes is not installed; `pip install 'bitsandbytes>=0.48.1'`"),
        ("nf4", [], {"bitsandbytes": "0.45.0"}, "bitsandbytes 0.45.0 is installed; `pip install"),
        ("nf4", [], {"vllm-bnb-plugin": None}, "`pip install 'vllm-bnb-plugin<0.0.3'` on every node"),
        ("nf4", [], {"vllm-bnb-plugin": "0.0.3"}, "vllm-bnb-plugin 0.0.3 calls what vLLM 0.28.0 does not have"),
        ("nf4", [f"{ACTOR}.fsdp_config.param_offload=True"], {}, "fsdp_config.param_offload=True: bitsandbytes"),
        ("nf4", [f"{ACTOR}.fsdp_config.offload_policy=True"], {}, "fsdp_config.offload_policy=True: bitsandbytes"),
        ("nf4", ["actor_rollout_ref.model.use_fused_kernels=True"], {}, "use_fused_kernels=True: not tried"),
        ("nf4", [f"+{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32"], {}, "param_dtype=fp32: the arm nf4"),
        ("bf16", [f"{ROLLOUT}.quantization=fp8"], {}, f"{ROLLOUT}.quantization=fp8: +qerl= chooses"),
        ("bf16", [f"+{ROLLOUT}.engine_kwargs.vllm.quantization=bitsandbytes"], {}, "quantization=bitsandbytes: +qerl="),
        ("nf4", [f"+{ROLLOUT}.engine_kwargs.vllm.quantization=fp8"], {}, "vllm.quantization=fp8: +qerl= chooses"),
        ("nf4", ["actor_rollout_ref.model.lora_rank=1024"], {}, "lora_rank=1024"),
        ("bf16", ["actor_rollout_ref.model.lora.merge=True"], {}, "lora.merge=True: the adapter alone is sent"),
    ],
)
def test_what_an_arm_cannot_do_is_refused(switched, arm, overrides, packages, expected):
    _, problems = switched(arm, *overrides, packages=packages)
    assert any(expected in problem for problem in problems), problems


def test_a_vllm_that_has_the_layers_itself_needs_no_plugin(switched):
    assert switched("nf4", packages={"vllm": "0.24.0", "vllm-bnb-plugin": None})[1] == []


def test_vllms_list_of_plugins_has_to_name_the_layers(switched):
    for names, refused in (("qerl", True), ("qerl,bitsandbytes", False)):
        problems = switched("nf4", environment={"VLLM_PLUGINS": names})[1]
        assert problems == [] or (
            refused and "VLLM_PLUGINS=qerl keeps vLLM from loading vllm-bnb-plugin" in problems[0]
        )
        assert bool(problems) is refused


def test_nf4_is_refused_on_a_cpu(switched):
    assert "vLLM's CPU build does not run bitsandbytes' layers" in switched("nf4", on_cpu=True)[1][0]
    assert switched("bf16", on_cpu=True)[1] == switched("mxfp4", on_cpu=True)[1] == []


def test_an_unknown_arm_is_refused_with_the_names_of_the_others():
    with pytest.raises(ExplainError) as error:
        compose("ppo_trainer", ["+qerl=fp8"])
    assert all(f"\n\t{name}" in str(error.value) for name in ARMS), error.value
    assert "qerl_common" not in str(error.value)
