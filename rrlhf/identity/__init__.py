"""Identity: the key of a result, from the code, the settings and the bytes behind it."""
