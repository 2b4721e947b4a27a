"""What --overwrite may replace, by what proof, and that the run of before is there until the new one is finished."""

import errno
import json
import os
import pathlib

import pytest

from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run import model_card, replacing, run_folder, run_start
from pats_jax.run.settings import Settings

RESULTS = {
    "model_name_or_path": "tiny",
    "data": "rte",
    "method": "pats",
    "seed": 3,
    "num_labels": 2,
    "versions": {"python": "3.11"},
}
WRITTEN = """
metrics.jsonl results.json.new model/config.json model/model.safetensors model/tokenizer.json model/vocab.txt
adapter/adapter_config.json adapter/adapter_model.safetensors adapter/config.json adapter/tokenizer_config.json
.model-1a2b3c4d/model.safetensors plots/loss.png plots/sensitivity.png.new predictions/MNLI-mm.tsv predictions/test.tsv
predictions/probabilities/MNLI-mm.tsv diagnosis/classes.tsv diagnosis/largest_losses.tsv plots/confusion.png
tensorboard/events.out.tfevents.1795713147.host profile/plugins/profile/2026_11_26/host.trace.json.gz
checkpoints/12/_CHECKPOINT_METADATA checkpoints/12/state/d/ff472730927114ae8d87f3a4d35529ca
checkpoints/12/state/ocdbt.process_0/manifest.ocdbt checkpoints/12/state/array_metadatas/process_0
checkpoints/12/progress/metadata checkpoints/16.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/manifest.ocdbt.__lock
""".split()


def write_run(folder, seed=1, finished=True, kind=Settings):
    """A run's folder with something of everything that runs write."""
    task = {"task_name": "sst2"} if kind is Settings else {}
    run_folder.start(folder, kind(seed=seed, output_dir=str(folder), **task).to_dict())
    for name in WRITTEN:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{seed}")
    model_card.write_fine_tuned(folder, {}, RESULTS)
    if finished:
        run_folder.write_results(folder, RESULTS | {"seed": seed})
    return folder


