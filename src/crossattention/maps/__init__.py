"""What A looks at in B."""

from crossattention.maps.compute import attention_map

__all__ = ["attention_map"]
