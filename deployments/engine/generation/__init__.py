"""Language models: steps of many sequences on transformers' paged cache, and the choice of the next token."""
