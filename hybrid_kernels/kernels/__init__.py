"""Everything that imports Triton."""