def tree(folder):
    """Every path below a folder with what it holds."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def seed_of(folder):
    return json.loads((folder / "config.json").read_text())["seed"]


def begin(folder, seed=9, **changes):
    given = {"task_name": "sst2", "overwrite": "resume" not in changes, "output_dir": str(folder)}
    return run_start.begin(Settings(**given | {"seed": seed} | changes), "", None)


def refuses(folder, **changes):
    """One line, and nothing is touched, neither in the folder nor beside it."""
    before = tree(folder.parent)
    with pytest.raises(InputError) as caught, begin(folder, **changes) as start:
        start.open_folder()
    assert "\n" not in str(caught.value) and tree(folder.parent) == before
    return str(caught.value)


# what may be replaced


def test_all_that_runs_write_may_be_replaced(tmp_path):
    for kind in (Settings, PrimingSettings):
        folder = write_run(tmp_path / kind.__name__, kind=kind)
        assert len(tree(folder)) > len(WRITTEN) and replacing.foreign(folder) is None
        replacing.check(folder)


@pytest.mark.parametrize(
    "name",
    """README.md model/thesis.txt model/old/config.json thesis.tex .DS_Store .git/HEAD plots/mine.png
    diagnosis/notes.tsv predictions/notes.tsv checkpoints/notes.txt checkpoints/12/notes.txt checkpoints/mine/metadata
    tensorboard/notes.txt profile/notes.txt notes/ model/notes/""".split(),
)
def test_what_no_run_wrote_is_never_lost(name, tmp_path):
    folder = write_run(tmp_path / "run")
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("# Years of work\n")
    message = refuses(folder)
    assert message.startswith(f"--output_dir {folder}: --overwrite would delete {name.split('/')[0]}"), message


def test_links_and_pipes_are_no_files_of_a_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for number, make in enumerate((lambda path: path.symlink_to(tmp_path / "elsewhere"), os.mkfifo)):
        folder = write_run(tmp_path / str(number))
        (folder / "model" / "model.safetensors").unlink()
        make(folder / "model" / "model.safetensors")
        with pytest.raises(InputError, match=r"would delete model/model\.safetensors, which no run wrote"):
            replacing.check(folder)


@pytest.mark.parametrize("config", [None, {"model_type": "bert", "_name_or_path": "x", "seed": 1}, [], "half"])
def test_a_folder_without_a_runs_config_is_no_run(config, tmp_path):
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    (folder / "README.md").write_text("# Mine\n")
    (folder / "model" / "thesis.txt").write_text("years of work")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config)[: 3 if config == "half" else None])
    assert "which no run wrote: the folder has no config.json of a run" in refuses(folder)


def test_a_link_a_mount_and_the_folder_one_is_in_are_not_renamed(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    assert f"--overwrite cannot replace a link; use its target, {folder}" in refuses(tmp_path / "link")
    monkeypatch.chdir(folder / "model")
    assert "cannot replace the current folder" in refuses(folder)
    monkeypatch.chdir(tmp_path)

    def busy(self, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(pathlib.Path, "rename", busy)
    assert refuses(folder) == f"--output_dir {folder}: --overwrite cannot rename it (Device or resource busy)"


# the run of before


def test_the_run_of_before_is_there_until_the_new_one_is_finished(tmp_path, caplog):
    caplog.set_level("INFO")
    folder, previous = write_run(tmp_path / "run", 1), tmp_path / "run.previous"
    was = tree(folder)
    with begin(folder, 2) as start:
        assert tree(folder) == was, "nothing is touched before the input is found right"
        start.open_folder()
        assert f"the previous run is kept as {previous} until this one is finished" in caplog.text
        assert was.items() <= tree(previous).items() and seed_of(folder) == 2
        assert {path.name for path in folder.iterdir()} == {"config.json", ".lock"}
        start.finish(RESULTS)
        assert not previous.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "results.json"}


def test_a_resumed_run_removes_it_too(tmp_path):
    folder = write_run(tmp_path / "run", 1)
    with begin(folder, 2) as start:
        start.open_folder()
    assert (tmp_path / "run.previous").exists()
    with begin(folder, 2, resume=True) as start:
        start.open_folder()
        assert (tmp_path / "run.previous").exists()
        start.finish(RESULTS)
    assert not (tmp_path / "run.previous").exists()


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_oldest_finished_run_is_kept(first, second, tmp_path):
    """Runs 1 and 2, finished or not, are replaced one after the other; the first is kept if it alone is finished."""
    kept = 1 if first and not second else 2
    folder, previous = write_run(tmp_path / "run", 1, finished=first), tmp_path / "run.previous"
    with begin(folder, 2) as start:
        start.open_folder()
    if second:
        run_folder.write_results(folder, RESULTS)  # and the run was killed before it could remove the first
    with begin(folder, 3) as start:
        start.open_folder()
        assert (seed_of(folder), seed_of(previous)) == (3, kept)
        assert {path.name for path in folder.iterdir()} == {"config.json", ".lock"}
        assert (previous / "results.json").exists() == (first if kept == 1 else second)


def test_a_folder_of_that_name_which_overwrite_did_not_make_is_left_alone(tmp_path):
    folder, mine = write_run(tmp_path / "run"), write_run(tmp_path / "run.previous", 5)
    assert f"--overwrite needs the name {mine}, which is already in use" in refuses(folder)
    (folder / "results.json").unlink()
    with begin(folder, 1, resume=True) as start:
        start.open_folder()
        start.finish(RESULTS)
    assert seed_of(mine) == 5 and (mine / "results.json").exists()


def test_the_run_of_before_is_ones_own_again_once_the_new_one_is_deleted(tmp_path):
    folder, previous = write_run(tmp_path / "run", 1), tmp_path / "run.previous"
    with begin(folder, 2) as start:
        start.open_folder()
    (folder / "config.json").unlink()
    folder.rmdir()
    with begin(folder, 3, overwrite=False) as start:
        start.open_folder()
        start.finish(RESULTS)
    assert seed_of(previous) == 1


def test_what_was_added_to_the_run_of_before_is_not_lost(tmp_path, caplog):
    folder, previous = write_run(tmp_path / "run", 1), tmp_path / "run.previous"
    with begin(folder, 2) as start:
        start.open_folder()
        (previous / "thesis.txt").write_text("years of work")
        start.finish(RESULTS)
    assert (previous / "thesis.txt").exists() and "run.previous: no run wrote thesis.txt" in caplog.text
    assert "run.previous, which is already in use" in refuses(folder)


def test_a_new_run_that_cannot_begin_leaves_the_old_one_in_place(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")

    def full(path, value):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(files, "write_json", full)
    assert "No space left on device" in refuses(folder)


# what is read


@pytest.mark.parametrize(
    "flag, place",
    [
        ("model_name_or_path", "model"),
        ("data_dir", ""),
        ("out_of_domain_dir", "predictions"),
        ("train_file", "predictions/test.tsv"),
        ("validation_file", "predictions/test.tsv"),
        ("test_file", "predictions/test.tsv"),
    ],
)
@pytest.mark.parametrize("by_link", [False, True])
def test_input_inside_the_folder_that_is_replaced(flag, place, by_link, tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / place
    if by_link:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    own_data = {"task_name": None, "train_file": "x"} if flag.endswith("_file") else {}
    message = refuses(folder, **own_data | {flag: str(path)})
    assert message == f"--{flag} {path}: is in {folder}, which --overwrite replaces; choose another --output_dir"


def test_what_an_input_only_refers_to(tmp_path):
    folder = write_run(tmp_path / "run")
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir()
    (model / "model.safetensors").symlink_to(folder / "model" / "model.safetensors")
    assert f"--model_name_or_path {model}: is in {folder}" in refuses(folder, model_name_or_path=str(model))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder / "model")}))
    message = refuses(folder, model_name_or_path=str(adapter))
    assert f"--model_name_or_path {adapter}: its base model {folder / 'model'}: is in {folder}" in message


def test_input_inside_the_run_of_before(tmp_path):
    folder, previous = write_run(tmp_path / "run", 1), tmp_path / "run.previous"
    with begin(folder, 2) as start:
        start.open_folder()
    message = refuses(folder, model_name_or_path=str(previous / "model"))
    assert f"is in {previous}, which --overwrite replaces" in message


def test_a_partition_to_prime_by(tmp_path):
    folder = write_run(tmp_path / "run", kind=PrimingSettings)
    path = folder / "predictions" / "test.tsv"
    settings = PrimingSettings(output_dir=str(folder), overwrite=True, partition=str(path))
    with pytest.raises(InputError, match=f"--partition {path}: is in"):
        run_start.begin(settings, "", None)


# links


@pytest.mark.parametrize("name", ["plots", "model", "checkpoints/12", "predictions/test.tsv"])
def test_a_planted_link_is_refused_before_a_run_goes_on(name, tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    message = refuses(folder, seed=1, resume=True)
    assert message == f"{folder / name}: this link leads out of {folder}; remove it"


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "mine.new").write_text("")
    (folder / ".model-12345678-old").mkdir()
    (folder / ".model-12345678-old" / "thesis.txt").write_text("years of work")
    before = tree(folder).keys()
    run_folder.remove_leftovers(folder)
    gone = {str(path) for path in before - tree(folder).keys()}
    assert gone == {"results.json.new", ".model-1a2b3c4d", ".model-1a2b3c4d/model.safetensors"}
