"""What every process shows of itself at each export: CPU, memory, GPUs."""
