"""A batch of random tokens, for benchmarks of training steps."""

import numpy as np


def random_batch(vocab_size: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows without padding, two classes, all of weight 1; ids from 1000 on, above BERT's special ones."""
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(1000, vocab_size, (rows, length), dtype=np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "token_type_ids": np.zeros((rows, length), np.int32),
        "labels": rng.integers(2, size=rows, dtype=np.int32),
        "weights": np.ones(rows, np.float32),
    }
