"""What the compiler makes of the shipped kernels, for GPUs that are not here."""
