"""Going on only if there is something to go on with."""

import argparse
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from afa_jax.cli.arguments import add_workdir_arguments, check_workdir_arguments
from afa_jax.errors import InputError
from afa_jax.training.workdir import keep_config, open_workdir, resume_if_any


def options(workdir: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_workdir_arguments(parser)
    parsed = parser.parse_args([f"--workdir={workdir}", *arguments])
    check_workdir_arguments(parsed)
    resume_if_any(parsed)
    return parsed


def test_a_run_is_continued_if_there_is_one_and_started_if_not(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    assert not options(workdir, "--resume_if_any").resume
    open_workdir(workdir, resume=False, overwrite=False)
    assert not options(workdir, "--resume_if_any").resume  # killed before there was a config
    keep_config(workdir, ConfigDict(dict(name="first")))
    assert options(workdir, "--resume_if_any").resume and not options(workdir).resume
    keep_config(workdir, ConfigDict(dict(name="other")))
    assert "other" in (workdir / "config.json").read_text()
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    keep_config(workdir, ConfigDict(dict(name="last")))
    assert "other" in (workdir / "config.json").read_text()


@pytest.mark.parametrize("other", ["--resume", "--resume_step=3", "--overwrite"])
def test_one_way_to_treat_what_is_there_is_chosen(tmp_path: Path, other: str) -> None:
    with pytest.raises(InputError, match=f"--resume_if_any and .*{other.partition('=')[0]}.* exclude each other"):
        options(tmp_path, "--resume_if_any", other)
