"""The engine host: one replica's engine in a process of its own, forked from a warm process that has imported it all.

A map: `warm` forks hosts, `process` makes the forked child one, `host` serves it, `thread` runs its engine, `requests`
knows whose request is whose. `base` is what an engine is; `vllm_*` (the only modules that know vLLM's names) and `fake`
are the two there are.
"""
