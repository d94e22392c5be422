"""Tasks of language models: batches for training, predictions, and test results."""
