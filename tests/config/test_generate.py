"""What is written from the declarations of the settings is up to date, and says what they say."""

import shutil

import pytest
from omegaconf import OmegaConf

from qerl_verl.config import generate
from qerl_verl.config.keys import flatten
from qerl_verl.config.settings import SETTINGS, QeRLSettings

YAML, PAGE = "qerl_verl/config/qerl_common.yaml", "docs/settings.md"


def test_the_files_are_up_to_date():
    assert not generate.outdated(), "run python -m qerl_verl.config.generate"


def test_the_group_of_hydra_gives_the_defaults():
    """But for ``qerl.arm``, which the choice of the group's file sets."""
    group = OmegaConf.load(generate.ROOT / YAML).qerl
    written = flatten(group, "qerl")
    assert written.pop("qerl.arm") == "???"
    assert written == {key: row.default for key, row in SETTINGS.items() if key != "qerl.arm"}
    assert QeRLSettings.from_mapping(OmegaConf.to_container(group) | {"arm": "nvfp4"}) == QeRLSettings()


def test_the_page_has_a_row_for_every_setting():
    table = generate.markdown_table()
    for key, row in SETTINGS.items():
        assert (f"| `{key}` |" in table) is not row.setting.chosen_by_group
    assert "| `qerl.aqn.num_stages` | `10` | integer, at least 2 | stages of equal length" in table
    assert "| `qerl.rollout.lora` | `inline` | `inline`, `punica` |" in table


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Returns a copy of the two files."""
    for name in generate.PARTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(generate.ROOT / name, tmp_path / name)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate.outdated, "__defaults__", (tmp_path,))
    return tmp_path


@pytest.mark.parametrize(("name", "text"), [(YAML, "num_stages: 10"), (PAGE, "standard deviation in the last stage")])
def test_a_change_by_hand_is_found_and_written_again(checkout, name, text, capsys):
    file = checkout / name
    before = file.read_text()
    file.write_text(before.replace(text, "changed"))
    assert generate.main(["--check"]) == 1 and "changed" in file.read_text()
    assert generate.main([]) == 0 and file.read_text() == before
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file}: out of date", f"{file}: written"]


def test_a_file_without_its_marker_lines_is_refused(checkout):
    (checkout / PAGE).write_text("# Settings\n")
    with pytest.raises(ValueError, match="docs/settings.md: expected one part between '<!-- settings: begin'"):
        generate.main([])
    shutil.rmtree(checkout / "docs")
    assert generate.main([]) == 2
