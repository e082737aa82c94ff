"""What mixed lengths cost an attention kernel: the kernels by themselves, on batches in pairs."""
