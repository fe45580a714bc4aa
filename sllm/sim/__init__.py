"""The whole cluster in memory, on a virtual clock: nodes, loads, requests and time are simulated, decisions are not.

The core (all but `scenario`, `traces` and `plotting`, which are its edge) reads no file and no clock; its randomness
is drawn from seeds that it is given. The same world and seed give the same run.
"""
