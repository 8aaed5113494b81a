"""Adds the config group ``qerl`` of this package to Hydra's search path."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class QeRLSearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://qerl_verl.config``, where the group ``qerl`` lies, to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if not any(entry.path == "pkg://qerl_verl.config" for entry in search_path.get_path()):
            search_path.append(provider="qerl-verl", path="pkg://qerl_verl.config")
