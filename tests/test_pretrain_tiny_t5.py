"""The recipe of the small T5: span corruption, what it learns from, and a run that stops and goes on."""

import functools
import json

import jax
import numpy as np
import pytest
import tiny

from benchmarks import pretrain_tiny_t5, pretraining, pretraining_texts
from benchmarks.span_corruption import PackedRows, corrupt, lengths_for, lengths_of
from pats_jax.errors import InputError
from pats_jax.models import from_pretrained_seq2seq, load_tokenizer
from pats_jax.training import preemption

FIRST, END = 999, 1  # <extra_id_0>, and what ends a sequence


def restored(source, target):
    """The tokens that a source and target stand for, and the lengths of the hidden spans; checks the sentinels."""
    assert source[-1] == target[-1] == END
    is_sentinel = target[:-1] > 900
    places = np.nonzero(is_sentinel)[0]
    assert list(target[places]) == list(range(FIRST, FIRST - len(places), -1))
    spans = np.split(target[:-1], places)[1:]
    found, kept_before = [], True
    for token in source[:-1]:
        if token <= 900:
            found.append(token)
            kept_before = True
        else:
            assert kept_before, "two spans without a kept token between them"
            span = spans[FIRST - token]
            assert span[0] == token and len(span) > 1
            found += list(span[1:])
            kept_before = False
    return np.array(found), [len(span) - 1 for span in spans]


def test_a_corrupted_text_can_be_put_together_again():
    rng = np.random.default_rng(0)
    lengths = lengths_for(128, 0.15, 3.0)
    tokens = np.stack([rng.permutation(np.arange(2, 900))[: lengths.tokens] for _ in range(200)])
    sources, targets = corrupt(tokens, rng, lengths=lengths, first_sentinel=FIRST, end=END)
    assert sources.shape == (200, 128) and targets.shape == (200, lengths.target)
    found = [restored(source, target) for source, target in zip(sources, targets, strict=True)]
    np.testing.assert_array_equal([text for text, _ in found], tokens)
    spans = np.concatenate([lengths for _, lengths in found])
    assert abs(spans.sum() / tokens.size - 0.15) < 0.005 and spans.mean() == 3.0
    # of the divisions of 21 into 7 positive parts, C(20, 6), the first part is 1 in C(19, 5)
    assert abs(np.mean(spans == 1) - 6 / 20) < 0.04
    hidden = np.mean([np.isin(row, target) for row, target in zip(tokens, targets, strict=True)], axis=0)
    assert hidden[0] == 0 and hidden[-1] == 1 and abs(hidden[40:100].mean() - 0.15) < 0.02


@pytest.mark.parametrize("tokens", [2, 3, 5, 30, 141, 500])
def test_the_lengths_are_those_of_the_arrays(tokens):
    lengths = lengths_of(tokens, 0.15, 3.0)
    rows = np.arange(2, 2 + 4 * tokens).reshape(4, tokens) % 900
    source, target = corrupt(rows, np.random.default_rng(1), lengths=lengths, first_sentinel=FIRST, end=END)
    assert source.shape == (4, lengths.source) and target.shape == (4, lengths.target)
    with pytest.raises(InputError, match="--source_length 2: must be at least 3"):
        lengths_for(2, 0.15, 3.0)


