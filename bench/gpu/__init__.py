"""Everything that needs a GPU, in stages that fail independently. See ../GPU.md."""
