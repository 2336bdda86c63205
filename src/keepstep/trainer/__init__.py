"""All that knows transformers and TRL: the Trainer's part in saving, resuming and stopping."""
