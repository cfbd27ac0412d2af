"""The toy of Reward-Robust RLHF (Yan et al. 2024, arXiv 2409.15360): 8 prompts, 8 responses, everything exact.

The policy's optimum is known in closed form, so what a learned reward does to a policy can be read without noise of
sampling or of optimisation.
"""
