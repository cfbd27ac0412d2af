"""Policies: what trains, samples and is judged in reinforcement learning, and how its training is watched."""
