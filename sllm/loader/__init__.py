"""① Multi-tier checkpoint loading: the SSD store, the DRAM pool, and what to hold and evict.

No module here but `views` imports torch, and only engine hosts import `views`.
"""
