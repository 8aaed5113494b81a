"""Checks of model folders on this machine. A model on the hub is checked when it has been
downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from packaging.version import Version

from qerl_verl.config.adapters import adapter_problems, target_problems
from qerl_verl.config.arms import get_arm
from qerl_verl.config.checks import kernels, tokenizers, vision
from qerl_verl.config.keys import get_value
from qerl_verl.config.rules import ACTOR, CRITIC, MODEL, PACKED_ATTENTION, ROLLOUT, trained_models

if TYPE_CHECKING:
    from qerl_verl.nvfp4.architectures import Architecture


def local_folder(config: DictConfig, model: str) -> Path | None:
    """Returns the folder of a model, or None if its path is a name on the hub or a remote file
    system's.
    """
    path = get_value(config, f"{model}.path")
    if not isinstance(path, str) or "://" in path:
        return None
    folder = Path(os.path.expanduser(path))
    return folder if folder.is_dir() else None


def local_architecture(config: DictConfig, model: str) -> Architecture | None:
    """Returns the row of a model on this machine, or None if there is no model there or it is not
    supported, which other checks say."""
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint_files import read_config
    from qerl_verl.nvfp4.errors import CheckpointError

    folder = local_folder(config, model)
    try:
        return get_architecture(read_config(folder)) if folder else None
    except CheckpointError:
        return None


def remote_paths(config: DictConfig) -> list[str]:
    """Returns the models that are still to be downloaded: names on the hub, and paths on a remote
    file system.
    """
    paths = {str(get_value(config, f"{model}.path")): local_folder(config, model) for model in trained_models(config)}
    return [path for path, folder in paths.items() if folder is None and not _is_path(path)]


def find_unquantized(config: DictConfig) -> list[str]:
    """Returns the paths of trained models that are not, or may not be, in four bits, and that a run
    would quantize.
    """
    from qerl_verl.nvfp4.errors import CheckpointError
    from qerl_verl.nvfp4.format import read_quantization

    found = []
    for model in trained_models(config):
        folder = local_folder(config, model)
        try:
            if folder is not None and read_quantization(folder) == "nvfp4":
                continue
        except CheckpointError:  # refused elsewhere
            continue
        found.append(str(get_value(config, f"{model}.path")))
    return found


def _is_path(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~"))


def find_problems(config: DictConfig, adapters: Mapping[str, dict] | None = None) -> list[str]:
    """Returns why the local models of a run cannot be quantized or used, one sentence each.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        adapters: see :class:`~qerl_verl.config.plan.Plan`.
    """
    from qerl_verl.nvfp4.errors import CheckpointError
    from qerl_verl.nvfp4.validation import check_checkpoint, check_method, check_source

    found: dict[str, str] = {}
    for model in trained_models(config):
        path, folder = get_value(config, f"{model}.path"), local_folder(config, model)
        if path in found:
            continue
        if folder is None:
            if _is_path(str(path)):
                found[path] = f"{model}.path={path}: there is no such folder"
            continue
        try:
            if get_arm(config).container:
                if check_checkpoint(folder) in ("nvfp4", "modelopt"):
                    check_method(folder, get_arm(config).name)
            else:
                check_source(folder)
        except CheckpointError as error:
            found[path] = f"{model}.path={path}: {error}"
    return list(found.values()) or find_misfits(config, adapters)


def find_misfits(config: DictConfig, adapters: Mapping[str, dict] | None = None) -> list[str]:
    """Returns the settings that do not fit local models: adapters, target modules, tokenizers,
    lengths.

    Args:
        config: see :func:`find_problems`. The models may be quantized or not; one that cannot be
            read is skipped.
        adapters: see :func:`find_problems`.
    """
    from qerl_verl.nvfp4.errors import CheckpointError

    out = []
    for model in trained_models(config):
        folder = local_folder(config, model)
        if folder is None:
            continue
        adapter = (adapters or {}).get(model)
        try:
            out += adapter_problems(config, model, adapter) if adapter else _new_adapter_problems(config, model)
            if model == MODEL:
                out += vision.find_problems(config, folder)
            if model == MODEL and get_arm(config).container:
                out += kernels.find_problems(config, folder)
        except CheckpointError:
            continue
    out += tokenizers.find_problems(config) + fused_kernel_problems(config) + length_problems(config)
    out += head_size_problems(config) + tensor_parallel_problems(config)
    out += position_problems(config) + packing_problems(config) + critic_problems(config)
    out += delta_net_problems(config)
    return out + vllm_lora_problems(config) + expert_problems(config) + replay_problems(config)


def _new_adapter_problems(config: DictConfig, model: str) -> list[str]:
    if get_value(config, f"{model}.lora_adapter_path") is not None:
        return []  # on a remote file system, or refused already
    return target_problems(config, model)


def fused_kernel_problems(config: DictConfig) -> list[str]:
    """Returns why the output layer of ``use_fused_kernels`` (engine/output_layer.py) cannot serve a
    model.
    """
    folder = local_folder(config, MODEL)
    if not get_value(config, f"{MODEL}.use_fused_kernels") or folder is None or not (folder / "config.json").is_file():
        return []
    cap = _decoder_settings(folder).get("final_logit_softcapping")
    if cap is None:
        return []
    return [
        f"{MODEL}.use_fused_kernels=True: the model caps its logits (final_logit_softcapping={cap} "
        "in config.json), which the output layer that computes log-probabilities in chunks does "
        f"not; set {MODEL}.use_fused_kernels=False"
    ]


def _decoder_settings(folder: Path) -> Mapping[str, Any]:
    """Returns the settings of the decoder from a model's config.json."""
    from qerl_verl.nvfp4.architectures import text_settings

    return text_settings(json.loads((folder / "config.json").read_text()))


