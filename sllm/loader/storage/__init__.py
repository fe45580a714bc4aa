"""Where a partition's bytes come from: O_DIRECT reads of a file, or memory in tests."""
