"""Views to test with, out of seeded numbers: one of each kind, one as large as a large model's, one of hostile text."""

import struct
import zlib

import numpy as np

from crossattention.views.pages import (
    AttentionLayer,
    AttentionView,
    FeedForwardView,
    ImageSide,
    KeyInput,
    LongSide,
    MemoryKey,
    MemoryLayer,
    SoundSide,
    TextSide,
)

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "' onload='window.pwned=1",
    "<!--",
    "]]>",
    "{{data}}",
    "&lt;b&gt;",
    "\u202eright to left",
    "\u200f\u05e9\u05dc\u05d5\u05dd",
    "x" * 10_000,
    "👩‍👩‍👧🎉",
    "\x00\x1b[31m\n\t",
    "",
    "  ",
    "$x^2$",
    "\u2028",
    "\ud800",
    "javascript:window.pwned=1",
]


def softmax(scores):
    """The softmax over the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def drawn_weights(*shape, seed=0):
    """Attention weights: rows that sum to one."""
    return softmax(2 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def png(width=64, height=48):
    """A picture whose red grows to the right and whose green grows downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, np.full_like(across, 128)], -1).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def text_view(layers=2, heads=3):
    """Phonemes on letters."""
    queries, context = ("S", "EH", "R"), tuple("serif")
    maps = [drawn_weights(heads, 3, 5, seed=seed) for seed in range(layers)]
    made = [AttentionLayer.of_weights(f"decoder.{i}", "cross-attention", weights) for i, weights in enumerate(maps)]
    return AttentionView("serif", TextSide(queries), TextSide(context), tuple(made))


def hostile_view():
    """Every text of it is hostile."""
    layer = AttentionLayer.of_weights("<b>layer</b>\x00", '"kind"', drawn_weights(2, len(HOSTILE), len(HOSTILE)))
    title = "</title><script>window.pwned=1</script>\u202e{{script}}"
    return AttentionView(title, TextSide(tuple(HOSTILE)), TextSide(tuple(HOSTILE[::-1])), (layer,))


def picture_view():
    """Words on a picture of 6 x 8 patches and a class token; the word "corner" reads the last patch."""
    weights = drawn_weights(2, 3, 1 + 6 * 8)
    weights[:, 2] = 0.25 / 48
    weights[:, 2, -1] = 0.75
    layer = AttentionLayer.of_weights("layer", "cross-attention", weights)
    return AttentionView("a picture", TextSide(("red", "green", "corner")), ImageSide(png(), 6, 8, ("[CLS]",)), (layer,))


def tone(hertz=1000.0, seconds=0.8, rate=8000):
    """A tone."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def sound_view():
    """Letters on a tone in 40 spans of 20 ms; the letter "b" reads spans 10 to 13."""
    weights = np.full((2, 2, 40), 0.5 / 40, np.float32)
    weights[:, 1] = 0.2 / 36
    weights[:, 1, 10:14] = 0.2
    layer = AttentionLayer.of_weights("layer", "cross-attention", weights)
    return AttentionView("a tone", TextSide(("a", "b")), SoundSide(tone(), 8000, 40), (layer,))


def long_view(n=4, m=50_000, k=8):
    """A few latents on 50,000 positions, of which most is read at 31,415."""
    draw = np.random.default_rng(0)
    indices = np.stack([[draw.choice(m, k, replace=False) for _ in range(n)] for _ in range(2)])
    indices[..., 0] = 31_415
    weights = np.sort(draw.dirichlet(np.ones(k), (2, n)), -1)[..., ::-1] * 0.8
    highlight = np.full((2, m), 0.2 * n / m, np.float32)
    for head in range(2):
        np.add.at(highlight[head], indices[head].reshape(-1), weights[head].reshape(-1))
    layer = AttentionLayer("encoder", "cross-attention", indices, weights, highlight)
    return AttentionView("latents", LongSide(n), LongSide(m, {31_415: "here", 7: "seven"}), (layer,))


def large_view(layers=26, heads=8, n=256, m=2_048, k=8):
    """As of a large model: 26 layers, 8 heads, 256 x 2,048."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(layers):
        at = (np.arange(n)[None, :, None] * m // n + draw.integers(-30, 30, (heads, n, k))) % m
        weights = draw.dirichlet(np.ones(k), (heads, n)) * 0.9
        made.append(AttentionLayer(f"model.decoder.layers.{index}", "cross-attention", at, weights, draw.random((heads, m))))
    sides = [TextSide(tuple(f"{name}{at}" for at in range(count))) for name, count in (("out", n), ("in", m))]
    return AttentionView("A large model", *sides, tuple(made))


def memory_view(tokens=("S", "</script><script>window.pwned=1</script>", "R")):
    """Two feed-forward layers of 16 keys."""
    draw = np.random.default_rng(0)
    layers = []
    for index in range(2):
        top = np.stack([draw.choice(16, 4, replace=False) for _ in tokens])
        coefficients = np.sort(draw.random((len(tokens), 4)), -1)[:, ::-1] * (index + 1)
        coefficients[:, -1] = 0.0
        known = {int(key): _key(int(key)) for key in np.unique(top)}
        layers.append(MemoryLayer(f"decoder.{index}", 16, top, coefficients, np.full(len(tokens), 5), known))
    return FeedForwardView("serif", TextSide(tuple(tokens)), tuple(layers), ("A note.",))


def _key(key):
    inputs = (KeyInput(("K", "AE", "T"), key % 3, 1.5, "cat"),)
    return MemoryKey(((f"P{key}", 2.0), ("</script>", -0.5)), inputs)
