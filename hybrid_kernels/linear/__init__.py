"""Losses from hidden states and an output layer, in chunks of rows."""
