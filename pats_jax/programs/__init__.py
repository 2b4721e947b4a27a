"""The programs besides `pats_jax.glue`."""