def length_problems(config: DictConfig) -> list[str]:
    """Returns the problem of a length beyond the model's positions, which verl's server refuses
    when it starts (verl/workers/rollout/vllm_rollout/vllm_async_server.py).
    """
    folder = local_folder(config, MODEL)
    if folder is None or not (folder / "config.json").is_file():
        return []
    positions = _decoder_settings(folder).get("max_position_embeddings")
    if not isinstance(positions, int):
        return []
    longest = get_value(config, f"{ROLLOUT}.max_model_len")
    if not longest or longest <= positions:
        return []
    return [f"{ROLLOUT}.max_model_len={longest}: the model has {positions} positions; set it to {positions} or less"]


def tensor_parallel_problems(config: DictConfig) -> list[str]:
    """Returns the problem of a model that cannot be divided among the GPUs of an engine, which vLLM
    reports when it builds the model (vllm/config/model.py, verify_with_parallel_config, and its
    models' attention), and our layers where a GPU would have a part of a block of NVFP4.
    """
    from transformers import AutoConfig

    from qerl_verl.nvfp4.packing import BLOCK_SIZE

    key = f"{ROLLOUT}.tensor_model_parallel_size"
    architecture, size = local_architecture(config, MODEL), get_value(config, key)
    if architecture is None or not isinstance(size, int) or size < 2:
        return []
    try:
        whole = AutoConfig.from_pretrained(local_folder(config, MODEL))
    except (OSError, ValueError):  # the checks of the checkpoint say so
        return []
    decoder = whole.get_text_config()
    heads, groups = decoder.num_attention_heads, decoder.num_key_value_heads
    fits = [n for n in range(1, heads + 1) if not heads % n and not (groups % n and n % groups)]
    if size not in fits:
        return [
            f"{key}={size}: the model's {heads} attention heads ({groups} of keys and values) cannot be "
            f"divided among so many GPUs; set it to {_list(fits)}"
        ]
    block = BLOCK_SIZE if get_arm(config).container else 1
    shapes = architecture.projection_shapes(whole)
    inputs = {"self_attn.o_proj": shapes["self_attn.o_proj"][1]}
    if architecture.experts is None:
        inputs["mlp.down_proj"] = shapes["mlp.down_proj"][1]
    elif (get_value(config, f"{ROLLOUT}.expert_parallel_size") or 1) == 1:  # each GPU has a part of every expert
        inputs["down_proj of an expert"] = getattr(decoder, architecture.experts.inner)
    for projection, channels in inputs.items():
        if channels % (size * block):
            fits = [n for n in fits if all(channels % (n * block) == 0 for channels in inputs.values())]
            return [
                f"{key}={size}: each GPU would have {channels / size:g} input channels of {projection}, "
                f"which are not whole blocks of {block}; set it to {_list(fits)}"
            ]
    return []


