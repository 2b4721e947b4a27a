"""`pats-jax text2text`: a run and its folder, what it reads and refuses, and its training against a loop by hand."""

import ast
import csv
import dataclasses
import json
import logging
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_seq2seq
from safetensors.numpy import load_file
from test_resume import lines, results, signal_at

import pats_jax
from pats_jax import methods, models
from pats_jax.data import epoch_plan
from pats_jax.data.columns import PairColumns
from pats_jax.data.text_pairs import load_pair_files, load_pair_set
from pats_jax.errors import InputError
from pats_jax.methods.paths import ATTENTION, LAYERS, MATRICES
from pats_jax.models.bart import Bart
from pats_jax.programs import cli, text2text
from pats_jax.run import flags, model_card
from pats_jax.run.text2text_settings import Text2TextSettings

QUICK = {
    "max_source_length": 8,
    "max_target_length": 6,
    "learning_rate": 1e-2,
    "num_devices": 1,
    "length_buckets": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "save_steps": 0,
    "sensitivity_batches": 0,
}
ROWS = tiny_seq2seq.pairs(16, 0)
DEV = tiny_seq2seq.pairs(5, 1)
NEW = [("ant bee", 'a "quoted"\ttarget'), ("cat", "cat"), ("dog eel fox", "gnu")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Checkpoints, and tables of sources and targets."""
    home = tmp_path_factory.mktemp("home")
    tiny_seq2seq.save_checkpoint(home / "t5", "t5")
    tiny_seq2seq.save_checkpoint(home / "bart", "bart")
    tiny.save_checkpoint(home / "encoder")
    tiny_seq2seq.write_pairs(home / "train.tsv", ROWS)
    tiny_seq2seq.write_pairs(home / "dev.tsv", DEV)
    tiny.write_lines(home / "new.jsonl", [{"id": f"n{i}", "source": s, "target": t} for i, (s, t) in enumerate(NEW)])
    return home


def given(home, **changes):
    files = {name: home / f"{short}.tsv" for name, short in (("train_file", "train"), ("validation_file", "dev"))}
    return QUICK | files | {"model_name_or_path": home / "t5"} | changes


def run(home, folder, **changes):
    cli.main(["text2text", *tiny.flags(**given(home, **changes), output_dir=folder)])
    return folder


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(home):
    """A run of a few steps that predicts."""
    return run(home, home / "run", test_file=home / "new.jsonl", source_prefix="cat ")


# a run


def generated(folder, sources):
    """What a saved model writes, a source at a time, by the files alone."""
    model, params, _ = models.from_pretrained_seq2seq(folder)
    tokenizer, settings = models.load_tokenizer(folder), models.GenerationConfig.from_pretrained(folder)
    generate = jax.jit(models.make_generate_step(model, settings))
    encoded = tokenizer(sources, padding="max_length", max_length=QUICK["max_source_length"], truncation=True)
    batch = {name: np.array(encoded[name]) for name in ("input_ids", "attention_mask")}
    known = [[token for token in row if token < len(tokenizer)] for row in generate(params, batch).sequences[:, 0]]
    return [text.strip() for text in tokenizer.batch_decode(known, skip_special_tokens=True)]


def test_predictions_are_what_the_saved_model_writes(finished):
    with open(finished / "predictions" / "test.tsv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    assert header == ["id", "prediction", "reference"]
    texts = generated(finished / "model", [f"cat {source}" for source, _ in NEW])
    escaped = [target.replace("\t", r"\t") for _, target in NEW]
    assert rows == [list(row) for row in zip(("n0", "n1", "n2"), texts, escaped, strict=True)]
    assert any(texts)


@pytest.mark.parity
def test_transformers_writes_the_same(finished):
    """By the files of the run alone: model, tokenizer and settings of generation."""
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(finished / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    with open(finished / "predictions" / "test.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for (source, _), row in zip(NEW, rows, strict=True):
        encoded = tokenizer([f"cat {source}"], truncation=True, return_tensors="pt")
        tokens = [token for token in model.generate(**encoded)[0].tolist() if token < len(tokenizer)]
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == row["prediction"]


def test_its_folder_says_what_was_done(finished, home):
    found = json.loads((finished / "results.json").read_text())
    assert found["steps"] == 3 and found["eval_examples"] == 5 and found["test"]["examples"] == 3
    assert found["final"]["metrics"].keys() == {"exact_match", "token_f1"} and found["main_metric"] == "exact_match"
    assert found["generation"]["max_new_tokens"] == 6 and found["pipeline_tag"] == "text2text-generation"
    for name in ("loss", "score"):
        assert (finished / "plots" / f"{name}.png").exists()
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card and "Trained by `pats-jax text2text`" in card
    assert "from_pretrained_seq2seq" in card and "AutoModelForSeq2SeqLM" in card and "'cat A text.'" in card
    again = flags.parse(["--config", str(finished / "config.json")], "pats-jax text2text", Text2TextSettings)
    assert json.loads(json.dumps(again.to_dict())) == json.loads((finished / "config.json").read_text())
    paths = [flag for flag, entry in again.all_entries().items() if entry.about.is_path]
    public = model_card.for_hub("me/mine", again.to_dict(), found, again.defaults(), whole=True, paths=paths)
    assert "from_pretrained_seq2seq('me/mine')" in public and str(home) not in public
    run(home, finished, test_file=home / "new.jsonl", source_prefix="cat ", resume=True)  # it has ended
    assert json.loads((finished / "results.json").read_text()) == found


def test_training_is_that_of_a_loop_by_hand(home, finished):
    """Batches padded by hand, Optax's own AdamW, and `make_seq2seq_loss_fn`."""
    model, params, _ = models.from_pretrained_seq2seq(home / "t5")
    tokenizer = models.load_tokenizer(home / "t5")
    sources = tokenizer([f"cat {source}" for source, _ in ROWS])["input_ids"]
    targets = tokenizer([target for _, target in ROWS])["input_ids"]
    lengths = np.array([len(ids) for ids in sources])
    longest = lengths.max(), max(map(len, targets))
    plan = [rows for epoch in (0, 1) for rows, _ in epoch_plan(lengths, 8, [longest[0]], seed=42, epoch=epoch)][:3]
    schedule = optax.join_schedules([optax.linear_schedule(0, 1e-2, 1), optax.linear_schedule(1e-2, 0, 2)], [1])
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    adamw = optax.adamw(schedule, 0.9, 0.999, 1e-8, weight_decay=0.01, mask=mask)
    tx = pats_jax.with_raw_gradient(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    state = pats_jax.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=0)
    step = jax.jit(pats_jax.make_train_step(pats_jax.make_seq2seq_loss_fn(model.apply)))
    for rows in plan:
        batch = {"input_ids": np.zeros((8, longest[0]), int), "labels": np.full((8, longest[1]), -100)}
        for place, row in enumerate(rows):
            batch["input_ids"][place, : len(sources[row])] = sources[row]
            batch["labels"][place, : len(targets[row])] = targets[row]
        batch["attention_mask"] = (batch["input_ids"] != 0).astype(int)
        state, _ = step(state, batch)
    models.save_pretrained(home / "by-hand", params=state.params, config=model.config)
    ours, theirs = weights(finished), load_file(home / "by-hand" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    start = load_file(home / "t5" / "model.safetensors")
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)
        assert np.abs(value - start[name]).max() > 2e-3 or name.startswith("decoder.block.0.layer.0"), name


# data


def test_every_form_of_a_table_gives_the_same_pairs(tmp_path):
    rows = [("ann, bob", "one"), ('a "b"', "two\ttabs"), ("", "three")]
    records = [{"source": source, "target": target} for source, target in rows]
    tiny.write_lines(tmp_path / "own.jsonl", records)
    (tmp_path / "own.json").write_text(json.dumps(records))
    import datasets

    datasets.Dataset.from_list(records).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    shutil.copy(tmp_path / "set" / "train-00000-of-00001.parquet", tmp_path / "own.parquet")
    with open(tmp_path / "own.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("source", "target"), *rows])
    found = [load_pair_files({"train": tmp_path / f"own.{end}"}, PairColumns()) for end in ("jsonl", "json", "csv")]
    found += [load_pair_files({"train": tmp_path / "own.parquet"}, PairColumns("source", "target"))]
    found += [load_pair_set(str(tmp_path / "set"), None, ["train", "validation"], PairColumns())]
    for splits in found:
        assert splits.keys() == {"train"}  # the set's validation rows are to be held out
        assert list(zip(splits["train"].sources, splits["train"].targets, strict=True)) == rows
        assert splits["train"].ids == ["0", "1", "2"]


@pytest.mark.parametrize("names", [("document", "summary"), ("question", "answer"), ("article", "highlights")])
def test_columns_are_found_by_name(tmp_path, names):
    path = tiny_seq2seq.write_pairs(tmp_path / "own.tsv", [("a", "b")], names)
    test = tiny.write_table(tmp_path / "test.tsv", (names[0],), ("c",))
    lines = tmp_path / "new.txt"
    lines.write_text("d\ne f\n")
    found = load_pair_files({"train": path, "test": test}, PairColumns())
    assert (found["train"].sources, found["train"].targets) == (["a"], ["b"])
    assert (found["test"].sources, found["test"].targets) == (["c"], None)
    assert load_pair_files({"test": lines}, PairColumns())["test"].sources == ["d", "e f"]


def test_a_column_may_be_a_field_of_another(tmp_path):
    records = [{"id": i, "translation": {"en": f"word {i}", "de": f"Wort {i}"}} for i in range(3)]
    tiny.write_lines(tmp_path / "own.jsonl", records)
    import datasets

    datasets.Dataset.from_list(records).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    columns = PairColumns("translation.en", "translation.de")
    read = load_pair_files({"train": tmp_path / "own.jsonl"}, columns)["train"]
    assert read.sources == ["word 0", "word 1", "word 2"] and read.targets == ["Wort 0", "Wort 1", "Wort 2"]
    assert load_pair_set(str(tmp_path / "set"), None, ["train"], columns)["train"] == read
    with pytest.raises(InputError, match="target_column: no column 'translation.fr' among 'id', 'translation'"):
        load_pair_files({"train": tmp_path / "own.jsonl"}, PairColumns("translation.en", "translation.fr"))


def test_rows_are_held_out_and_two_names_of_a_column_are_one(home, caplog):
    caplog.set_level(logging.INFO, "pats_jax")
    path = tiny_seq2seq.write_pairs(home / "pages.tsv", ROWS, ("page", "abstract"))
    names = {"text_column": "page", "summary_column": "abstract"}
    settings = settings_of(home, train_file=path, validation_file=None, validation_split_percentage=25, **names)
    splits = text2text.load_data(settings)
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "validation": 4}
    assert sorted(splits["train"].sources + splits["validation"].sources) == sorted(source for source, _ in ROWS)
    assert "4 of 16 rows (25 %) are held out for validation, at random, drawn with seed 42" in caplog.text
    assert text2text.pipeline_tag(settings) == "summarization"
    assert text2text.pipeline_tag(settings.replace(source_prefix="translate English to French: ")) == "translation"


def settings_of(home, **changes):
    own = {name: str(x) if isinstance(x, Path) else x for name, x in given(home, **changes).items() if x is not None}
    return Text2TextSettings(**own)


def texts_of(home, **changes):
    settings = settings_of(home, **changes)
    splits = text2text.load_data(settings)
    model, _ = text2text.load_model(settings, splits)
    generation, tokenizer = text2text.generation_config(settings, model), models.load_tokenizer(home / "t5")
    return text2text.Texts.of(splits, tokenizer, model, settings, generation)


def test_long_texts_are_counted_and_said(home, caplog):
    longer = [sum(len(text.split()) > most for text, _ in ROWS) for most in (2, 3)]
    assert 0 < longer[1] < longer[0] < 16
    texts = texts_of(home, max_source_length=4, max_target_length=3)
    said = [
        f"train: {longer[1]} of 16 sources are longer than 4 tokens and were truncated; to keep more, set max_source"
    ]
    said += [
        f"train: {longer[0]} of 16 targets are longer than 3 tokens and were truncated; to keep more, set max_target"
    ]
    beyond = sum(len(text.split()) > 2 for text, _ in DEV)
    assert beyond > 0
    said += [f"validation: {beyond} of 5 targets are longer than the 3 tokens that are generated at most"]
    assert all(any(line.startswith(one) for line in caplog.messages) for one in said), caplog.messages
    targets = texts.targets["train"]
    assert targets.lengths.max() == 3 and np.all(targets.input_ids[targets.offsets[1:] - 1] == 1)  # all have their end


def test_lengths_beyond_the_models_positions_are_cut_to_them(home):
    with pytest.warns(UserWarning, match="max_source_length 100 exceeds the model's 64 positions; using 64"):
        settings = settings_of(home, model_name_or_path=home / "bart", max_source_length=100)
        model = Bart(tiny_seq2seq.config("bart"))
        assert text2text.fitting_length("max_source_length", settings, model) == 64


# generation


def test_flags_override_the_checkpoints_settings_of_generation(home):
    folder = home / "with-generation"
    shutil.copytree(home / "t5", folder)
    own = {"num_beams": 2, "max_length": 50, "min_length": 3, "length_penalty": 2.0, "num_return_sequences": 2}
    ends = {"eos_token_id": 1, "decoder_start_token_id": 0, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(own | ends))
    model = models.T5(tiny_seq2seq.config("t5"))

    def found(**changes):
        return text2text.generation_config(settings_of(home, model_name_or_path=folder, **changes), model)

    kept = found()
    assert (kept.num_beams, kept.length_penalty, kept.min_length) == (2, 2.0, 3)
    assert (kept.max_new_tokens, kept.max_length, kept.num_return_sequences) == (6, None, 1)
    changed = found(num_beams=4, early_stopping="never", min_length=0, no_repeat_ngram_size=2, max_target_length=9)
    assert changed.num_beams == 4 and changed.early_stopping == "never" and changed.no_repeat_ngram_size == 2
    assert changed.min_length == 0 and changed.max_new_tokens == 9
    with pytest.raises(
        InputError, match=r"at least 3 tokens .* more than the longest output has, 2 .*max_target_length"
    ):
        found(max_target_length=1)
    assert found(length_penalty=0.5).length_penalty == 0.5
    with pytest.raises(InputError, match="--length_penalty: is for beam search; set --num_beams to at least 2"):
        text2text.generation_config(settings_of(home, length_penalty=0.5), model)


def test_ids_beyond_the_tokenizers_stand_for_nothing(home):
    tokenizer = models.load_tokenizer(home / "t5")
    writer = text2text.TextWriter(None, None, {}, {}, tokenizer, (), 1)
    assert writer.decoded(np.array([[0, 3, len(tokenizer), 4, 1, 0], [0, 99, 1, 0, 0, 0]])) == ["ant bee", ""]


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": None, "validation_file": None}, "no data: set --train_file or --dataset_name"),
        ({"source_column": "text"}, "--target_column is missing; name it too, or omit --source_column"),
        (
            {"source_column": "text", "target_column": "target"},
            "source_column: no column 'text' among 'source', 'target'",
        ),
        ({"source_column": "source", "target_column": "x"}, "train.tsv:1: target_column: no column 'x' among"),
        ({"source_column": "source", "target_column": "source"}, "'source' is named twice"),
        ({"source_column": "a", "text_column": "b"}, "--source_column and --text_column are two names of one flag"),
        (
            {"train_file": "odd.tsv"},
            "odd.tsv:1: no columns of sources and targets among 'a', 'b'; name them source and",
        ),
        ({"train_file": "empty.tsv"}, "empty.tsv:3: the target ('target') is empty; remove the row"),
        ({"train_file": "none.tsv"}, "none.tsv: no such file"),
        ({"dataset_name": "a"}, "--dataset_name cannot be used with --train_file"),
        ({"do_predict": True}, "--test_file is missing"),
        ({"model_name_or_path": "encoder"}, "model_type 'bert' is not supported (an encoder, which cannot write)"),
        ({"max_source_length": 1}, "max_source_length 1: too short: special tokens take 1 of them"),
        ({"max_target_length": 1}, "max_target_length 1: too short: special tokens take 1 of them"),
        ({"num_beams": 1, "early_stopping": "true"}, "--early_stopping: is for beam search; set --num_beams"),
        ({"min_length": 1, "min_new_tokens": 1}, "--min_length and --min_new_tokens cannot be used together"),
        (
            {"min_new_tokens": 7},
            "at least 8 tokens (min_length or min_new_tokens) are more than the longest output has",
        ),
        ({"forced_bos_token_id": 9999}, "forced_bos_token_id 9999 is not a token of the model"),
        ({"metrics": ("token_f1", "token_f1")}, "--metrics token_f1 token_f1: list at least one, each only once"),
        ({"metric_for_best_model": "rouge1"}, "--metric_for_best_model rouge1: --metrics gives exact_match, token_f1"),
        ({"method": "lnsr"}, "--method lnsr: it compares or perturbs the outputs or hidden states of a classifier"),
        ({"method": "pats+r3f"}, "--method r3f: it compares or perturbs"),
        ({"method": "neftune"}, "--method neftune: it compares or perturbs"),
        ({"method": "bitfit"}, "--method bitfit: T5 has no biases to train; choose another method"),
        ({"label_smoothing_factor": 1.0}, "--label_smoothing_factor 1.0: must be in [0, 1)"),
    ],
)
def test_wrong_input_is_one_line(changes, message, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").symlink_to(home / "encoder")
    tiny.write_table(tmp_path / "odd.tsv", ("a", "b"), ("x", "y"))
    tiny.write_table(tmp_path / "empty.tsv", ("source", "target"), ("x", "y"), ("z", "  "))
    with pytest.raises(InputError) as caught:
        text2text.run(settings_of(home, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_wrong_flags_are_one_line(home, capsys):
    def refused(**changes):
        return tiny.refused(capsys, "text2text", *tiny.flags(**given(home, **changes)))

    assert refused(do_sample=True) == "--do_sample: texts are generated by greedy search or beam search; omit it"
    assert refused(max_seq_length=9) == "--max_seq_length: use --max_source_length and --max_target_length"
    assert refused(model_name_or_path=home / "encoder").endswith("; use a t5 or bart checkpoint")


@pytest.mark.parametrize("program", ["train", "glue"])
def test_a_classifier_is_not_made_of_an_encoder_decoder(program, home, capsys, tmp_path):
    path = tiny.write_table(tmp_path / "own.tsv", ("text", "label"), ("a", "x"), ("b", "y"))
    files = {"train_file": path, "validation_file": path, "output_dir": tmp_path / "run"}
    line = tiny.refused(capsys, program, *tiny.flags(model_name_or_path=home / "t5", **files))
    assert "model_type 't5' is not supported" in line and "pats-jax text2text" in line
    assert "--source_prefix: is for `pats-jax text2text`" in tiny.refused(capsys, program, "--source_prefix", "a")


def test_a_grid_of_classifiers_refuses_its_flags_by_name(capsys):
    line = tiny.refused(capsys, "compare", "--source_column", "a")
    assert line == "--source_column: is for text to text; set --program text2text, or omit it"


def test_a_tokenizer_that_ends_no_text_is_refused(home, monkeypatch):
    real = models.load_tokenizer

    def load(folder):
        tokenizer = real(folder)
        tokenizer._tokenizer.post_processor = None
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", load)
    with pytest.raises(InputError, match=r"does not end texts with a token that ends generation \(eos_token_id 1\)"):
        texts_of(home)


# methods


def shapes_of(kind):
    config = tiny_seq2seq.config(kind)
    model = models.T5(config) if kind == "t5" else Bart(config)
    ids = jnp.ones((1, 2), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), ids, labels=ids))["params"]


def chosen(params, pattern):
    mask = methods.layer_mask(params, pattern)
    named = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, keep in named if keep}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_methods_find_the_layers_of_encoder_decoders(kind):
    params = shapes_of(kind)
    names = [
        jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    middle = ".block." if kind == "t5" else ".layers."
    inside = {name for name in names if middle in name}
    assert chosen(params, LAYERS) == inside and inside < set(names)
    assert chosen(params, MATRICES) == {name for name in inside if name.endswith("kernel")}
    attention = {name for name in inside if name.endswith("kernel") and "ttention" in name or "_attn." in name}
    assert chosen(params, ATTENTION) == {name for name in attention if name.endswith("kernel")}
    assert len(chosen(params, ATTENTION)) == 12  # 4 of the encoder's layer, 8 of the decoder's
    scaled = chosen(params, methods.METHODS["sage"].layers)
    assert not any("norm" in name for name in scaled)
    assert scaled == {name for name in inside if name.endswith(("kernel", "bias")) and "norm" not in name}


def test_the_former_pattern_of_noise_is_read_as_the_present_one(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text())
    former = saved | {"method": "pats", "noise_layers": r"encoder\.layer\..*\.kernel$"}
    (tmp_path / "config.json").write_text(json.dumps(former))
    assert flags.read_config(str(tmp_path / "config.json"), Text2TextSettings).methods[0].noise_layers == MATRICES


ON_T5 = [name for name, method in methods.METHODS.items() if not method.has("objective") and name != "bitfit"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [*(("t5", name) for name in ON_T5), ("bart", "bitfit"), ("bart", "sift")])
def test_every_method_trains(name, kind, home, tmp_path):
    changes = {"update_ratio": 1.0} if name.startswith("dps") else {}
    changes |= {"max_target_length": 24, "max_source_length": 24} if kind == "bart" else {}
    folder = run(home, tmp_path / "run", method=name, model_name_or_path=home / kind, do_train=True, **changes)
    start, end = load_file(home / kind / "model.safetensors"), weights(folder)
    moved = {key for key in start if not np.array_equal(start[key], end[key])}
    assert moved and all(np.isfinite(end[key]).all() for key in end)
    if name == "bitfit":
        assert all(key.endswith("bias") for key in moved)


# what training comes to


@pytest.mark.slow
def test_it_learns_to_reverse(home):
    tiny_seq2seq.save_checkpoint(home / "wide", d_model=64, d_kv=16, d_ff=128, num_heads=4, num_decoder_layers=2)
    files = {"train_file": 3000, "validation_file": 200, "test_file": 200}
    for seed, (name, rows) in enumerate(files.items()):
        tiny_seq2seq.write_pairs(home / f"{name}.tsv", tiny_seq2seq.pairs(rows, seed, reverse=True))
    changes = {name: home / f"{name}.tsv" for name in files} | {"model_name_or_path": home / "wide", "method": "pats"}
    changes |= {"max_steps": 2000, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "eval_steps": 1000}
    folder = run(home, home / "reversed", **changes)
    found = json.loads((folder / "results.json").read_text())
    assert found["final"]["metrics"]["exact_match"] > 0.95 and found["test"]["metrics"]["exact_match"] > 0.95
    assert found["test"]["metrics"]["token_f1"] >= found["test"]["metrics"]["exact_match"]
    with open(folder / "predictions" / "test.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    right = np.mean([row["prediction"] == row["reference"] for row in rows])
    assert right == pytest.approx(found["test"]["metrics"]["exact_match"])


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(home, tmp_path):
    rates = {"dropout": 0.1, "method": "pats", "noise_scale": 0.1, "max_steps": 9, "logging_steps": 2, "eval_steps": 3}
    whole = run(home, tmp_path / "whole", **rates)
    with signal_at(5, signal.SIGINT) as caught:
        run(home, tmp_path / "cut", **rates)
    assert "pats-jax text2text --config" in str(caught.value) or caught.type is SystemExit
    assert not (tmp_path / "cut" / "results.json").exists()
    cut = run(home, tmp_path / "cut", **rates, resume=True)
    assert lines(cut) == lines(whole) and results(cut) == results(whole)
    ours, theirs = weights(cut), weights(whole)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for name in ("validation.tsv",):
        assert (cut / "predictions" / name).read_bytes() == (whole / "predictions" / name).read_bytes()
    run(home, cut, **rates | {"max_steps": 1}, overwrite=True)  # all that is there is a run's
    assert json.loads((cut / "results.json").read_text())["steps"] == 1


@pytest.mark.slow
@pytest.mark.devices(4)
@pytest.mark.parametrize(
    "changes", [{"num_devices": 4}, {"num_devices": 4, "fsdp": 2}, {"parallel": "pmap", "num_devices": 2}]
)
def test_devices_change_nothing_but_rounding(changes, home, tmp_path):
    """With micro-batches in the one and without in the other."""
    alone = run(home, tmp_path / "alone", train_batch_size=8, learning_rate=1e-3)
    other = run(home, tmp_path / "other", train_batch_size=8, learning_rate=1e-3, **changes)
    ours, theirs = weights(other), weights(alone)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)
    assert results(other)["final"] == results(alone)["final"]


@pytest.mark.slow
def test_form_of_the_layers_and_dtype(home, tmp_path):
    """Stacked layers with checkpointing and micro-batches train the same; bfloat16 nearly, beams and all."""
    plain = weights(run(home, tmp_path / "plain", learning_rate=1e-3))
    form = {"layers": "stacked", "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    rows = {"per_device_train_batch_size": 4}
    stacked = weights(run(home, tmp_path / "stacked", learning_rate=1e-3, **form, **rows))
    folder = run(home, tmp_path / "half", learning_rate=1e-3, dtype="bfloat16", num_beams=3)
    half = weights(folder)
    assert json.loads((folder / "model" / "generation_config.json").read_text())["num_beams"] == 3
    for name, value in plain.items():
        np.testing.assert_allclose(stacked[name], value, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(half[name], value, atol=6e-3, err_msg=name)
        assert half[name].dtype == np.float32


@pytest.mark.slow
def test_evaluation_alone_scores_a_saved_model(home, finished, tmp_path):
    only = {"do_eval": True, "do_predict": True, "test_file": home / "new.jsonl", "source_prefix": "cat "}
    folder = run(home, tmp_path / "scored", model_name_or_path=finished / "model", train_file=None, **only)
    assert results(folder)["final"]["metrics"] == results(finished)["final"]["metrics"]
    assert results(folder)["test"] == results(finished)["test"]
    ours, theirs = ((one / "predictions" / "test.tsv").read_bytes() for one in (folder, finished))
    assert ours == theirs


@pytest.mark.slow
def test_the_best_model_is_kept_with_its_texts(home, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.1])
    real = text2text.TextWriter.evaluate
    said = {"exact_match": 0.0, "token_f1": 0.0}
    monkeypatch.setattr(
        text2text.TextWriter,
        "evaluate",
        lambda self, params: real(self, params) and said | {"exact_match": next(scores)},
    )
    keep = {"load_best_model_at_end": True, "eval_steps": 1}
    folder = run(home, tmp_path / "run", **keep)
    assert results(folder)["model_step"] == 2 and results(folder)["best"]["step"] == 2
    with open(folder / "predictions" / "validation.tsv", encoding="utf-8", newline="") as file:
        texts = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    assert texts == generated(folder / "model", [source for source, _ in DEV])
    again = dataclasses.asdict(models.GenerationConfig.from_pretrained(folder / "model"))
    assert again["max_new_tokens"] == 6


def code_of(card):
    """The code with JAX in a card, and what it prints."""
    return next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "pats_jax" in block)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t5", {}),
        ("t5", {"peft": "lora", "method": "pats", "sensitivity_batches": 1}),
        ("t5", {"peft": "prefix", "prefix_length": 3, "layers": "stacked"}),
        ("t5", {"peft": "adalora", "adalora_target_r": 6, "layers": "stacked"}),
        ("bart", {"peft": "prompt", "prompt_length": 3}),
        ("bart", {"peft": "bitfit"}),
        ("bart", {"peft": "adapters", "num_beams": 2}),
    ],
    ids=str,
)
def test_adapters_train_and_the_code_of_the_card_writes_what_the_run_wrote(kind, changes, home, tmp_path, capsys):
    changes |= {"max_source_length": 24, "max_target_length": 20, "model_name_or_path": home / kind}
    test = tiny_seq2seq.write_pairs(tmp_path / "test.tsv", [("A text.", "gnu")])
    folder = run(home, tmp_path / "run", test_file=test, **changes)
    found = results(folder)
    assert found["peft"] == changes.get("peft") and found["steps"] == 3
    assert ("trained_parameters" in found) and (found["trained_parameters"] < found["num_parameters"]) is (
        "peft" in changes
    )
    with open(folder / "predictions" / "test.tsv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    capsys.readouterr()
    card = (folder / "README.md").read_text()
    assert ("So does PEFT (torch)" in card) is (changes.get("peft") in ("lora", "adalora", "prompt"))
    code = code_of(card)
    exec(code.replace("batch_decode(tokens,", f"batch_decode(tokens * (tokens < {len(tiny_seq2seq.tokenizer(kind))}),"))
    said = ast.literal_eval(capsys.readouterr().out.strip())
    assert [text.strip() for text in said] == [row["prediction"]]


def test_bitfit_on_t5_names_what_to_take(home, capsys):
    line = tiny.refused(capsys, "text2text", *tiny.flags(**given(home, peft="bitfit")))
    assert line == "bitfit: a t5 model has no biases; take ia3 or lora"
