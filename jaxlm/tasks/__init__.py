"""Tasks of language models: data for fine-tuning, evaluation and predictions."""
