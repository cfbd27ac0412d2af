"""Reward models: heads on pooled features of a trunk, how they are trained, and how they score text."""
