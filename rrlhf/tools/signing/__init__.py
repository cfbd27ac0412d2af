"""Signatures of artifacts, and the commands that make them."""
