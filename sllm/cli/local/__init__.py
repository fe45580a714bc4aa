"""The cluster of `sllm dev`: its files, its processes and who keeps them running."""
