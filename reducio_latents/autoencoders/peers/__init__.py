"""Autoencoders of the paper's table that diffusers lacks."""
