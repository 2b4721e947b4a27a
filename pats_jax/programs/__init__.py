"""Programs beside `pats_jax.glue`: predict and submission."""
