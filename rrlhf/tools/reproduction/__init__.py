"""Reproduction: a version is made again from its key documents, beside what is kept, and the two are compared."""
