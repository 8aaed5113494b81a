"""The pages: links and anchors resolve, the site builds, and what a page says of the code is
what the code has."""

import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([
    *ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "recipes").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"),
])  # fmt: skip
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Returns the Markdown of a page without its code blocks, whose lines stay as empty ones."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as code hosts and the site make them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, 0) + 1
    return {name if not i else f"{name}-{i}" for name, count in found.items() for i in range(count)}


def broken_links(page: Path) -> list[str]:
    """Returns relative links whose file or anchor does not exist."""
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`: one/two\n[a](page.md#a-title-onetwo) [b](#none) [c](no.md) [d](https://x.y)\n```\n[e](f)\n```\n"
    )
    assert broken_links(page) == ["#none", "no.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_in_lists_are_indented_for_the_site_too(page):
    """Python-Markdown wants four spaces for a block inside of a list, code hosts take fewer."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fence, wrong = False, []
    for before, line in zip(["", *lines], lines):
        shallow = 0 < len(line) - len(line.lstrip()) < 4
        opens = re.match(r" +(```|\||[-*] |\d+\. )", line) or not before.strip()
        wrong += [line] if shallow and opens and not fence else []
        fence ^= bool(re.match(r" *```", line))
    assert wrong == []


GENERATED = re.compile(r"<!-- (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_keeps_the_rules_that_a_program_can_check(page):
    """CONTRIBUTING.md, Prose: lines of 100 outside of tables, no sentence that opens with "Of"."""
    lines = GENERATED.sub("", prose(page)).splitlines()
    text = [line for line in lines if not re.match(r"\s*(\||!\[|<!--)", line)]
    assert [line for line in text if len(line) > 100] == []
    assert [line for line in lines if re.search(r"(^|[.:;!?|] |^\s*[-*] |\*\*)Of [a-z]", line)] == []


TOPS = ("kernels", "qerl_verl", "tests", "benchmarks", "recipes", "docs", "requirements")
PARTS = sorted(path.name for path in (ROOT / "qerl_verl").iterdir() if path.is_dir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_ours_that_a_page_names_exists(page):
    """Paths in backticks from the top of the repository or of the package, and names of result
    files."""
    named = [name for name in re.findall(r"`([\w./-]+\.\w+)(?:::\w+)?`", prose(page)) if "/x/" not in name]
    missing = [
        name for name in named if name.startswith(tuple(f"{top}/" for top in TOPS)) and not (ROOT / name).exists()
    ]
    for name in named:
        if (
            name.startswith(tuple(f"{part}/" for part in PARTS if part not in TOPS))
            and not (ROOT / "qerl_verl" / name).exists()
        ):
            missing.append(name)
        if name.endswith("_cpu.json") or re.search(r"_h[12]00\.json$", name):
            if not list((ROOT / "benchmarks" / "results").rglob(Path(name).name)):
                missing.append(name)
    assert missing == []


def rows(page: str, first: str) -> list[list[str]]:
    """Returns the cells of each row of the first table of a page whose first column has the heading
    ``first``."""
    lines = iter((DOCS / page).read_text(encoding="utf-8").splitlines())
    assert any(line.startswith(f"| {first} |") for line in lines), f"{page} has no table with {first}"
    next(lines)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_page_has_each_metric_that_the_trainer_logs():
    logged = re.findall(r'"(qerl/[a-z_/]+)"', (ROOT / "qerl_verl/trainer/noise.py").read_text(encoding="utf-8"))
    assert {name.strip("`") for name, *_ in rows("metrics.md", "metric")} == set(logged)


def test_the_example_of_the_metrics_is_what_the_runs_of_the_study_logged():
    """Means over the steps of each stage and over the runs with noise."""
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    (heading,) = re.findall(r"^\| stage \| (.+) \|$", page, re.MULTILINE)
    names = [name.strip("`") for name in heading.split(" | ")]
    values: dict[int, list[list[float]]] = {}
    for file in sorted((ROOT / "benchmarks/results/study/metrics").glob("nvfp4_aqn_s*.jsonl")):
        for line in file.read_text().splitlines():
            data = json.loads(line)["data"]
            if "qerl/aqn_stage" in data:
                values.setdefault(int(data["qerl/aqn_stage"]), []).append([data[name] for name in names])
    means = [[str(stage), *(f"{sum(v) / len(v):.3g}" for v in zip(*values[stage]))] for stage in sorted(values)]
    assert rows("metrics.md", "stage") == means


def constant(path: str, name: str) -> ast.expr:
    """Returns the expression of a constant at the top of a module."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == [name]:
            return node.value
    raise AssertionError(f"{path} has no {name}")


def test_the_tables_of_kills_are_those_of_the_tests():
    killed = [row[0] for row in rows("reliability.md", "killed")]
    victims = ast.literal_eval(constant("tests/integration/tiny_job.py", "VICTIMS"))
    assert [text for text in killed if ": `" in text] == [
        f"{name}: `{'python -m ' * (name == 'driver')}{title}`" for name, title in victims.items()
    ]
    cases = constant("tests/integration/test_crash.py", "CASES")
    wanted = []
    for case, outcome in zip(cases.keys, cases.values, strict=True):
        code, named = outcome.elts
        code = "137" if ast.unparse(code) == "-signal.SIGKILL" else str(ast.literal_eval(code))
        names = ", ".join(f"`{name}`" for name in ast.literal_eval(named))
        wanted.append([*ast.literal_eval(case), code, names])
    assert rows("reliability.md", "process") == wanted


def template(node: ast.AST) -> str | None:
    """Returns the text of a string expression, with … for what is put in; None for another
    expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None or right is None else left + right
    return None


def templates(tree: ast.AST) -> Iterator[str]:
    """Returns the strings of a module, docstrings left out, each in one piece."""
    # a docstring, or the text under a constant
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return
    if (text := template(tree)) is not None:
        yield text
        return
    for child in ast.iter_child_nodes(tree):
        yield from templates(child)


def explained() -> list[re.Pattern]:
    """Returns what each row of the page on messages quotes, as a pattern."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`[^|]*\|[^|]+\|[^|]+\|$", page, re.MULTILINE)
    return [re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL) for text in quoted]


def messages(folder: str) -> set[str]:
    files = (ROOT / folder).rglob("*.py")
    return {text for file in files for text in templates(ast.parse(file.read_text(encoding="utf-8")))}


def test_every_message_that_the_page_explains_is_in_the_sources():
    found, patterns = messages("qerl_verl"), explained()
    assert len(patterns) > 100
    assert [p.pattern for p in patterns if not any(p.search(text) for text in found)] == []


NO_REFUSALS = (
    "; `python -m qerl_verl.data.gsm8k",  # behind `there is no such file`
    "Put the tokenizer's files there",  # behind the two messages about tokenizers
    "Ray: joins the cluster at",  # a line about the run
    "null stays, as you wrote it",  # the same
    "stays: LoRA takes a higher rate",  # the same
    "Ray starts the workers with this command",  # the same
    "use +qerl=nvfp4, whose layers hold the adapter",  # the fix of a message about vLLM's LoRA path
)
"""Beginnings or parts of long strings in the checks that are no messages by themselves."""


def test_the_page_explains_every_refusal_before_a_run():
    """A refusal is a sentence: it is long, and a colon or semicolon stands between what, why and
    the fix."""
    refusals = {text for text in messages("qerl_verl/config/checks") if len(text) > 40 and re.search(r"[:;,] ", text)}
    refusals -= {text for text in refusals if any(part in text for part in NO_REFUSALS)}
    patterns = explained()
    assert len(refusals) > 50
    assert [text for text in sorted(refusals) if not any(p.search(text) for p in patterns)] == []


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_migrated_recipe_runs_and_the_switch_sets_what_the_page_says(capsys):
    from qerl_verl.cli.main import main

    commands = [block.replace("\\\n", " ").replace("$HOME", "/home/me") for block in blocks("migrating.md", "bash")]
    before, after = map(shlex.split, commands)
    assert before[:3] == ["python", "-m", "verl.trainer.main_ppo"] and after[3] == "+qerl=nvfp4"
    for overrides in (after[3:], ["+qerl=nvfp4", *before[3:]]):
        code = main(["explain", "ppo_trainer", *overrides, "--platform", "cuda", "--elsewhere"])
        lines = capsys.readouterr().out.splitlines()
        assert code == 0 and lines[-1] == "problems: none"
        (said,) = blocks("migrating.md", "text")
        assert [line for line in said.splitlines() if not any(found.strip().startswith(line) for found in lines)] == []


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_the_first_numbers_of_the_readme_are_those_of_the_result_files():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    step = result("grpo_step_7b_h200.json")["ratio_to_bf16_lora"]["nvfp4_lora"]["timing_s/step"]
    decode = result("rollout_7b_h200.json")["ratio_to_bf16_lora"]["nvfp4_lora"]
    decoding = " / ".join(f"{decode[f'decode {n}']:.2f}" for n in (1, 8, 64, 256))
    peak = result("training_7b_h200.json")["ratios"]["nvfp4 against bf16_peft"]["peak_memory"]
    assert f"(256 + 512 tokens) is {step:.2f} times as fast" in readme
    assert f"decoding is {decoding} times as fast" in readme
    assert f"a LoRA training step of 8192 tokens peaks at {peak:.2f} of PEFT's on bf16" in readme
    index = " ".join((DOCS / "index.md").read_text(encoding="utf-8").split())
    assert f"is {step:.2f} times as fast" in index and f"decoding up to {decode['decode 1']:.2f} times" in index
    assert f"peaks at {peak:.2f} of PEFT's" in index


def navigation() -> list[str]:
    class Loader(yaml.SafeLoader):
        """Without the tags that name Python functions of the Markdown extensions."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    content = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def files(item):
        if isinstance(item, str):
            return [item]
        return [file for value in (item.values() if isinstance(item, dict) else item) for file in files(value)]

    return files(content["nav"])


def test_every_page_is_in_the_navigation_of_the_site_once():
    listed = navigation()
    pages = {page.name for page in DOCS.glob("*.md")} | {"contributing.md", "changelog.md", "paper-recipes.md"}
    assert set(listed) == pages and len(listed) == len(pages)


def mkdocs() -> list[str] | None:
    """Returns the command of an installed mkdocs with its theme: this interpreter's, that of
    ``make docs``, or one on the PATH."""
    if importlib.util.find_spec("mkdocs") and importlib.util.find_spec("material"):
        return [sys.executable, "-m", "mkdocs"]
    found = shutil.which("mkdocs", path=os.pathsep.join([str(ROOT / ".venv-docs" / "bin"), os.environ.get("PATH", "")]))
    return [found] if found else None


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = mkdocs()
    if command is None:
        pytest.skip("mkdocs is not installed: `make docs` installs it into .venv-docs")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    arguments = ["build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path)]
    built = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    assert all((tmp_path / page).with_suffix(".html").is_file() for page in navigation())


CODE = sorted(
    Path(root, name)
    for top in ("qerl_verl", "kernels", "recipes", "tests", "benchmarks", "tools", "docs")
    for root, _, names in os.walk(ROOT / top)
    for name in names
    if name.endswith(".py")
)


def commented(source: str) -> dict[int, str]:
    """Returns number -> text of the lines that hold a docstring, or a comment and nothing else."""
    lines, numbers = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            numbers |= set(range(node.lineno, node.end_lineno + 1))
    numbers |= {i for i, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    return {number: lines[number - 1] for number in sorted(numbers)}


def against_the_rules(lines: dict[int, str]) -> list[tuple[int, str]]:
    """Returns lines that are longer than 100, or open a sentence with "Of". Commands are code."""
    return [
        (number, line)
        for number, line in lines.items()
        if (len(line) > 100 and not re.match(r"\s+python ", line)) or re.search(r'(^|[.:;!?] |"""|# )Of [a-z]', line)
    ]


def test_comments_and_docstrings_keep_the_rules_that_a_program_can_check():
    found = {path: against_the_rules(commented(path.read_text(encoding="utf-8"))) for path in CODE}
    assert len(CODE) > 200 and {str(p.relative_to(ROOT)): lines for p, lines in found.items() if lines} == {}


def test_what_breaks_the_rules_of_prose_is_found():
    source = (
        f'"""{"a" * 98}"""\n# Of these, one.\nx = 1\n    # fine\n\ndef f():\n    """Of the\n    python {"b" * 99}"""\n'
    )
    assert [number for number, _ in against_the_rules(commented(source.replace("    # fine\n", "")))] == [1, 2, 6]
