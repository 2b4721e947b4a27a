"""DeBERTa's disentangled attention in NumPy, float64, pair by pair, from parameters by their names in the module."""

import math
from collections.abc import Mapping

import numpy as np


def bucket(distance: int, position_buckets: int, longest: int) -> int:
    """The bucket of a distance: its own up to half of the buckets, then on a log scale."""
    middle = position_buckets // 2
    if position_buckets <= 0 or abs(distance) <= middle:
        return distance
    steps = math.log(abs(distance) / middle) / math.log((longest - 1) / middle) * (middle - 1)
    return int(math.copysign(middle + math.ceil(steps), distance))


def attend(parameters: Mapping, config, hidden, mask, relative, *, prefix=None):
    """What one attention gives for each token, (batch, length, hidden).

    Args:
      parameters: ``query_proj`` and so on, with ``kernel`` and ``bias`` each.
      config: a `DebertaConfig`.
      hidden: (batch, length, hidden).
      mask: 1 for the tokens attended to, (batch, length).
      relative: relative embeddings, (rows, hidden).
      prefix: keys and values before the text's, (tokens, hidden) each, or None.
    """
    terms, heads = config.position_terms, config.num_attention_heads
    width = config.hidden_size // heads

    def project(name, x):
        layer = parameters[f"{name}_proj"]
        return (x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])).reshape(*x.shape[:-1], heads, width)

    hidden, relative = np.float64(hidden), np.float64(relative)
    of_key, of_query = ("key", "query") if config.share_att_key else ("pos_key", "pos_query")
    query, key, value = (project(name, hidden) for name in ("query", "key", "value"))
    length, span = hidden.shape[1], len(relative) // 2
    scores = np.einsum("bihd,bjhd->bhij", query, key)
    for i in range(length):
        for j in range(length):
            distance = bucket(i - j, config.position_buckets, config.longest_distance)
            row = relative[min(max(distance + span, 0), 2 * span - 1)]
            if "c2p" in terms:
                scores[:, :, i, j] += (query[:, i] * project(of_key, row)).sum(-1)
            if "p2c" in terms:
                scores[:, :, i, j] += (key[:, j] * project(of_query, row)).sum(-1)
    if prefix is not None:
        keys, values = (np.float64(part).reshape(len(part), heads, width) for part in prefix)
        scores = np.concatenate([np.einsum("bihd,jhd->bhij", query, keys), scores], axis=-1)
        value = np.concatenate([np.broadcast_to(values, (len(hidden), *values.shape)), value], axis=1)
        mask = np.concatenate([np.ones((len(hidden), len(keys))), mask], axis=1)
    weights = np.exp(scores / math.sqrt(width * (1 + len(terms)))) * mask[:, None, None]
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", weights, value).reshape(hidden.shape)
