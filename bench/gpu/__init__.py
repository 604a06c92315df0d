"""Everything that a GPU is wanted for: in stages, each of which can fail alone. See ../GPU.md."""
