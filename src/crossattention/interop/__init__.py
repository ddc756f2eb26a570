"""Other libraries' modules: taken over, looked into, sped up. One file a library."""

from crossattention.interop.huggingface_kernel import register_attention
from crossattention.interop.onnx import OnnxExport, export_onnx
from crossattention.interop.record import Recording, record_attention
from crossattention.interop.recording import Layer, Recorded
from crossattention.interop.speed_up import Changes, speed_up
from crossattention.interop.torch_nn import from_multihead_attention

__all__ = [
    "Changes",
    "Layer",
    "OnnxExport",
    "Recorded",
    "Recording",
    "export_onnx",
    "from_multihead_attention",
    "record_attention",
    "register_attention",
    "speed_up",
]
