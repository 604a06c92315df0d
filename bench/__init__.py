import warnings

# What is measured and checked as one form must not run as another.
warnings.filterwarnings("error", message="hybrid_kernels: .* refused")
