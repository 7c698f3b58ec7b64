"""Evaluation of a causal language model: gets a model and a tokenizer, knows nothing of conversion or training."""
