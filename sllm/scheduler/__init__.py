"""Decisions about replicas, all pure: values in, values out; `now` is an argument."""
