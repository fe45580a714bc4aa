"""The store process: owns a node's DRAM pool and does all its reading; and the agent's side of it."""
