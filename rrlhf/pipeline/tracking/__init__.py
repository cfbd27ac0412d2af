"""MLflow, the memory: every flow and stage is a run, every trained model a registered version, linked to its inputs.

Training never waits for this package, and registering never trains: a version is looked up by the key and the digest
of its artifact, so a new or emptied server is filled again from the artifacts. Only this package imports mlflow, and
only when something is asked of it, because that import takes seconds.
"""
