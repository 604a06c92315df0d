"""The torch backend: PyTorch operators on any device."""
