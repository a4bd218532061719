"""Model execution: model card, tokenizer, engine, and the conversion of each task's output to predictions."""
