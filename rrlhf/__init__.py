"""Reward-robust RLHF as a reproducible pipeline."""
