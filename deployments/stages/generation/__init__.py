"""The stages of a language model: prompt to tokens, steps, tokens to text, and the stream."""
