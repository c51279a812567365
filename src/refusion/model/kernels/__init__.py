"""Triton kernels of the inference transformer, each with a plain twin in `refusion.model.ops` or `refusion.model.attention_ops`.

Nothing is imported here: the modules below need `triton`, which only machines with a GPU have to have.
"""
