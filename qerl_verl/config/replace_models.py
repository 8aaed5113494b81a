"""Replaces the models that a run names by the checkpoints that its arm runs.

Everything here may download and quantize, which takes minutes. A plan has been checked before.
"""

from __future__ import annotations

import copy
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.config.arms import ARMS
from qerl_verl.config.draft import Draft
from qerl_verl.config.keys import CRITIC, MODEL, get_value
from qerl_verl.config.publish import published, republish
from qerl_verl.config.quantization import Choice, choose_quantization
from qerl_verl.config.rules import trained_models
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.job import BaseSharing
from qerl_verl.log_lines import say

if TYPE_CHECKING:
    from qerl_verl.nvfp4.cache import Quantization


def replace_models(config: DictConfig, settings: QeRLSettings, choice: Choice | None = None) -> dict[str, Path]:
    """Replaces model paths by a packed checkpoint, or by the model itself in an arm without one.

    A model that is not quantized yet is. The same model twice is the same checkpoint. The ``qerl``
    node gets ``source_models`` and ``base_fingerprint``.

    Args:
        config: verl's configuration, changed in place.
        settings: of the run.
        choice: how a model is quantized; None chooses as for a driver without a GPU.

    Returns:
        Key of each trained model -> local folder of its base.

    Raises:
        SettingsError: a model cannot be found or cannot be quantized.
    """
    from qerl_verl.nvfp4.cache import fingerprint

    arm, trained = ARMS[settings.arm], trained_models(config)
    # read first, because one path may refer to the other
    sources = {model: OmegaConf.select(config, f"{model}.path") for model in trained}
    choice = choice or choose_quantization(config, settings, gpu=False)
    folders: dict[str, Path] = {}
    for model, source in sources.items():
        if source not in folders:
            folders[source] = resolve(f"{model}.path", source, settings, choice)
    roles = {model: "critic" if model == CRITIC else "actor" for model in trained}
    with open_dict(config):
        config.qerl.source_models = {roles[m]: lasting_name(source) for m, source in sources.items()}
        config.qerl.base_fingerprint = {
            roles[m]: fingerprint(folders[source], settings.cache_dir) for m, source in sources.items()
        }
        for model, source in sources.items():
            # a name on the hub stays where the model is used as it is: other nodes have their own
            # copies
            if arm.container or os.path.exists(os.path.expanduser(source)):
                OmegaConf.update(config, f"{model}.path", str(folders[source]))
    if CRITIC in trained:
        same = sources[CRITIC] == sources[MODEL]
        say(f"critic: {'the same checkpoint' if same else 'a checkpoint of its own'}")
    return {model: folders[source] for model, source in sources.items()}


def publish_models(config: DictConfig) -> None:
    """Tells the run's processes the names that the user gave to the models.

    Where actor and rollout share a base, they also learn which checkpoint it is, and a new key to
    it.
    """
    sources, sharing = get_value(config, "qerl.source_models") or {}, published(config).sharing
    if sharing is not None:
        sharing = BaseSharing(secrets.token_hex(16), get_value(config, f"{MODEL}.path"))
    republish(Draft(config), sources=dict(sources), sharing=sharing)


def on_local_models(config: DictConfig, bases: dict[str, Path]) -> DictConfig:
    """Returns a copy of the configuration whose models are local folders, for checks that read
    them.

    Args:
        bases: what :func:`replace_models` returned.
    """
    config = copy.deepcopy(config)
    for model, folder in bases.items():
        OmegaConf.update(config, f"{model}.path", str(folder))
    return config


def lasting_name(path: str) -> str:
    """Returns a model's name or path as it can be read in another folder, or later: the path of a
    local folder becomes absolute."""
    folder = os.path.expanduser(path)
    return os.path.abspath(folder) if "://" not in path and os.path.isdir(folder) else path


def resolve(key: str, path: str, settings: QeRLSettings, choice: Choice | None) -> Path:
    """Returns the folder of a model in the arm's form, and prints it.

    Args:
        key: the setting that names the model.
        path: its value: a folder, a name on the hub, or a path on a remote file system.
        settings: of the run.
        choice: how the model is quantized where it is not yet.

    Raises:
        SettingsError: the model cannot be found or cannot be quantized; names ``key``.
    """
    from verl.utils.fs import copy_to_local

    from qerl_verl.nvfp4.cache import resolve_checkpoint, resolve_source
    from qerl_verl.nvfp4.errors import CheckpointError
    from qerl_verl.nvfp4.validation import check_method

    arm = ARMS[settings.arm]
    # verl knows how to copy from hdfs and the like
    local = copy_to_local(path) if "://" in path else os.path.expanduser(path)
    try:
        if not arm.container:
            folder = resolve_source(local).absolute()
            say(f"model: {folder} ({arm.base})")
            return folder
        assert choice is not None, "an arm whose base is packed has a method"
        resolved = resolve_checkpoint(local, settings.cache_dir, _quantization(choice))
        check_method(resolved.path, arm.name)
    except CheckpointError as error:
        raise SettingsError([f"{key}={path}: {error}"]) from error
    say(f"model: {resolved.path} ({arm.base}, {resolved.kind})")
    for note in resolved.notes:
        say(f"{key}: {note}")
    return resolved.path.absolute()


def _quantization(choice: Choice) -> Quantization:
    """Returns what the cache asks for. The text is read when it is needed."""
    from verl.utils.fs import copy_to_local

    from qerl_verl.nvfp4.cache import Quantization
    from qerl_verl.nvfp4.calibration import Calibration, read_calibration
    from qerl_verl.nvfp4.errors import CheckpointError

    def calibration(model: Path) -> Calibration:
        files = [copy_to_local(file) if "://" in file else file for file in choice.files]
        try:
            return read_calibration(
                files,
                model,
                samples=choice.samples,
                sample_tokens=choice.sample_tokens,
                prompt_key=choice.prompt_key,
                chat_template=choice.chat_template,
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Set qerl.quantization.calibration to a file with text, or "
                "qerl.quantization.method=four-over-six."
            ) from error

    return Quantization(choice.method, calibration, choice.device, isolated=choice.device == "cuda")
