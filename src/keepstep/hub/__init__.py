"""The client of the Hub: what publishing and mirrors share."""
