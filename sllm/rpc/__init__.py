"""The wire: the only importer of grpc and protobuf. Everything that enters or leaves it is a value of `sllm.core`
or a message dataclass of the service's module; no protobuf type ever leaves this package."""
