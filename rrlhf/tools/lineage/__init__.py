"""Ancestry: what every model, evaluation and data set was made from, and what was made from it.

MLflow shows the direct inputs of a run; the way over many steps is put together here, from what the registry, the
store and DVC recorded.
"""
