"""What the documents show can be run: every command line is one that its command takes, every config one that loads."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afa_jax.cli.commands import load_config
from afa_jax.config.method_options import OPTIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(python -m afa_jax\.[^`]+)`")


class Parsed(Exception):
    """A command has parsed its arguments."""


def commands() -> Iterator[str]:
    """The command lines of all documents, from blocks and from sentences."""
    for document in DOCUMENTS:
        text = document.read_text()
        for language, block in BLOCK.findall(text):
            if language in ("", "sh", "bash"):
                lines = block.replace("\\\n", " ").splitlines()
                yield from (line for line in lines if line.startswith("python -m afa_jax."))
        for inline in INLINE.findall(BLOCK.sub("", text)):
            if " -" in inline.removeprefix("python -m "):
                yield " ".join(inline.split())


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_a_command_line_is_one_that_its_command_takes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def parsed(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        raise Parsed(*parse(parser, *arguments, **options))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    _, _, module, *arguments = shlex.split(re.sub(r"[\[\]]", "", line), comments=True)  # [--what may be left out]
    package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    with pytest.raises(Parsed) as ended:
        main(arguments)
    options, rest = ended.value.args
    assert all(argument.startswith("--config.") for argument in rest), rest
    monkeypatch.chdir(ROOT)
    if config := getattr(options, "config", None):
        load_config(config, [argument.removeprefix("--config.") for argument in rest])


LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=str)
def test_links_lead_to_files(document: Path) -> None:
    for target, _ in LINK.findall(BLOCK.sub("", document.read_text())):
        assert "://" in target or (document.parent / target).exists(), target


PATH = re.compile(r"`((?:afa_jax|benchmarks|configs|examples|launch|scripts|tests)/[\w./]+)(?::\w+)?`")


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=str)
def test_files_that_are_named_are_there(document: Path) -> None:
    for path in PATH.findall(document.read_text()):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_the_table_of_methods_has_every_kind_with_its_options() -> None:
    section = (ROOT / "docs" / "compare.md").read_text().split("\n## ")[1]
    rows = re.findall(r"^\| `([\w:]+)` \|([^|]*)\|", section, re.MULTILINE)
    shown = {kind.removesuffix(":NAME"): set(re.findall(r"`(\w+)", options)) for kind, options in rows}
    assert shown.keys() == OPTIONS.keys()
    for kind, options in OPTIONS.items():
        assert shown[kind] >= (options or {}).keys() - {"expert"}, kind


def test_every_page_is_in_the_site() -> None:
    pages = re.findall(r"([\w/]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = [path.relative_to(ROOT / "docs") for kind in ("md", "ipynb") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    assert sorted(pages) == sorted(map(str, there))


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    for name in shown:
        pkgutil.resolve_name(name)
    for table in (ROOT / "afa_jax").rglob("__init__.pyi"):
        package = ".".join(table.parent.relative_to(ROOT).parts)
        for module, name in re.findall(r"^from (\S+) import (\w+)", table.read_text(), re.MULTILINE):
            source = package + module
            is_package = (ROOT / source.replace(".", "/")).is_dir()  # it has a table of its own
            assert is_package or {source, f"{source}.{name}"} & shown, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_the_configs_that_are_shown_load(tmp_path: Path) -> None:
    shown = 0
    for document in DOCUMENTS:
        for language, block in BLOCK.findall(document.read_text()):
            if language == "python" and "def get_config" in block:
                shown += 1
                (tmp_path / f"shown{shown}.py").write_text(block)
                config = load_config(str(tmp_path / f"shown{shown}.py"))
                assert config.experts and config.train.steps and config.sample.size
            elif language == "python":
                compile(block, str(document), "exec")
    assert shown
