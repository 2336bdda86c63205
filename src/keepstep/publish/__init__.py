"""The best checkpoint on the Hugging Face Hub: once, whole, and nothing that should stay home."""
