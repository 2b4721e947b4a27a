"""Optax-side methods that people compare PATS with: DPS, Child-Tuning, Mixout, L2-SP, SIFT."""
