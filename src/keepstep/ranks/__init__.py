"""The processes of one launch: collectives, signals, the watchdog, how an attempt ends."""
