"""Triton kernels of the rounds, each with the effect of the plain tensor functions beside which it stands.

Nothing is imported here: the modules below need `triton`, which only machines with a GPU have to have.
"""
