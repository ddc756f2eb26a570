"""Other libraries' modules: taken over, looked into, sped up. One file a library."""

from crossattention.interop.torch_nn import from_multihead_attention

__all__ = ["from_multihead_attention"]
