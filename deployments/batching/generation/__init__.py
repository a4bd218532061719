"""What a language model computes in its next step, and what that costs."""
