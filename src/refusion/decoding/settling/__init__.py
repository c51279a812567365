"""What one forward of plan-and-infill decoding decides: readout to next state and report, for padded and flat rows alike.

Tensor functions of fixed shape without a look at the data, so that they can be captured in a CUDA graph; every request is judged by every
rule, and its phase picks which one counts. The modules are named as those of `refusion.decoding.kernels`, which do the same in one launch.
"""
