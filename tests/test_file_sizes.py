"""Tests the comparison of files with recorded sizes."""

from qerl_verl.file_sizes import find_differences


def test_a_missing_and_a_shorter_file_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    for name, length in {"a/whole": 5, "short": 3}.items():
        (tmp_path / name).write_bytes(bytes(length))
    assert dict(find_differences(tmp_path, {"a/whole": 5, "short": 4, "gone": 1, "a": 0})) == {
        "a/whole": None,
        "short": "is 3 bytes long and was 4",
        "gone": "is missing",
        "a": "is missing",
    }
