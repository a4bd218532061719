"""What a model's output becomes: scores, predictions, tensors."""
