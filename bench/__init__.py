import warnings

# After a refusal another form of the kernels runs, whose times and errors are not those asked for.
warnings.filterwarnings("error", message="hybrid_kernels: .* refused")
