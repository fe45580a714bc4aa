"""Where the controller keeps what was wanted: base (the Protocol), sqlite, memory (also the model in tests)."""
