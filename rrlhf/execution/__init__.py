"""One run of the flows in Prefect: what each node makes, and what the pages show. The flows are in flows/."""
