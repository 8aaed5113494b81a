"""Tests the qerl command: results on stdout, and one line on stderr with exit code 2 for user
errors."""

import json
import shutil
import subprocess
import sys

import pytest

from qerl_verl.cli.main import main
from qerl_verl.nvfp4 import cache, quantize
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.validation import validate_nvfp4_checkpoint


@pytest.fixture
def src(bf16_checkpoint, tmp_path):
    return shutil.copytree(bf16_checkpoint, tmp_path / "src")


def failed(capsys, *arguments):
    """Returns the one line of an error."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qerl: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_quantize(src, tmp_path, capsys):
    assert main(["quantize", str(src), str(tmp_path / "dst")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'dst'}\n"
    assert "Quantizing to NVFP4" in err and "100%" in err
    validate_nvfp4_checkpoint(tmp_path / "dst")


def test_quantize_refuses_a_folder_in_use(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert main(["quantize", str(src), str(dst)]) == 0
    capsys.readouterr()
    (dst / "model.safetensors").write_text("mine")
    assert "not an empty folder" in failed(capsys, "quantize", src, dst)
    assert (dst / "model.safetensors").read_text() == "mine"

    assert main(["quantize", str(src), str(dst), "--force"]) == 0
    validate_nvfp4_checkpoint(dst)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_force_keeps_the_old_checkpoint_if_the_new_one_fails(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert main(["quantize", str(src), str(dst)]) == 0
    capsys.readouterr()
    (src / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in failed(capsys, "quantize", src, dst, "--force")
    validate_nvfp4_checkpoint(dst)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def holds(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("documents", "has no readable qerl_manifest.json"),
        ("another model", "has no readable qerl_manifest.json"),
        ("a broken manifest", "has no readable qerl_manifest.json"),
        ("ours and notes", "also holds notes/thesis.txt"),
        ("src", "SRC lies in it"),
        (".", "SRC lies in it"),
    ],
)
def test_force_replaces_nothing_but_what_it_wrote(src, tmp_path, nvfp4_checkpoint, capsys, there, said):
    dst = tmp_path / there
    holds(tmp_path / "documents", thesis="years of work")
    holds(tmp_path / "a broken manifest", **{"qerl_manifest.json": "[]"})
    shutil.copytree(src, tmp_path / "another model")
    shutil.copytree(nvfp4_checkpoint, tmp_path / "ours and notes")
    holds(tmp_path / "ours and notes" / "notes", **{"thesis.txt": "years of work"})
    before = sorted(tmp_path.rglob("*"))
    assert said in failed(capsys, "quantize", src, dst, "--force")
    assert sorted(tmp_path.rglob("*")) == before


def test_resolve(src, tmp_path, capsys):
    arguments = ["resolve", str(src), "--cache-dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    (entry,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    assert out == f"{entry}\n" and "Quantizing" in err
    assert main(arguments) == 0
    assert capsys.readouterr() == (out, "")
    assert main(["resolve", str(entry)]) == 0
    assert capsys.readouterr() == (out, "")


def test_resolve_uses_the_environment(src, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QERL_CACHE", str(tmp_path / "elsewhere"))
    assert main(["resolve", str(src)]) == 0
    assert capsys.readouterr().out.startswith(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    "config, named",
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"], "quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "resolve"])
def test_unusable_models(src, tmp_path, capsys, command, config, named):
    (src / "config.json").write_text(json.dumps(config))
    where = [tmp_path / "dst"] if command == "quantize" else ["--cache-dir", tmp_path / "cache"]
    assert named in failed(capsys, command, src, *where)
    assert not (tmp_path / "dst").exists()


def test_operating_system_errors_are_one_line_too(src, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = failed(capsys, "quantize", src, tmp_path / "file" / "dst")
    assert f"file/dst cannot be written (File exists: {tmp_path / 'file'}). Choose another folder." in said


UNWRITABLE = [
    (["quantize", "src", "file/dst"], "file/dst cannot be written (File exists: "),
    (["quantize", "./none", "dst"], "none: there is no such folder"),
    (["quantize", "file", "dst"], "file is not a folder"),
    (["resolve", "src", "--cache-dir", "file"], "with qerl.cache_dir, --cache-dir or $QERL_CACHE"),
    (["resolve", "src", "--cache-dir", "x" * 300], "cannot be written (File name too long: "),
    (["resolve", "src", "--cache-dir", "/proc/cache"], "/proc/cache"),
]


@pytest.mark.parametrize(("arguments", "said"), UNWRITABLE)
def test_a_place_that_cannot_be_used_is_named_with_the_fix(src, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    before = sorted(path for path in tmp_path.iterdir())
    assert said in failed(capsys, *arguments)
    assert sorted(path for path in tmp_path.iterdir()) == before


def test_quantize_takes_a_name_on_the_hub(src, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **patterns: str(src))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda model: ["model.safetensors"])
    assert main(["quantize", "me/model", str(tmp_path / "dst")]) == 0
    assert (tmp_path / "dst" / "config.json").is_file()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(CheckpointError):
        main(["quantize", str(tmp_path / "nowhere"), str(tmp_path / "dst"), "--debug"])


def test_a_bug_is_not_disguised(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "resolve_checkpoint", lambda *a: {}["missing"])
    with pytest.raises(KeyError):
        main(["resolve", str(tmp_path)])


def test_interrupted(src, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "write_weights", interrupt)
    assert main(["quantize", str(src), str(tmp_path / "dst")]) == 130
    assert capsys.readouterr().err == "qerl: interrupted\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_an_interrupted_gptq_says_where_its_layers_are(src, tmp_path, capsys, monkeypatch):
    def interrupt(src, dst, **how):
        dst.with_name("dst.layers-0").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("qerl_verl.nvfp4.quantize.quantize_checkpoint", interrupt)
    assert main(["quantize", str(src), str(tmp_path / "dst")]) == 130
    said = f"the finished layers are in {tmp_path / 'dst.layers-0'}; the same command goes on from there"
    assert said in capsys.readouterr().err


def test_usage_without_importing_torch():
    """Starts a process as the entry point does. Help must appear at once."""
    script = "import sys, qerl_verl.cli.main as m\ntry: m.main(['--help'])\nfinally: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "quantize" in out and "resolve" in out and out.endswith("False\n")
    wrong = subprocess.run([sys.executable, "-m", "qerl_verl.cli.main", "quantise"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "invalid choice: 'quantise'" in wrong.stderr


# --- methods, report, check ---


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(str(i * i % 97) for i in range(400)))
    return file


def test_quantize_with_a_text_is_gptq(src, text, tmp_path, capsys):
    arguments = ["quantize", src, tmp_path / "dst", "--calibration", text, "--samples", 8, "--sample-tokens", 40]
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'dst'}\n"
    assert "GPTQ" in err and "outputs" in err and "KL divergence" in err and "mlp.down_proj" in err
    report = json.loads((tmp_path / "dst" / "qerl_report.json").read_text())
    assert report["method"] == "gptq" and report["calibration"]["sequences"] == 8

    cache = ["--cache-dir", str(tmp_path / "cache")]
    with_text = [*cache, *(str(a) for a in arguments[3:])]
    folders = set()
    for rest in (cache, with_text, [*cache, "--method", "rtn"], [*with_text[:-1], "30"], with_text):
        assert main(["resolve", str(src), *rest]) == 0
        folders.add(capsys.readouterr().out)
    assert len(folders) == 4  # a folder of the cache for each method and text


def test_json_for_scripts(src, tmp_path, capsys):
    assert main(["quantize", str(src), str(tmp_path / "dst"), "--json", "--method", "rtn"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(tmp_path / "dst") and result["method"] == "rtn" and result["seconds"] > 0
    assert main(["quantize", "--check", str(tmp_path / "dst"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linears"] == 14


def test_check(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert main(["quantize", str(src), str(dst)]) == 0
    capsys.readouterr()
    assert main(["quantize", "--check", str(dst)]) == 0
    assert "14 linears" in capsys.readouterr().out
    (dst / "tokenizer_config.json").unlink()
    assert main(["quantize", "--check", str(dst)]) == 2
    assert "tokenizer_config.json is missing" in capsys.readouterr().err
    assert "without SRC" in failed(capsys, "quantize", src, "--check", dst)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["quantize"], "give SRC and DST"),
        (["quantize", "src"], "give SRC and DST"),
        (["quantize", "src", "dst", "--method", "gptq"], "--calibration"),
        (["resolve", "src", "--method", "gptq"], "--calibration"),
        (["quantize", "src", "dst", "--calibration", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_what_is_missing_is_named(src, monkeypatch, tmp_path, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert named in failed(capsys, *arguments)
    assert not (tmp_path / "dst").exists()
