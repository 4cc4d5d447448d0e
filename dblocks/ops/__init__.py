"""One file an op: schema, fake kernel, device implementations, autograd, checks and docstring."""
