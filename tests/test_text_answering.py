"""Text-to-text answers of few-shot tasks: what a T5 reads, its loss, how it answers, and its meta-gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5

from pats_jax import models
from pats_jax.data import load_gym
from pats_jax.data.few_shot import Row, Sample, build_task
from pats_jax.errors import InputError
from pats_jax.priming import answerers, meta_losses, text_answering
from pats_jax.priming.answering import count_rows
from pats_jax.priming.text_answering import TextAnswering, make_text_loss
from pats_jax.priming.text_settings import TextSettings

GENERATION = models.GenerationConfig(decoder_start_token_id=0, eos_token_id=(1,), pad_token_id=0)
SHARP = 3.0  # times the logits: an untrained model prefers nothing


def answering(head="generate", length=16, **settings):
    model, _, _ = tiny_t5.random_model()
    text = TextSettings(max_target_length=6, **settings)
    return TextAnswering(head, model, tiny_t5.tokenizer(), length, text, GENERATION)


def params():
    return tiny_t5.random_model()[1]


@functools.cache
def gym(tmp):
    return load_gym(tiny_t5.write_gym(tmp))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return gym(tmp_path_factory.mktemp("gym"))


# what the model reads


def a_task(*rows, name="mine"):
    return build_task(name, [Sample(13, rows, rows, rows)])


def test_inputs_are_crossfits():
    """A leading blank, the task's name in brackets, choices behind the question; files' own choices as they are."""
    own = Row("Why?", ("so", "for fun"), 1)
    other = Row("Why? [SEP] It was.", ("a", "b", "c"), 0, whole="Why? (1) a (2) b (3) c [SEP] It was.")
    texts = [row.input for row in answering().prepare(a_task(own, other)).samples[0].test]
    assert texts == [" [mine] Why? (A) so (B) for fun", " [mine] Why? (1) a (2) b (3) c [SEP] It was."]
    plain = answering(show_task=False)
    assert plain.prepare(a_task(own, other)).samples[0].dev[0].input == " Why? (A) so (B) for fun"
    same = a_task(Row("nice", ("yes", "no"), 0), Row(" bad ", ("yes", "no"), 1), name="mood")
    assert [row.input for row in answering().prepare(same).samples[0].train] == [" [mood] nice", " [mood] bad"]
    text = a_task(Row("ann and bob", (), 0, ("bob", "ann bob")))
    prepared = answering().prepare(text)
    assert prepared.samples[0].train[0] == Row(" [mine] ann and bob", (), 0, ("bob", "ann bob"))
    assert (prepared.kind, prepared.answer_metric) == ("text_to_text", "exact_match")


def test_both_texts_have_a_leading_blank():
    """A BART tokenizer of today adds none, so that the first word would be another token."""
    asked = []

    class Recorder:
        def __call__(self, texts, **options):
            asked.extend(texts)
            return {"input_ids": [[1]] * len(texts)}

    model, _, _ = tiny_t5.random_model()
    made = TextAnswering("generate", model, Recorder(), 16, TextSettings(), GENERATION)
    made.encode(made.prepare(a_task(Row("why", (), 0, ("because ",)))).samples[0].train)
    assert asked == [" [mine] why", " because"]


def test_a_batch_has_one_right_answer_of_each_row(tasks):
    made = answering()
    rows = made.prepare(tasks["copy"]).samples[0].train
    batch = made.encode(rows)
    decode = tiny_t5.tokenizer().batch_decode
    assert decode(batch["label_ids"], skip_special_tokens=True) == [row.references[0] for row in rows]
    assert all(ids[int(mask.sum()) - 1] == 1 for ids, mask in zip(batch["label_ids"], batch["label_mask"], strict=True))
    assert (
        count_rows(batch) == len(rows) == 6
        and count_rows({"support_" + k: v[None, None] for k, v in batch.items()}) == 6
    )
    rng = np.random.default_rng(0)
    drawn = {made.simplify(rows[0], 6, rng).references for _ in range(20)}
    assert drawn == {(one,) for one in rows[0].references} and len(drawn) == 2
    widest = made.row_shapes([one for row in rows for one in made.variants(row, 6)])
    assert widest["label_ids"] >= made.row_shapes(rows)["label_ids"]


# the loss


@pytest.mark.parametrize(("reduction", "smoothing"), [("mean", 0.0), ("sum", 0.1)])
def test_the_loss_is_that_of_its_formula(tasks, reduction, smoothing):
    """Cross-entropy of every word of the answers, smoothed over all words; CrossFit's is the sum, with 0.1."""
    made = answering(loss_reduction=reduction, label_smoothing_factor=smoothing)
    batch = made.encode(made.prepare(tasks["copy"]).samples[0].train[:4])
    model = made.model
    read = np.concatenate([np.zeros((4, 1), np.int32), batch["label_ids"][:, :-1]], axis=1)
    logits = jax.jit(lambda p: model.apply({"params": p}, batch["input_ids"], batch["attention_mask"], read))(params())
    log_p = np.asarray(logits, np.float64) - np.log(np.sum(np.exp(np.asarray(logits, np.float64)), -1, keepdims=True))
    total, words = 0.0, 0
    for row, (ids, mask) in enumerate(zip(batch["label_ids"], batch["label_mask"], strict=True)):
        for place, word in enumerate(ids[mask > 0]):
            own = log_p[row, place]
            total -= (1 - smoothing) * own[word] + smoothing / own.size * own.sum()
            words += 1
    expected = total if reduction == "sum" else total / words
    loss = jax.jit(made.make_loss(deterministic=True))(params(), batch, jax.random.key(0))[0]
    assert words >= 8 and float(loss) == pytest.approx(expected, rel=1e-5)


