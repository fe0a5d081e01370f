"""The parts of a block. Each is an nn.Module whose parameter names are those of the official checkpoints."""
