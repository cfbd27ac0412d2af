"""Preference data: rows, the tables that hold them, and their fingerprints."""