# how it answers


def test_the_likeliest_option_is_that_of_its_words_mean(tasks):
    """Option by option against the logits, for rows of two and three options; and never an empty slot."""
    made = answering("likelihood")
    model, step = made.model, jax.jit(made.step)
    logits_of = jax.jit(lambda p, ids, read: model.apply({"params": p}, ids, decoder_input_ids=read))
    for name in ("manners", "choice"):
        rows = made.prepare(tasks[name]).samples[0].test[:5]
        answers = made.answer(step, params(), rows, 4)
        for row, answer in zip(rows, answers, strict=True):
            scores = []
            for option in row.options:
                ids = tiny_t5.tokenizer()([row.input, option])["input_ids"]
                logits = np.asarray(logits_of(params(), jnp.array(ids[:1]), jnp.array([[0, *ids[1][:-1]]])))[0]
                log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
                scores.append(np.mean([log_p[place, word] for place, word in enumerate(ids[1])]))
            assert answer == row.options[int(np.argmax(scores))]


def test_generated_answers_are_those_of_generate(tasks):
    """Without padding and neighbours, in the rows' order; ids beyond the tokenizer's words are left out."""
    made = answering(num_beams=2)
    rows = made.prepare(tasks["names"]).samples[0].test[:5]
    answers = made.answer(jax.jit(made.step), params(), rows, 4)
    settings = dataclasses.replace(GENERATION, num_beams=2, max_new_tokens=6)
    words, expected = len(tiny_t5.tokenizer()), []
    for row in rows[:2]:
        ids = jnp.array(tiny_t5.tokenizer()([row.input])["input_ids"])
        found = models.generate(made.model, params(), ids, settings=settings)[0]
        expected.append(" ".join(tiny_t5.VOCABULARY[token] for token in found if 2 < token < words))
    assert [" ".join(text.replace("<unk>", "").split()) for text in answers[:2]] == expected and any(expected)
    score = made.score(tasks["names"], ["bob", *[row.output for row in rows[1:]]], rows)
    assert score.value == pytest.approx(np.mean([rows[0].output == "bob", 1, 1, 1, 1]))


