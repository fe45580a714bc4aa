"""The controller: the only decider. One writer; events in, plans out; agents carry them out."""
