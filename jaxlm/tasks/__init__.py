"""Tasks of language models: fine-tuning, evaluation and predictions."""
