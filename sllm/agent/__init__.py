"""The agent: one per GPU server. It owns the checkpoint store, the DRAM pool, the devices and the engine hosts, carries
out the controller's commands, and reports. It decides nothing about placement, and imports neither torch nor vLLM."""