def test_batches_are_a_function_of_seed_and_step():
    rng = np.random.default_rng(0)
    texts = [np.append(rng.integers(2, 900, rng.integers(1, 9)), END) for _ in range(60)]

    def batches(first, seed=3):
        hide = functools.partial(corrupt, lengths=lengths_of(10, 0.15, 3.0), first_sentinel=FIRST, end=END)
        rows = PackedRows(texts, 10, 4, seed=seed, corrupt=hide)
        found = rows.batches(first)
        return rows.steps_per_epoch, [next(found)[0] for _ in range(2 * rows.steps_per_epoch)]

    steps, whole = batches(0)
    again = batches(steps + 1)[1]
    for name in ("input_ids", "labels"):
        np.testing.assert_array_equal(again[0][name], whole[steps + 1][name])
    assert not np.array_equal(whole[0]["labels"], whole[steps]["labels"])
    assert not np.array_equal(whole[0]["labels"], batches(0, seed=4)[1][0]["labels"])
    read = [
        restored(*row)[0] for batch in whole[:steps] for row in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    ends = np.sum(np.concatenate(read) == END)
    total = sum(map(len, texts))
    assert steps == total // 40 and len(texts) - 10 < ends <= len(texts)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """SST-2 with a dev file, and three tasks of a gym, of which two are targets or made of one."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_sst2(folder / "glue")
    words = [f"w{number}{letter}" for number in range(300) for letter in "abc"]
    rows = [" ".join(np.random.default_rng(number).choice(words, 30)) for number in range(80)]
    tiny.write_table(
        folder / "glue" / "CoLA" / "train.tsv", ("x", "1", "", rows[0]), *(("x", "1", "", r) for r in rows)
    )
    for task, options in (("xsum", []), ("wikisql", []), ("superglue-rte", ["a", "b"]), ("art", ["a", "b"])):
        for split in ("train", "test"):
            path = folder / "gym" / task / f"{task}_16_13_{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {"task": task, "input": f"{task} {split} text", "output": "answer", "options": options}
            path.write_text(json.dumps(row) + "\n")
    return folder


def test_targets_and_test_files_are_left_out(data_dir, tmp_path):
    found = pretraining_texts.read_texts(data_dir)
    assert list(found) == ["glue/CoLA/train.tsv", "glue/SST-2/train.tsv", "gym/art", "gym/xsum"]
    assert found["gym/xsum"] == ["xsum train text answer"] and found["gym/art"] == ["art train text"]
    assert len(found["glue/CoLA/train.tsv"]) == 80  # of 81 rows, one of them twice
    with pytest.raises(InputError, match="none of the files"):
        pretraining_texts.read_texts(tmp_path)


TINY = "--steps 5 --batch_size 2 --source_length 32 --vocab_size 600 --d_model 16 --d_ff 32 --num_layers 1".split()
TINY += "--num_heads 2 --warmup_steps 2 --save_steps 2 --eval_steps 3".split()


def run(data_dir, folder, *flags):
    pretrain_tiny_t5.main(["--data_dir", str(data_dir), "--output_dir", str(folder), *TINY, *flags])
    return json.loads((folder / "loss_curve.json").read_text())


@pytest.mark.slow
def test_a_run_that_stops_goes_on_and_ends_where_another_does(data_dir, tmp_path, monkeypatch, capsys):
    """With the vocabulary of the first, for its threads do not learn the same twice."""
    make_runner, learn = pretrain_tiny_t5.runners.make_runner, pretraining_texts.train_tokenizer
    monkeypatch.setattr(pretrain_tiny_t5.runners, "make_runner", lambda: make_runner(num_devices=1))
    monkeypatch.setattr(pretraining_texts, "train_tokenizer", lambda _, size: once(size))
    once = functools.cache(lambda size: learn(texts, size))
    texts = [text for own in pretraining_texts.read_texts(data_dir).values() for text in own]
    whole = run(data_dir, tmp_path / "whole")
    assert [step for step, _ in whole["held_out_loss"]] == [3, 5] and whole["loss"][-1][0] == 5
    with monkeypatch.context() as patched:
        patched.setattr(pretraining.Deadline, "arrived", lambda self, step: step >= 3)
        stopped = run(data_dir, tmp_path / "stopped")
    assert [step for step, _ in stopped["held_out_loss"]] == [3] and "--resume goes on" in capsys.readouterr().out
    resumed = run(data_dir, tmp_path / "stopped", "--resume")
    assert resumed["held_out_loss"] == whole["held_out_loss"]

    (_, params, config), (_, again, _) = (from_pretrained_seq2seq(tmp_path / name) for name in ("whole", "stopped"))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    tokenizer = load_tokenizer(tmp_path / "whole")
    assert whole["loss_at_the_end"]["held_out"] == whole["held_out_loss"][-1][1]
    assert 0 < abs(whole["loss_at_the_end"]["other_sources"] - whole["loss_at_the_end"]["held_out"]) < 1

    size = config.vocab_size
    assert size == len(tokenizer) <= 600 and config.dropout_rate == 0.1
    assert tokenizer("<extra_id_0> w1a")["input_ids"][0] == size - 1
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, size - 100]) == ["<pad>", "</s>", "<unk>", "<extra_id_99>"]
    assert (tmp_path / "whole" / "loss_curve.png").stat().st_size > 1000

    for flags, part in (
        ([], "holds a run"),
        (["--resume", "--seed", "1"], "the run in"),
        (["--minutes", "0"], "greater"),
    ):
        with pytest.raises(SystemExit):
            run(data_dir, tmp_path / "whole", *flags)
        assert part in capsys.readouterr().err


def test_a_deadline_comes():
    asked = preemption.Preemption()
    assert not pretraining.Deadline(asked, None).arrived(1)
    assert not pretraining.Deadline(asked, 1.0).arrived(1)
    assert pretraining.Deadline(asked, 1e-9).arrived(1)
    asked.signal_number = 15
    late = pretraining.Deadline(asked, None)
    assert late.arrived(1) and late.signal_number == 15
