"""Fused dense and sparse gradients for training language models with a teacher and a reward."""

from hybrid_kernels.api import hybrid_loss, linear_hybrid_loss, linear_token_terms, token_terms
from hybrid_kernels.divergences import Divergence, available_divergences
from hybrid_kernels.output_layers import output_layer
from hybrid_kernels.returns import returns_to_go, sparse_advantages
from hybrid_kernels.types import HybridLoss, LinearTeacher, Mixture, OutputLayer, TokenTerms, TopK

__version__ = "0.1.0.dev0"

__all__ = [
    "Divergence",
    "HybridLoss",
    "LinearTeacher",
    "Mixture",
    "OutputLayer",
    "TokenTerms",
    "TopK",
    "available_divergences",
    "hybrid_loss",
    "linear_hybrid_loss",
    "linear_token_terms",
    "output_layer",
    "returns_to_go",
    "sparse_advantages",
    "token_terms",
]
