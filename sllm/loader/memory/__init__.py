"""The DRAM tier: shared memory regions and how they are filled."""
