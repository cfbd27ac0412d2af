"""Ancestry: what every model, evaluation and data set was made from, and what was made from it.

MLflow shows the direct inputs of a run; the way over many steps is put together here, from what the registry, the
store and DVC recorded.
"""

from rrlhf.lineage.graph import Graph, Link, Product
from rrlhf.lineage.load import from_versions, load
from rrlhf.lineage.text import tree

__all__ = ["Graph", "Link", "Product", "from_versions", "load", "tree"]
