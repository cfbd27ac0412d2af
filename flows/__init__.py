"""The Prefect flows: when each stage runs, and when it need not."""
