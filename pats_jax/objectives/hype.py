"""HyPe: small random noise on the input of every layer."""

from collections.abc import Callable

import jax

from pats_jax.objectives.objective import View, check_weight
from pats_jax.train_state import Batch
from pats_jax.trees import choose, is_plainly


def hype(noise_scale: float | jax.Array = 1e-5, distribution: str = "normal") -> View:
    r"""HyPe: trains with a little random noise on what every layer reads.

    ::

        h_{k+1} = layer_k(h_k + z_k);   z_k ~ N(0, noise_scale^2), or U(-noise_scale, noise_scale), for each entry

    The rule is the paper's. The authors' code draws uniform noise from U(0, noise_scale), which is not symmetric, and
    can also add noise after attention. They train without dropout. Every pass draws its own noise, as it draws its own
    dropout; the loss is otherwise as it was, and evaluation has no noise.

    Args:
      noise_scale: standard deviation or half-width of the noise, >= 0, in units of the hidden states' entries, which
        are around 1 after LayerNorm; the authors use 1e-5. 0 changes no bit. In bfloat16, 1e-5 is lost in rounding.
      distribution: ``"normal"`` or ``"uniform"``.

    Raises:
      ValueError: if noise_scale < 0 (traced numbers are not checked), or the distribution is unknown.

    References:
      Yuan et al., `HyPe: Better Pre-trained Language Model Fine-tuning with Hidden Representation Perturbation
      <https://arxiv.org/abs/2212.08853>`_, 2023
    """
    check_weight("noise_scale", noise_scale)
    draw = choose("distribution", distribution, {"normal": jax.random.normal, "uniform": _symmetric_uniform})

    def change(embed: Callable[[jax.Array], jax.Array], inputs: Batch, key: jax.Array) -> Batch:
        def perturb(number, hidden):
            noise = draw(jax.random.fold_in(key, number), hidden.shape, hidden.dtype)
            return hidden + (noise_scale * noise).astype(hidden.dtype)

        return inputs if is_plainly(noise_scale, 0) else inputs | {"perturb": perturb}

    return View("hype", change)


def _symmetric_uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
