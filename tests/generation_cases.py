"""Settings of generation that are compared with Transformers' ``generate``."""

import itertools

# few, for the fixtures: greedy, and every rule of beam search at least once
FEW = {
    "t5": [
        {"max_new_tokens": 11},
        {"num_beams": 4, "max_new_tokens": 11, "length_penalty": 2.0, "num_return_sequences": 2},
    ],
    "bart": [
        {"max_length": 12, "no_repeat_ngram_size": 2, "forced_bos_token_id": 0, "min_length": 4},
        {"num_beams": 3, "max_length": 10, "early_stopping": True, "no_repeat_ngram_size": 2, "forced_bos_token_id": 0},
        {"num_beams": 2, "max_new_tokens": 8, "early_stopping": "never", "length_penalty": 0.5, "min_new_tokens": 3},
    ],
}


def grid() -> list[dict]:
    """Greedy settings, and beams with every mix of stop, length penalty and repetition, with one further rule each."""
    rules = [
        {},
        {"min_new_tokens": 4},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 1},
        {"num_return_sequences": 2},
        {"max_length": 6, "max_new_tokens": None},
        {"eos_token_id": [1, 7, 9]},
    ]
    greedy = [{"no_repeat_ngram_size": size} for size in (0, 1, 2, 3)] + rules[1:4] + rules[5:]
    mixes = itertools.product((2, 4), (False, True, "never"), (-0.5, 0.0, 0.5, 1.0, 2.0), (0, 2))
    beams = [
        {"num_beams": count, "early_stopping": stop, "length_penalty": power, "no_repeat_ngram_size": size}
        | rules[number % len(rules)]
        for number, (count, stop, power, size) in enumerate(mixes)
    ]
    return [{"max_new_tokens": 12} | case for case in (*greedy, *beams)]
