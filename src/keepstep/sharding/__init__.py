"""DeepSpeed's buffers and files: where each parameter lies, and how another launch reads it."""
