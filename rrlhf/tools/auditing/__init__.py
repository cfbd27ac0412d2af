"""Whether everything that is kept is what was made."""
