"""Language models: where they come from, and how their layers run, in training and in sampling."""
