"""② Live migration of running inferences (paper §5): pure. Who moves what, and when, as tables of transitions."""
