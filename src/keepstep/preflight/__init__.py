"""What is wrong with a run, found before hours are spent on it."""
