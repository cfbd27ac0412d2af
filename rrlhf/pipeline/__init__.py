"""The machinery: the graph of nodes, keys, the store, running a stage, and the doors to DVC and MLflow."""
