"""Versions of data sets, by DVC."""
