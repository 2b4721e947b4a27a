"""Scaled dot-product attention by `jnp.einsum`, or by cuDNN's fused kernel where that is faster.

The kernel does not write the weights, (batch, heads, queries, length), to memory. Measured on an H100, 12 times forward
and backward in bfloat16 with 12 heads of 64 units: 32 rows of length 128 take 0.99 ms instead of 1.39, 8 rows of length
512 take 1.71 ms instead of 4.82.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from pats_jax.errors import InputError

Attention = Literal["auto", "einsum", "cudnn"]
AUTO, EINSUM, CUDNN = ATTENTIONS = get_args(Attention)

_FROM_LENGTH = 128  # what "auto" needs; below, nothing was measured
_WIDEST_HEAD = 128
_LONG = 512  # tokens, from which `in_parts` pays
_OLDEST_GPU = 8.0  # compute capability, Ampere


def softmax_weights(query: Array, key: Array, bias: Array) -> Array:
    """Attention weights, softmax(Q K^T / sqrt(width) + bias), (batch, heads, queries, length) in the queries' dtype.

    Scores and softmax are float32. The arguments have the shapes that `by_platform` takes.
    """
    product = _product if query.dtype == jnp.float32 else _product_with_narrow_gradient
    return jax.nn.softmax(product(query * query.shape[-1] ** -0.5, key) + bias).astype(query.dtype)


def _product(query, key):
    """Q K^T, (batch, heads, queries, length) in float32."""
    return jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product_with_narrow_gradient(query, key):
    """As `_product`; its gradient is rounded to the queries' dtype before it is multiplied.

    JAX's own gradient is float32, and its products take twice the bytes and the slower matrix units.
    """
    return _product(query, key)


def _narrow_gradient(operands, gradient):
    query, key = operands
    gradient = gradient.astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", gradient, key), jnp.einsum("bhqk,bqhd->bkhd", gradient, query)


_product_with_narrow_gradient.defvjp(lambda query, key: (_product(query, key), (query, key)), _narrow_gradient)


def weighted_sum(weights: Array, value: Array) -> Array:
    """The sum of the values (batch, length, heads, width), weighted: (batch, queries, heads, width)."""
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def by_platform(query: Array, key: Array, value: Array, bias: Array) -> Array:
    """Attention without dropout, (batch, queries, heads, width): by cuDNN when compiled for CUDA, else by einsum.

    Args:
      query: (batch, queries, heads, width).
      key: (batch, length, heads, width).
      value: (batch, length, heads, width).
      bias: float32 (batch, 1, 1, length): 0 for the tokens to attend to; any other number masks a token.
    """
    # The branch that is not taken costs nothing, but each keeps what the other would need for its backward pass.
    other = jax.checkpoint(lambda query, key, value, bias: weighted_sum(softmax_weights(query, key, bias), value))
    return jax.lax.platform_dependent(query, key, value, bias, cuda=fused, default=other)


def is_long(query: Array) -> bool:
    """Whether a text is so long that `in_parts` pays."""
    return query.shape[1] >= _LONG


def in_parts(query: Array, key: Array, value: Array, bias: Array) -> Array:
    """As `by_platform`, for long texts where cuDNN is not used; the backward pass computes the weights again.

    On CPU one or two heads are computed at a time, whose weights stay in the cache; on other platforms all at once.

    Args:
      query: (batch, queries, heads, width).
      key: (batch, length, heads, width).
      value: (batch, length, heads, width).
      bias: float32, to be added to the scores, (batch, 1, 1 or queries, length).
    """
    at_once = jax.checkpoint(lambda query, key, value, bias: weighted_sum(softmax_weights(query, key, bias), value))
    by_heads = functools.partial(_by_heads, at_once)
    return jax.lax.platform_dependent(query, key, value, bias, cpu=by_heads, default=at_once)


def _by_heads(attend, query, key, value, bias):
    batch, length, heads, width = query.shape
    size = 2 if heads % 2 == 0 else 1
    count = heads // size

    def parts(x):  # (batch, tokens, heads, width) as (batch * count, size, tokens, 1, width)
        return x.swapaxes(1, 2).reshape(batch * count, size, -1, 1, width)

    biases = jnp.repeat(bias[:, None], count, axis=0)
    attended = jax.lax.map(lambda part: attend(*part), (parts(query), parts(key), parts(value), biases))
    return attended.reshape(batch, heads, length, width).swapaxes(1, 2)


def fused(
    query: Array, key: Array, value: Array, bias: Array, implementation: Literal["cudnn", "xla"] = CUDNN
) -> Array:
    """As `by_platform`, computed by one implementation of `jax.nn.dot_product_attention`.

    Both implementations mask scores with finite numbers, so a row without tokens does not give NaN.
    """
    allowed = jnp.broadcast_to(bias == 0, (*bias.shape[:2], query.shape[1], key.shape[1]))
    allowed = _unmapped(allowed, jax.lax.stop_gradient(query))
    return jax.nn.dot_product_attention(query, key, value, mask=allowed, implementation=implementation)


@custom_vmap
def _unmapped(allowed: Array, query: Array) -> Array:
    """Returns ``allowed``. Refuses `jax.vmap`, under which cuDNN would need a mask as large as the weights."""
    return allowed


@_unmapped.def_vmap
def _refuse(axis_size, in_batched, allowed, query):
    raise InputError('attention by cuDNN does not work under jax.vmap; make the model with attention="einsum"')


def is_fused(attention: str, query: Array, key: Array, *, dropout: float) -> bool:
    """Whether to use `by_platform`. A single query, as in the last layer, is always left to einsum.

    Asks JAX for its devices only if everything else fits.

    Args:
      attention: "auto", "einsum" or "cudnn".
      query: (batch, queries, heads, width).
      key: (batch, length, heads, width).
      dropout: the rate on the weights in this pass, in [0, 1).

    Raises:
      InputError: if ``attention`` is "cudnn" and the kernel cannot compute this, or there is no suitable GPU.
    """
    queries, length = query.shape[1], key.shape[1]
    if attention == EINSUM or queries == 1 or (attention == AUTO and queries < _FROM_LENGTH):
        return False
    reason = _misfit(query.dtype, query.shape[-1], queries, length, dropout) or _missing_gpu()
    if reason is not None and attention == CUDNN:
        raise InputError(f'attention="cudnn" {reason}; or use attention="auto"')
    return reason is None


def _misfit(dtype, width, queries, length, dropout) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {dtype} (dtype bfloat16)"
    if width > _WIDEST_HEAD or width % 8:
        return f"needs heads of at most {_WIDEST_HEAD} units, a multiple of 8, not {width}"
    if dropout > 0:
        return f"cannot drop weights, and attention dropout is {dropout}; set it to 0 (attention_dropout=0)"
    if queries % 2 or length % 2:
        return f"needs even lengths, not {queries} queries and {length} keys; pad the texts by one token"
    return None


def _missing_gpu() -> str | None:
    """What JAX's first device lacks, or None if it is an NVIDIA GPU with the matrix units that the kernel needs."""
    device = jax.devices()[0]
    if "cuda" in device.client.platform_version and float(device.compute_capability) >= _OLDEST_GPU:
        return None
    return f"needs an NVIDIA GPU, Ampere or newer; JAX runs on {device.device_kind} here"
