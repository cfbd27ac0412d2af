"""`rrlhf evaluate-reward`: one reward model, judged and reported."""
