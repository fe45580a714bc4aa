"""Memory that checkpoints are loaded into: the pool that processes share and its table, the pools of the library,
devices, and the address ranges under all of them."""
