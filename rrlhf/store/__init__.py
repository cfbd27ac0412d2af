"""The store of artifacts, and what else is kept in files."""
