"""What a person reads after a run, and the numbers behind it."""
