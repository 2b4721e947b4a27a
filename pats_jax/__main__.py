"""`python -m pats_jax` is `pats-jax`."""

from pats_jax.programs.cli import main

if __name__ == "__main__":
    main()
