"""The command line. Importing this package, or any verb in it, loads neither grpc nor an engine: verbs import what
they need when they run, so that `sllm --help` is fast."""
