"""How good a reward model is: accuracy, calibration, agreement of its heads, and robustness to perturbed text."""