def test_decoding_is_the_checkpoints_but_for_what_is_set():
    bart = models.GenerationConfig(
        decoder_start_token_id=2, bos_token_id=0, eos_token_id=(2,), pad_token_id=1, no_repeat_ngram_size=3, num_beams=5
    )
    own = text_answering.decoding(TextSettings(num_beams=4), bart, 64)
    assert own == dataclasses.replace(bart, num_beams=4, max_new_tokens=64)
    crossfits = text_answering.decoding(TextSettings(num_beams=4, start_with_bos=True), bart, 64)
    assert crossfits == dataclasses.replace(
        bart, num_beams=4, max_length=64, decoder_start_token_id=0, forced_bos_token_id=0, forced_eos_token_id=2
    )
    assert text_answering.decoding(TextSettings(start_with_bos=True), GENERATION, 8) == dataclasses.replace(
        GENERATION,
        max_new_tokens=8,  # T5 has no bos
    )


# meta-learning


def meta_batch(made, tasks, steps=1):
    """Two tasks, some inner steps of three rows, and three rows to evaluate by."""
    parts = []
    for name in ("copy", "weather"):
        sample = made.prepare(tasks[name]).samples[0]
        rows = [sample.train[3 * step : 3 * step + 3] for step in range(steps)]
        parts.append([*rows, sample.dev[:3]])
    shapes = made.row_shapes([row for part in parts for rows in part for row in rows])
    encoded = [[text_answering.option_scoring.pad_to(made.encode(rows), shapes) for rows in part] for part in parts]
    support = {f"support_{n}": np.stack([np.stack([one[n] for one in part[:-1]]) for part in encoded]) for n in shapes}
    return support | {f"query_{n}": np.stack([part[-1][n] for part in encoded]) for n in shapes}


def test_mamls_outer_gradient_is_that_of_finite_differences(tasks, monkeypatch):
    """In float64, which the model takes in the place of float32, along directions of all and of single tensors."""
    made = answering()
    batch = meta_batch(made, tasks)
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        loss_fn = make_text_loss(made.model.clone(dtype=jnp.float64), deterministic=True)
        start = jax.tree.map(lambda p: np.asarray(p, np.float64) / 2, params())
        meta_loss = meta_losses.maml(loss_fn, inner_learning_rate=0.2)
        evaluate = jax.jit(jax.value_and_grad(lambda p: meta_loss(p, batch, jax.random.key(0))[0]))
        value, gradient = evaluate(start)
        assert value.dtype == np.float64
        leaves, form = jax.tree.flatten(start)
        rng = np.random.default_rng(0)
        for moved in (range(len(leaves)), *([index] for index in rng.choice(len(leaves), 5, replace=False))):
            towards = [rng.normal(size=leaf.shape) * (index in moved) for index, leaf in enumerate(leaves)]
            length = np.sqrt(sum(np.sum(d**2) for d in towards)) / 3e-5
            ahead, behind = (
                evaluate(
                    jax.tree.unflatten(form, [x + d / length * sign for x, d in zip(leaves, towards, strict=True)])
                )
                for sign in (1, -1)
            )
            slope = sum(np.vdot(d, g) for d, g in zip(towards, jax.tree.leaves(gradient), strict=True)) / length
            assert slope == pytest.approx(float(ahead[0] - behind[0]) / 2, rel=1e-5, abs=1e-13)


@pytest.mark.slow
def test_mamls_second_order_costs_less_than_three_and_a_half_first_order_steps(tasks):
    """By XLA's count of operations; measured times are in docs/priming.md."""
    made = answering()
    batch, loss_fn = meta_batch(made, tasks), make_text_loss(made.model)

    def operations(first_order):
        meta_loss = meta_losses.maml(loss_fn, inner_learning_rate=1e-2, first_order=first_order)
        step = jax.jit(jax.value_and_grad(lambda p: meta_loss(p, batch, jax.random.key(0))[0]))
        return step.lower(params()).compile().cost_analysis()["flops"]

    assert 1.3 < operations(False) / operations(True) <= 3.5


# what is refused


@pytest.mark.parametrize("head", ("likelihood", "embedding"))
def test_a_task_without_options_needs_generate(tasks, head):
    answerers.check_tasks(head, [tasks["manners"], tasks["choice"]], "own.json")
    with pytest.raises(
        InputError, match=rf"^--partition own.json: names is text to text, without options for --head {head};"
    ):
        answerers.check_tasks(head, [tasks["manners"], tasks["names"]], "own.json")
    answerers.check_tasks("generate", [tasks["manners"], tasks["names"]], "own.json")
