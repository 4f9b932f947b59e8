"""Take models over from other libraries, and back.

One module a library; none is imported with ``ant_jax``, and none imports its library before it needs it::

    from ant_jax.interop import torch as ant_torch
"""
