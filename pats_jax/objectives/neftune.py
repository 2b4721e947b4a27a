"""NEFTune: random noise on the word embeddings of every training pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pats_jax.objectives.objective import View, check_weight
from pats_jax.train_state import Batch
from pats_jax.trees import is_plainly


def neftune(alpha: float | jax.Array = 5.0) -> View:
    r"""NEFTune: trains on word embeddings with random noise, less of it in long texts.

    ::

        z ~ U(-1, 1) for each entry of a token;   x <- x + alpha / sqrt(L d) * z
        L: the number of the row's tokens, without padding;   d: the hidden size

    The rule is that of the authors' training code (*code*), which counts the tokens of each row and leaves padding
    alone; their readme and Transformers count the padded length. The loss is otherwise as it was. Every pass that
    starts from word embeddings draws its own noise, as it draws its own dropout; evaluation has none.

    Args:
      alpha: size of the noise, >= 0; the authors use 5, 10 and 15. 0 changes no bit.

    Raises:
      ValueError: if alpha < 0 (traced numbers are not checked).

    References:
      Jain et al., `NEFTune: Noisy Embeddings Improve Instruction Finetuning <https://arxiv.org/abs/2310.05914>`_, 2024
    """
    check_weight("alpha", alpha)

    def change(embed: Callable[[jax.Array], jax.Array], inputs: Batch, key: jax.Array) -> Batch:
        if is_plainly(alpha, 0) or inputs.get("continue_from") is not None:
            return inputs
        rest = {name: x for name, x in inputs.items() if name not in ("input_ids", "inputs_embeds")}
        words = inputs["inputs_embeds"] if "inputs_embeds" in inputs else embed(inputs["input_ids"])
        is_token = jnp.asarray(inputs.get("attention_mask", jnp.ones(words.shape[:2])), words.dtype)
        entries = jnp.maximum(jnp.sum(is_token, axis=1), 1) * words.shape[-1]
        noise = jax.random.uniform(key, words.shape, words.dtype, -1.0, 1.0)
        return rest | {"inputs_embeds": words + noise * (is_token * (alpha / jnp.sqrt(entries))[:, None])[..., None]}

    return View("neftune", change)
