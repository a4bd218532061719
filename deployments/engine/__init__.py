"""What runs a model: the card (what it is), the tokenizer, the engine, and each task's output to answer."""
