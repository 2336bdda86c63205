"""Pure decisions: which checkpoints stay, which one is resumed, when to save. No disk, no torch."""
