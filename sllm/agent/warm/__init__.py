"""The warm process, from which engine hosts are forked: a process that has imported everything already."""