def _list(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""vLLM 0.28, v1/attention/backends/cpu_attn.py, get_supported_head_sizes."""


def head_size_problems(config: DictConfig) -> list[str]:
    """Returns the problem of a head size for which vLLM's CPU build has no attention kernel; vLLM
    reports it at the first batch.
    """
    folder = local_folder(config, MODEL)
    if get_value(config, "trainer.device") != "cpu" or folder is None:
        return []
    problem = cpu_head_size_problem(folder)
    return [f"{MODEL}.path={folder}: {problem}"] if problem else []


def cpu_head_size_problem(folder: Path) -> str:
    """Returns why vLLM's CPU build has no attention kernel for the model in ``folder``; empty if it
    has one.
    """
    if not (folder / "config.json").is_file():
        return ""
    settings = _decoder_settings(folder)
    heads = settings.get("num_attention_heads")
    size = settings.get("head_dim") or (settings.get("hidden_size", 0) // heads if heads else None)
    if size is None or size in CPU_HEAD_SIZES:
        return ""
    return (
        f"its attention heads are {size} wide (config.json), for which vLLM has no kernel on a "
        f"CPU; it has {', '.join(map(str, CPU_HEAD_SIZES))}. Use another model, or a GPU"
    )


def position_problems(config: DictConfig, installed: Callable[[str], str] = version) -> list[str]:
    """Returns rotary embeddings and lengths for which vLLM and transformers rotate queries and keys
    in different ways, so that actor and rollout would be two policies.

    Args:
        config: see :func:`find_problems`.
        installed: distribution name to version.
    """
    folder = local_folder(config, MODEL)
    if folder is None or not (folder / "config.json").is_file():
        return []
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder)
    except Exception:  # whatever transformers makes of it; the checks of the checkpoint say so
        return []
    settings = whole.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return [
            f"{MODEL}.path={folder}: rope_type dynamic in config.json: transformers stretches the "
            "positions of long sequences alone, vLLM those of all. Set another rope_type there, "
            "as yarn or default"
        ]
    scaled = rope.get("rope_type", "default") != "default" and "sliding_attention" in (
        getattr(settings, "layer_types", None) or ()
    )
    if (
        "Olmo3ForCausalLM" in (getattr(whole, "architectures", None) or ())
        and scaled
        and Version(installed("vllm")) < Version("0.28")
    ):
        return [
            f"{MODEL}.path={folder}: rope_type {rope['rope_type']} in config.json: transformers "
            "applies it to all layers of Olmo3ForCausalLM, and vLLM before 0.28 to those without "
            "a sliding window alone (model_executor/models/olmo2.py). Set rope_type default there"
        ]
    reason = ""
    if rope.get("rope_type") == "longrope":
        reason = "beyond that, transformers takes the long factors for the batches that have a longer sequence, and vLLM for all"
    elif rope.get("llama_4_scaling_beta"):
        reason = "beyond that, transformers scales queries by llama_4_scaling_beta, and vLLM does not"
    limit = rope.get("original_max_position_embeddings")
    longest = get_value(config, f"{ROLLOUT}.max_model_len") or getattr(settings, "max_position_embeddings", None)
    if not reason or not limit or not longest or longest <= limit:
        return []
    return [
        f"{ROLLOUT}.max_model_len={get_value(config, f'{ROLLOUT}.max_model_len')}: actor and "
        f"rollout compute the same positions up to {limit} (original_max_position_embeddings of "
        f"the model); {reason}. Set it to {limit} or less"
    ]


def packing_problems(config: DictConfig) -> list[str]:
    """Returns the problem of packed sequences that would attend to each other, because a model's
    attention layer does not pass positions on
    (:attr:`~qerl_verl.nvfp4.architectures.Architecture.keeps_positions`). Stock verl has the same
    problem.
    """
    out = []
    for model in trained_models(config):
        architecture = local_architecture(config, model)
        if architecture is None or not get_value(config, f"{model}.use_remove_padding"):
            continue
        key = f"{model}.override_config.attn_implementation"
        attention = get_value(config, key) or "flash_attention_2"  # verl's default
        if architecture.keeps_positions and attention.startswith("flash_attention"):
            out.append(
                f"{key}={attention} with use_remove_padding=True: transformers' "
                f"{architecture.name} tells flash-attn nothing of the sequences in one row, so "
                f"they would attend to each other; set {PACKED_ATTENTION} or sdpa"
            )
    return out


def delta_net_problems(config: DictConfig, installed: Callable[[str], str] = version) -> list[str]:
    """Returns what the programs below cannot do with a model that has gated delta nets.

    Args:
        config: see :func:`find_problems`.
        installed: distribution name to version.
    """
    out = []
    for model in trained_models(config):
        architecture = local_architecture(config, model)
        if architecture is None or architecture.delta_nets is None:
            continue
        if get_value(config, f"{model}.use_remove_padding"):
            out.append(
                f"{model}.use_remove_padding=True: a delta net's state would run "
                f"from one sequence of a packed row into the next in {architecture.name}; set it "
                "to False"
            )
        if model == MODEL:
            out += _delta_net_problems(config, architecture, installed)
    return out


def _delta_net_problems(config: DictConfig, architecture: Architecture, installed: Callable[[str], str]) -> list[str]:
    path = f"{MODEL}.path={local_folder(config, MODEL)}"
    out = []
    if architecture.oldest_vllm and Version(installed("vllm")) < Version(architecture.oldest_vllm):
        out.append(
            f"{path}: vLLM {installed('vllm')} has no {architecture.name}, which vLLM "
            f"{architecture.oldest_vllm} has; install that version, or take another model"
        )
    if importlib.util.find_spec("torchvision") is None:
        out.append(
            f"{path}: {architecture.name} needs torchvision, also for texts, because the file of "
            "vLLM that has the model imports it; install the build that fits PyTorch"
        )
    if get_arm(config).name == "nf4":
        out.append(
            f"{path}: the arm nf4 does not serve {architecture.name}, because bitsandbytes would "
            "also quantize the small linears of its delta nets; use +qerl=nvfp4"
        )
    ulysses = (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size")
    if key := next((key for key in ulysses if (get_value(config, key) or 1) > 1), ""):
        out.append(
            f"{key}={get_value(config, key)}: sequence parallelism needs packed rows, in which "
            f"the states of {architecture.name}'s delta nets would run on; set it to 1"
        )
    dtype = get_value(config, f"{ROLLOUT}.dtype")
    if get_value(config, "trainer.device") == "cpu" and dtype not in ("bfloat16", "bf16"):
        out.append(
            f"{ROLLOUT}.dtype={dtype}: vLLM computes delta nets in bfloat16 alone on a CPU; set "
            f"{ROLLOUT}.dtype=bfloat16"
        )
    return out


def vllm_lora_problems(config: DictConfig) -> list[str]:
    """Returns the problem of vLLM's own LoRA path with a model whose adapters it does not
    support."""
    inline = get_arm(config).container and get_value(config, "qerl.rollout.lora") != "punica"
    folder, architecture = local_folder(config, MODEL), local_architecture(config, MODEL)
    if inline or architecture is None:
        return []
    reason = architecture.no_vllm_lora or (architecture.no_punica if get_arm(config).container else "")
    if not reason:
        return []
    fix = (
        "set qerl.rollout.lora=inline"
        if get_arm(config).container
        else "use +qerl=nvfp4, whose layers hold the adapter"
    )
    return [f"{MODEL}.path={folder}: vLLM's own LoRA path does not serve the model, because {reason}; {fix}"]


def expert_problems(config: DictConfig) -> list[str]:
    """Returns the problem of a mixture of experts in an arm that would leave the experts in 16
    bits.
    """
    folder, architecture = local_folder(config, MODEL), local_architecture(config, MODEL)
    if architecture is None or architecture.experts is None or get_arm(config).name != "nf4":
        return []
    return [
        f"{MODEL}.path={folder}: the arm nf4 does not serve {architecture.name}, because "
        "transformers gives bitsandbytes linear layers alone, and the experts would stay in 16 "
        "bits; use +qerl=nvfp4"
    ]


def replay_problems(config: DictConfig) -> list[str]:
    """Returns why the rollout's routing cannot be replayed in the actor."""
    key = f"{ROLLOUT}.enable_rollout_routing_replay"
    folder, architecture = local_folder(config, MODEL), local_architecture(config, MODEL)
    if folder is None or architecture is None or not get_value(config, key):
        return []
    if architecture.experts is None:
        return [f"{key}=True: {architecture.name} has no experts whose routing could be replayed; remove it"]
    if _decoder_settings(folder).get(architecture.experts.chosen) == 1:
        return [
            f"{key}=True: the model sends a token to one expert, so a token without a recorded "
            "choice cannot be told from one that goes to expert 0; remove it"
        ]
    if get_value(config, "trainer.device") == "cpu" and not get_arm(config).container:
        return [
            f"{key}=True: vLLM's CPU engine does not return the experts of the arm "
            f"{get_arm(config).name}, because its kernel chooses them itself; remove it, or use "
            "+qerl=nvfp4"
        ]
    return []


def critic_problems(config: DictConfig) -> list[str]:
    """Returns the problem of a critic whose model type has no token classification in transformers,
    from which verl builds critics (verl/utils/model.py, load_valuehead_model).
    """
    folder = local_folder(config, CRITIC) if CRITIC in trained_models(config) else None
    if folder is None or not get_arm(config).container:
        return []
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as CRITICS

    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        return []
    if model_type in CRITICS:
        return []
    return [
        f"{CRITIC}.path={folder}: transformers has no token classification for model_type "
        f"{model_type}, of which critics are made here. Take a critic of another family, or "
        "algorithm.adv_estimator=grpo, which needs none"
    ]
