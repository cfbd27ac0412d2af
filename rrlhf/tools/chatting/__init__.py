"""Prompts answered by one or two models, side by side."""
