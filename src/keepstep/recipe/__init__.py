"""What a run is asked to do: its fields, how they are read, and what follows from them."""
