"""Sweeps: the same product at every point of a grid of settings, with what is equal made once."""
