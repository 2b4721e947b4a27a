"""What is published: metadata, README as a page of its own, and a wheel that works in a new environment."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import tiny

import pats_jax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
ADDRESS = "https://example.org/us/pats_jax"
TARGETS = re.compile(r"\]\(([^()\s]+)\)")


@pytest.fixture(scope="module")
def hook():
    pytest.importorskip("hatchling", reason="hatch_build.py needs hatchling: pip install .[test]")
    return load_hook()


def load_hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_opens_with_the_two_commands_and_pip_beside_them():
    lines = README.splitlines()
    assert lines[3].startswith("make demo ") and lines[4].startswith("make test ")
    assert lines[7].startswith("`pip install pats-jax`")


def test_without_an_address_the_page_has_no_link_to_a_file(hook):
    page = hook.package_page(README, "", "v1")
    assert all(re.match("https?:", target) for target in TARGETS.findall(page))
    assert "<!--" not in page and "![" not in page and "docs/pats.md has the rule" in page
    assert page.splitlines()[3].startswith("make demo ")
    assert hook.urls("", "v1") == {}


def test_with_an_address_every_link_is_absolute_and_leads_to_a_file(hook):
    page = hook.package_page(README, ADDRESS, "v1")
    targets = [target for target in TARGETS.findall(page) if target.startswith(ADDRESS)]
    relative = [target for target in TARGETS.findall(README) if not re.match(r"\w+:", target)]
    assert len(targets) == len(relative) > 10 and "![What the demo shows" in page
    assert all(re.match("https?:", target) for target in TARGETS.findall(page))
    for target, own in zip(targets, relative, strict=True):
        assert target in (f"{ADDRESS}/blob/v1/{own}", f"{ADDRESS}/raw/v1/{own}")
        assert (ROOT / own.partition("#")[0]).exists()
    assert f"]({ADDRESS}/raw/v1/docs/images/demo.png)" in page
    assert set(hook.urls(ADDRESS, "v1")) == {"Source", "Issues", "Changelog", "Documentation"}


def test_the_hook_gives_the_version_of_the_package(hook):
    assert hook.version_of(ROOT) == pats_jax.__version__
    metadata = {}
    hook.CustomMetadataHook(str(ROOT), {}).update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown" and metadata["readme"]["text"].startswith("# pats_jax")
    assert bool(metadata["urls"]) == bool(PYPROJECT["tool"]["pats-jax"]["repository"])


def test_versions_of_python_are_the_same_everywhere():
    stated = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert stated == re.findall(r'"(3\.\d+)"', re.search(r"matrix: .*", workflow)[0])
    assert PROJECT["requires-python"] == f">={stated[0]}"


def test_all_extras_are_in_one_table_of_the_docs():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    table = page.split("### Extras")[1].split("\n## ")[0]
    named = [name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall("`(.+?)`", row)]
    assert sorted(named[1:]) == sorted(PROJECT["optional-dependencies"])


def test_everything_that_is_imported_is_declared():
    import ast

    names = {
        name.split(".")[0]
        for path in (ROOT / "pats_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    distributions = {
        "sklearn": "scikit-learn",
        "orbax": "orbax-checkpoint",
        "jaxlib": "jax",
        "markdown_it": "markdown-it-py",
    }
    extras = PROJECT["optional-dependencies"]
    everything = PROJECT["dependencies"] + extras["tensorboard"] + extras["gym"] + extras["text2text"]
    declared = {re.split(r"[\[><=]", one)[0].lower().replace("-", "_") for one in everything}
    used = {distributions.get(name, name).lower().replace("-", "_") for name in names - sys.stdlib_module_names}
    assert used - declared == {"pats_jax"}


# built and installed


def run(*command, **options):
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_in_a_new_environment(tmp_path):
    tools, user = tmp_path / "tools", tmp_path / "user"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    options = {"cwd": tmp_path, "env": clean}
    for folder in (tools, user):
        run(sys.executable, "-m", "venv", folder, **options)
    pip = ("bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(tools / pip[0], *pip[1:], *PROJECT["optional-dependencies"]["package"], **options)
    run(tools / "bin/python", "-m", "build", "--outdir", tmp_path / "dist", ROOT, **options)
    files = list((tmp_path / "dist").iterdir())
    assert sorted(path.suffix for path in files) == [".gz", ".whl"]
    run(tools / "bin/python", "-m", "twine", "check", "--strict", *files, **options)

    run(user / pip[0], *pip[1:], next(path for path in files if path.suffix == ".whl"), **options)
    here = tmp_path / "here"
    tiny.save_checkpoint(here / "model")
    texts, labels = tiny.sentences(24, 0)
    tiny.write_table(here / "train.csv", ("text", "label"), *zip(texts, labels, strict=True), separator=",")
    (here / "texts.txt").write_text("\n".join(texts))
    options["cwd"] = here
    program = user / "bin/pats-jax"
    assert run(program, "--version", **options) == run(user / "bin/python", "-m", "pats_jax", "--version", **options)
    flags = {"model_name_or_path": "model", "train_file": "train.csv", "max_seq_length": 16, "output_dir": "run"}
    run(program, "train", *tiny.flags(**flags, per_device_train_batch_size=8, num_train_epochs=2), **options)
    lines = run(program, "predict", "run", "--file", "texts.txt", **options).splitlines()
    assert lines[0].split("\t") == ["index", "prediction", "0", "1", "sentence1"] and len(lines) == 25
