"""The stages: each a module with one public `run(params, inputs, out, log)`. None imports another."""
