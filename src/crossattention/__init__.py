"""Cross-attention between two sequences: exact, planned, prepared once and read often, visible, trainable."""
