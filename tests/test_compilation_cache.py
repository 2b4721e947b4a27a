"""The cache of compiled programs: where it is, who may write there, and that trouble with it stops nobody."""

import logging
import os
import pathlib
import subprocess
import sys

import filelock
import jax
import pytest

from pats_jax.errors import InputError
from pats_jax.run import compilation_cache
from pats_jax.run.compilation_cache import keep_compiled_programs


@pytest.fixture
def updates(monkeypatch, tmp_path):
    """What is set in JAX, which has been told of no folder; the user's cache folder is a new one."""
    chosen = {}
    monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return chosen


def test_a_given_folder_is_made_private(tmp_path, updates):
    keep_compiled_programs(str(tmp_path / "a" / "cache"))
    assert updates == {
        "jax_compilation_cache_dir": str(tmp_path / "a" / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("variable, value", [("XDG_CACHE_HOME", "{}/home"), ("HOME", "{}"), ("XDG_CACHE_HOME", "home")])
def test_by_default_it_is_the_users_own_bounded_and_private(variable, value, tmp_path, updates, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, value.format(tmp_path))
    base = tmp_path / "home" if value == "{}/home" else tmp_path / ".cache"  # a relative one is void
    keep_compiled_programs(None)
    folder = base / "pats_jax" / "compilation"
    assert updates["jax_compilation_cache_dir"] == str(folder)
    assert 2**30 < updates["jax_compilation_cache_max_size"] < 2**34
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_jax_was_told_of_is_kept(updates, monkeypatch, tmp_path):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "mine")
    keep_compiled_programs(None)
    assert not updates and not (tmp_path / "home").exists()


def test_none_turns_it_off(updates, tmp_path):
    keep_compiled_programs("none")
    assert updates == {"jax_enable_compilation_cache": False} and not (tmp_path / "home").exists()


def file_in_the_way(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def others_can_write(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)


@pytest.mark.parametrize("trouble", [file_in_the_way, others_can_write])
def test_trouble_with_the_users_folder_is_a_warning_and_with_a_given_one_an_error(trouble, updates, tmp_path, caplog):
    trouble(compilation_cache.user_folder())
    with caplog.at_level(logging.WARNING):
        keep_compiled_programs(None)
    assert "compiled programs are not kept" in caplog.text and not updates
    trouble(tmp_path / "given" / "cache")
    with pytest.raises(InputError, match="^--compilation_cache_dir"):
        keep_compiled_programs(str(tmp_path / "given" / "cache"))


@pytest.mark.parametrize("trouble", ["read-only", "locked", "no home"])
def test_other_trouble_with_the_users_folder(trouble, updates, caplog, monkeypatch):
    folder = compilation_cache.user_folder()
    folder.mkdir(parents=True, mode=0o700)
    if trouble == "read-only":  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    elif trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setattr(filelock, "FileLock", lambda path, timeout: (_ for _ in ()).throw(filelock.Timeout(path)))
    with caplog.at_level(logging.WARNING):
        keep_compiled_programs(None)
    assert "compiled programs are not kept" in caplog.text and not updates


def test_half_written_programs_are_removed_and_whole_ones_kept(updates):
    folder = compilation_cache.user_folder()
    folder.mkdir(parents=True, mode=0o700)
    for name in ("whole-cache", "whole-atime", "half-cache", "empty-cache"):
        (folder / name).write_bytes(b"12345678")
    (folder / "empty-atime").write_bytes(b"")
    keep_compiled_programs(None)
    assert {path.name for path in folder.glob("*-cache")} == {"whole-cache"}


PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
from pats_jax.run.compilation_cache import keep_compiled_programs
keep_compiled_programs(*sys.argv[1:] or [None])
import jax, jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
print(float(jax.jit(lambda x: x * 3 + 1)(2.0)), sum(hits))
"""


def compile_and_say(*arguments, home):
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_programs_are_found_again_within_the_bound_and_after_a_killed_writer(tmp_path):
    """With JAX's own bounded cache in processes of their own; warnings, such as those of half-written ones, fail."""
    assert compile_and_say(home=tmp_path)[0] == ["7.0", "0"]
    assert compile_and_say(home=tmp_path)[0] == ["7.0", "1"]
    folder = tmp_path / "pats_jax" / "compilation"
    (written,) = folder.glob("*-cache")
    written.write_bytes(written.read_bytes()[:20])
    written.with_name(written.name.replace("-cache", "-atime")).unlink()
    assert compile_and_say(home=tmp_path)[0] == ["7.0", "0"]
    assert compile_and_say(home=tmp_path)[0] == ["7.0", "1"]
    assert compile_and_say("none", home=tmp_path)[0] == ["7.0", "0"]


def test_importing_chooses_no_folder(tmp_path):
    program = "import jax, pats_jax.glue, pats_jax.priming; print(jax.config.jax_compilation_cache_dir)"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n" and not (tmp_path / "pats_jax").exists()
