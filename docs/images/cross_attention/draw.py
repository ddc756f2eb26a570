"""Draws the figures of docs/cross_attention.md: `python docs/images/cross_attention/draw.py [FOLDER]`.

A is blue and B is orange (of the palette of Okabe and Ito, told apart by the colour-blind), what is neither is grey; arrows show
where data goes. Text stays text. The ground is opaque, so that a figure reads the same on a light and on a dark page. Sizes are in
pixels of a figure 700 wide.
"""

import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

WIDTH = 700
STYLE = (
    'text{font:14px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;fill:#1f2328}'
    ".t{font-weight:600}.s{font-size:12.5px;fill:#4a5159}"
    "rect,path,line{stroke-width:1.5}path{fill:none}"
    ".a{fill:#d3e6f5;stroke:#0072b2}.b{fill:#fce0cf;stroke:#d55e00}.n{fill:#f1f3f5;stroke:#57606a}.d{stroke-dasharray:4 3}"
    ".la{stroke:#0072b2}.lb{stroke:#d55e00}.ln{stroke:#57606a}"
    ".ha{fill:#0072b2}.hb{fill:#d55e00}.hn{fill:#57606a}.w{fill:#1f2328;stroke:#57606a}.m{fill:#d55e00;stroke:#d55e00}"
    ".o{stroke:#fff;stroke-width:5;paint-order:stroke}"
)
HEAD = 9  # length of an arrow's head


class Figure:
    """One figure, drawn from back to front."""

    def __init__(self, height: int, title: str, description: str) -> None:
        self.height = height
        self.parts = [f"<title>{escape(title)}</title>", f"<desc>{escape(description)}</desc>", f"<style>{STYLE}</style>"]
        self.parts.append(f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>')

    def text(self, x: float, y: float, text: str, *, kind: str = "", at: str = "middle") -> None:
        """A line of text; kind "t" is a title, "s" is small, "o" has a white rim."""
        shown = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{at}"{shown}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """A box with centred lines of text, the first of usual size."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>')
        top = y + height / 2 + 5 - 8 * (len(lines) - 1)
        for index, line in enumerate(lines):
            self.text(x + width / 2, top + 16 * index, line, kind="s" if index else "")

    def cells(
        self,
        x: float,
        y: float,
        count: int,
        kind: str,
        *,
        width: float = 26,
        height: float = 26,
        gap: float = 4,
        down: bool = False,
    ) -> None:
        """A sequence: one cell a position, from left to right or down."""
        for index in range(count):
            dx, dy = (0, index * (height + gap)) if down else (index * (width + gap), 0)
            self.box(x + dx, y + dy, width, height, kind)

    def labelled(self, x: float, y: float, labels: Sequence[str], kind: str, *, width: float = 26, gap: float = 4) -> None:
        """A sequence whose cells have labels."""
        for index, label in enumerate(labels):
            self.box(x + index * (width + gap), y, width, 26, kind, label)

    def weights(self, x: float, y: float, rows: Sequence[Sequence[float]], *, size: float = 18) -> None:
        """A matrix of weights, the darker the larger."""
        for i, row in enumerate(rows):
            for j, weight in enumerate(row):
                place = f'x="{x + j * (size + 2):g}" y="{y + i * (size + 2):g}" width="{size:g}" height="{size:g}"'
                self.parts.append(f'<rect class="w" {place} fill-opacity="{weight:.2f}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, *, width: float = 1.5, opacity: float = 0.45) -> None:
        """A line without a head: what reads what, as wide as its weight."""
        style = f'style="stroke-width:{width:.2f}" opacity="{opacity:g}"'
        self.parts.append(f'<line class="l{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" {style}/>')

    def arrow(self, kind: str, *points: tuple[float, float], dashed: bool = False) -> None:
        """An arrow along points; it ends exactly in the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        bx, by = x1 - ux * HEAD, y1 - uy * HEAD
        way = " ".join(f"{x:g},{y:g}" for x, y in [*points[:-1], (round(bx, 1), round(by, 1))])
        self.parts.append(f'<path class="l{kind}{" d" if dashed else ""}" d="M{way}"/>')
        head = [(x1, y1), (bx - uy * HEAD / 2, by + ux * HEAD / 2), (bx + uy * HEAD / 2, by - ux * HEAD / 2)]
        self.parts.append(f'<polygon class="h{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in head)}"/>')

    def svg(self) -> str:
        """The file's text."""
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        return "\n".join([head, *self.parts, "</svg>\n"])


def softmax(scores: Sequence[float]) -> list[float]:
    """Weights of a row of scores."""
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def sequences() -> Figure:
    """Queries come from A, keys and values from B."""
    fig = Figure(
        316,
        "Queries come from A, keys and values from B",
        "A is projected to queries; B to keys and to values. Queries and keys give weights, and the values, summed with these "
        "weights, give an output as long as A.",
    )
    fig.text(32, 68, "A", kind="t")
    fig.cells(52, 50, 3, "a")
    fig.text(32, 188, "B", kind="t")
    fig.cells(52, 170, 5, "b")
    fig.box(256, 46, 100, 34, "a", "queries")
    fig.box(256, 146, 100, 34, "b", "keys")
    fig.box(256, 202, 100, 34, "b", "values")
    fig.arrow("a", (138, 63), (256, 63))
    fig.text(197, 56, "Wq", kind="s")
    fig.arrow("b", (198, 178), (226, 178), (226, 163), (256, 163))
    fig.arrow("b", (198, 188), (226, 188), (226, 219), (256, 219))
    fig.text(240, 157, "Wk", kind="s")
    fig.text(240, 234, "Wv", kind="s")
    rows = [softmax(scores) for scores in ([2, 1, 0, 0, -1], [0, 2, 1, 0, 0], [-1, 0, 0, 1, 2.5])]
    fig.weights(410, 54, rows)
    fig.text(478, 44, "weights: softmax of queries · keys", kind="s")
    fig.arrow("a", (356, 63), (384, 63), (384, 83), (408, 83))
    fig.arrow("b", (356, 163), (459, 163), (459, 114))
    fig.box(540, 196, 136, 46, "n", "sums of values", "with these weights")
    fig.arrow("n", (510, 83), (608, 83), (608, 196))
    fig.arrow("b", (356, 219), (540, 219))
    fig.arrow("a", (608, 242), (608, 270))
    fig.text(620, 261, "Wo", kind="s", at="start")
    fig.cells(565, 270, 3, "a")
    fig.text(552, 288, "output: one position for each of A", at="end")
    return fig


def shape() -> Figure:
    """A gives the output its shape."""
    fig = Figure(
        280,
        "A gives the output its shape",
        "One layer reads a B of 3 positions and a B of 700, of width 32. With 5 queries of width 48 both outputs are "
        "5 positions of width 48.",
    )
    fig.text(374, 60, "A: n = 5, width 48", at="end")
    fig.cells(387, 30, 5, "a", width=14, height=48)
    fig.arrow("a", (430, 78), (430, 116))
    fig.box(366, 116, 128, 142, "n", "cross-attention")
    fig.text(218, 155, "B: m = 3, width 32", at="end")
    fig.cells(230, 134, 3, "b", width=14, height=32)
    fig.arrow("b", (280, 150), (366, 150))
    fig.cells(60, 208, 7, "b", width=14, height=32)
    fig.text(205, 228, "· · ·")
    fig.cells(230, 208, 3, "b", width=14, height=32)
    fig.text(170, 262, "B: m = 700, width 32")
    fig.arrow("b", (280, 224), (366, 224))
    fig.text(604, 112, "output: n = 5, width 48")
    for middle in (150, 224):
        fig.arrow("a", (494, middle), (556, middle))
        fig.cells(562, middle - 24, 5, "a", width=14, height=48)
    return fig


def self_and_cross() -> Figure:
    """Self-attention is the case A = B."""
    fig = Figure(
        246,
        "Self-attention is the case A = B",
        "Left: four positions of one sequence read the same four; the weights are a square. Right: three positions of A read six "
        "of B; the weights are a rectangle.",
    )
    fig.text(30, 34, "self-attention: A reads A", kind="t", at="start")
    fig.text(376, 34, "cross-attention: A reads B", kind="t", at="start")
    panels = (
        (30, [30 + 40 * index for index in range(4)], [30 + 40 * index for index in range(4)], "a"),
        (376, [425 + 36 * index for index in range(3)], [376 + 34 * index for index in range(6)], "b"),
    )
    for x, asked, xs, kind in panels:
        for top in asked:
            for bottom in xs:
                fig.line(top + 13, 100, bottom + 13, 168, kind)
        for top in asked:
            fig.box(top, 74, 26, 26, "a")
        for bottom in xs:
            fig.box(bottom, 168, 26, 26, kind)
        fig.text(x, 64, "queries", kind="s", at="start")
        fig.text(x, 214, "keys and values", kind="s", at="start")
    square = [softmax(row) for row in ([2, 1, 0, 0], [0, 2, 1, 0], [1, 0, 2, 0], [0, 0, 1, 2])]
    fig.weights(220, 100, square, size=14)
    fig.text(251, 186, "weights: n x n", kind="s")
    oblong = [softmax(row) for row in ([2, 1, 0, 0, 0, 0], [0, 0, 2, 1, 0, 0], [0, 0, 0, 0, 1, 2.5])]
    fig.weights(592, 108, oblong, size=14)
    fig.text(639, 176, "weights: n x m", kind="s")
    return fig


def highlight() -> Figure:
    """The weights of A highlight in B: the numbers of the page's example."""
    rows = [softmax([0, 3, 0, 0, 0]), softmax([0, 0, 2, 2, 0])]
    fig = Figure(
        252,
        "The weights of A highlight in B",
        "Two queries read five positions. Lines are as wide as the weights. The first reads the second position, the other "
        "the third and the fourth; each position is shaded by the mass that it receives: "
        + ", ".join(f"{sum(column):.2f}" for column in zip(*rows, strict=True))
        + ".",
    )
    xs = [206 + 82 * index for index in range(5)]
    for top, row in zip((292, 452), rows, strict=True):
        for x, weight in zip(xs, row, strict=True):
            fig.line(top, 66, x, 146, "a", width=18 * weight, opacity=0.6)
        fig.box(top - 20, 30, 40, 36, "a")
    for top, row in zip((292, 452), rows, strict=True):
        for x, weight in zip(xs, row, strict=True):
            if weight > 0.3:
                fig.text(x + (top - x) * 0.35, 122, f"{weight:.2f}", kind="s o")
    for index, x in enumerate(xs):
        mass = sum(row[index] for row in rows)
        fig.parts.append(f'<rect class="m" x="{x - 26}" y="146" width="52" height="40" rx="3" fill-opacity="{mass:.2f}"/>')
        fig.text(x, 206, f"{mass:.2f}")
    fig.text(32, 53, "A: two queries", at="start")
    fig.text(32, 171, "B: five positions", at="start")
    fig.text(32, 206, "mass received", at="start")
    fig.text(370, 236, "a row of weights sums to 1; the masses sum to the number of queries", kind="s")
    return fig


def modalities() -> Figure:
    """A and B may be of two modalities."""
    fig = Figure(
        278,
        "A and B may be of two modalities",
        "Three pairs: words read the patches of an image, letters read the frames of a sound, pixels read the words of a prompt.",
    )
    for x, title in ((124, "words read an image"), (350, "text reads sound"), (576, "pixels read a prompt")):
        fig.text(x, 34, title, kind="t")
    fig.text(24, 78, "A", kind="t")
    fig.text(24, 206, "B", kind="t")
    fig.labelled(53, 60, ["a", "red", "kite"], "a", width=44, gap=5)
    fig.arrow("b", (124, 140), (124, 90))
    for row in range(6):
        for column in range(6):
            fig.box(74 + 17 * column, 144 + 17 * row, 15, 15, "m" if (row, column) in {(1, 3), (1, 4), (2, 3), (2, 4)} else "b")
    fig.text(124, 264, "patches", kind="s")
    fig.labelled(277, 60, list("hello"), "a")
    fig.arrow("b", (350, 150), (350, 90))
    for index in range(18):
        height = 14 + 62 * abs(math.sin(0.55 * index) * math.cos(0.17 * index))
        fig.box(265 + 9.5 * index, 201 - height / 2, 6, round(height, 1), "b")
    fig.text(350, 264, "frames", kind="s")
    for row in range(5):
        fig.cells(533.5, 52 + 17 * row, 5, "a", width=15, height=15, gap=2)
    fig.arrow("b", (576, 190), (576, 139))
    fig.labelled(504, 194, ["a", "red", "kite"], "b", width=44, gap=5)
    fig.text(576, 264, "words", kind="s")
    return fig


def feed_forward() -> Figure:
    """The feed-forward layer is attention over a static B."""
    fig = Figure(
        306,
        "The feed-forward layer is attention over a static B",
        "Left: keys and values are made of a B that comes with the input, and scores go through a softmax. Right: "
        "keys are the rows of the first matrix, values the columns of the second, and scores go through a ReLU.",
    )
    for x, title, between in ((0, "cross-attention", "softmax"), (340, "feed-forward layer", "ReLU")):
        fig.text(x + 24, 34, title, kind="t", at="start")
        fig.text(x + 102, 77, "x", at="end")
        fig.box(x + 112, 58, 26, 26, "a")
        fig.arrow("a", (x + 125, 84), (x + 125, 116))
        fig.box(x + 236, 58, 26, 26, "a")
        fig.text(x + 272, 77, "output", at="start")
        fig.arrow("a", (x + 249, 116), (x + 249, 84))
        fig.text(x + 187, 108, between, kind="s")
        dashed = " d" if x else ""
        for row in range(4):
            fig.box(x + 90, 120 + 32 * row, 70, 26, "b" + dashed, f"key {row + 1}")
            fig.arrow("n", (x + 160, 133 + 32 * row), (x + 214, 133 + 32 * row))
            fig.box(x + 214, 120 + 32 * row, 70, 26, "b" + dashed, f"value {row + 1}")
    fig.text(27, 110, "B", kind="t")
    fig.cells(14, 120, 4, "b", gap=6, down=True)
    for row in range(4):
        fig.arrow("b", (40, 133 + 32 * row), (90, 133 + 32 * row))
    fig.text(187, 272, "made of B, which comes with the input", kind="s")
    fig.text(463, 272, "rows of W1", kind="s")
    fig.text(591, 272, "columns of W2", kind="s")
    fig.text(527, 290, "weights of the layer: the same for every input", kind="s")
    return fig


def decoder() -> Figure:
    """The decoder of 2017 reads the encoder."""
    fig = Figure(
        344,
        "The decoder of 2017 reads the encoder",
        "Six encoder layers stand on the source. The output of the last one goes to the cross-attention of each of the six decoder "
        "layers, between causal self-attention and feed-forward.",
    )
    fig.cells(60, 294, 5, "b")
    fig.text(216, 312, "source", at="start")
    fig.arrow("b", (133, 294), (133, 258))
    fig.box(48, 224, 170, 34, "b", "encoder layer 1")
    fig.arrow("b", (133, 224), (133, 132))
    fig.text(144, 186, "layers 2 to 5", kind="s", at="start")
    fig.box(48, 98, 170, 34, "b", "encoder layer 6")
    for layer, y in ((6, 72), (1, 204)):
        fig.box(306, y, 378, 62, "n")
        fig.box(314, y + 8, 108, 46, "a", "self-attention", "causal")
        fig.box(438, y + 8, 116, 46, "a", "cross-attention")
        fig.box(570, y + 8, 106, 46, "a", "feed-forward")
        fig.arrow("a", (422, y + 31), (438, y + 31))
        fig.arrow("a", (554, y + 31), (570, y + 31))
        fig.text(306, y + 78 if layer == 1 else y - 8, f"decoder layer {layer}", kind="s", at="start")
    fig.arrow("b", (133, 98), (133, 46), (496, 46), (496, 80))
    fig.arrow("b", (262, 46), (262, 184), (496, 184), (496, 212))
    fig.arrow("a", (623, 212), (623, 158), (368, 158), (368, 126))
    fig.text(496, 152, "layers 2 to 5", kind="s")
    fig.arrow("a", (623, 80), (623, 34))
    fig.text(612, 30, "next symbols", at="end")
    fig.cells(296, 298, 5, "a")
    fig.arrow("a", (409, 298), (409, 258))
    fig.text(454, 316, "target so far", at="start")
    return fig


def bert() -> Figure:
    """BERT with cross-attention: one sublayer more."""
    fig = Figure(
        250,
        "BERT with cross-attention: one sublayer more",
        "A layer of BERT, made causal, with cross-attention between self-attention and feed-forward; it reads the "
        "output of another BERT.",
    )
    fig.cells(28, 49, 4, "b")
    fig.text(85, 38, "what is read", kind="s")
    fig.arrow("b", (144, 62), (258, 62))
    fig.box(258, 42, 190, 40, "b", "BERT: 12 layers")
    fig.arrow("b", (353, 82), (353, 124))
    fig.cells(16, 137, 3, "a", width=22, gap=3)
    fig.text(52, 126, "text so far", kind="s")
    for x, first, second in (
        (124, "self-attention", "causal; sum, norm"),
        (288, "cross-attention", "sum, norm"),
        (452, "feed-forward", "sum, norm"),
    ):
        fig.box(x, 124, 130, 52, "a" if first == "cross-attention" else "n", first, second)
    fig.arrow("a", (88, 150), (124, 150))
    fig.arrow("a", (254, 150), (288, 150))
    fig.arrow("a", (418, 150), (452, 150))
    fig.arrow("a", (582, 150), (612, 150))
    fig.cells(614, 137, 3, "a", width=22, gap=3)
    fig.text(189, 198, "from BERT", kind="s")
    fig.text(353, 198, "new: random at first", kind="s")
    fig.text(517, 198, "from BERT", kind="s")
    fig.text(353, 230, "twelve such layers; all of them read the same output", kind="s")
    return fig


def retro() -> Figure:
    """RETRO reads what it looked up, one chunk late."""
    fig = Figure(
        318,
        "RETRO reads what it looked up, one chunk late",
        "Twelve tokens in three chunks of four. The neighbours of chunk 1 are read by token 4 and tokens 5 to 7, "
        "those of chunk 2 by token 8 and tokens 9 to 11, those of chunk 3 by token 12. Tokens 1 to 3 read nothing.",
    )
    left, step = 60, 40
    for chunk in range(3):
        x = left + 4 * step * chunk
        fig.text(x + 2 * step - 3, 34, f"chunk {chunk + 1}", kind="t")
        fig.labelled(x, 50, [str(4 * chunk + i + 1) for i in range(4)], "a", width=34, gap=6)
        x += 3 * step
        real = 34 if chunk == 2 else 4 * step - 6
        fig.box(x, 106, real, 34, "a", *([] if chunk == 2 else [f"window {chunk + 1}"]))
        fig.arrow("a", (x + real / 2, 76), (x + real / 2, 106))
        if chunk == 2:
            fig.box(x + 40, 106, 114, 34, "n d", "padding")
        fig.arrow("b", (x + real / 2, 196), (x + real / 2, 140))
        for neighbour in range(2):
            fig.box(x, 196 + 36 * neighbour, 154, 28, "b", f"neighbour {neighbour + 1}")
        fig.text(x + 77, 280, f"of chunk {chunk + 1}", kind="s")
    fig.text(left + 14, 122, "these read", kind="s", at="start")
    fig.text(left + 14, 138, "nothing", kind="s", at="start")
    fig.arrow("n", (left + 4, 76), (left + 4, 228), (left + 3 * step, 228), dashed=True)
    fig.text(left + 14, 220, "chunk 1 looks", kind="s", at="start")
    fig.text(left + 14, 246, "them up", kind="s", at="start")
    fig.text(350, 304, "each chunk looks up its own neighbours; drawn for chunk 1", kind="s")
    return fig


def crossvit() -> Figure:
    """CrossViT: a class token visits the other branch."""
    fig = Figure(
        300,
        "CrossViT: a class token visits the other branch",
        "The class token of the branch of large patches is projected by f, stands among the small patches, reads them "
        "and itself as the only query, is projected back by g, and takes its old place; its own patches are not "
        "changed.",
    )
    fig.labelled(60, 58, ["cls"], "a")
    fig.cells(90, 58, 6, "a")
    fig.text(95, 104, "large patches: 196 of width 384", kind="s", at="start")
    fig.arrow("a", (73, 84), (73, 206))
    fig.text(62, 148, "f", at="end")
    fig.labelled(60, 206, ["cls"], "a")
    fig.cells(92, 208, 9, "b", width=20, height=22, gap=3)
    fig.text(95, 198, "small patches: 400 of width 192", kind="s", at="start")
    fig.box(392, 196, 140, 46, "n", "cross-attention", "width 192")
    fig.arrow("b", (298, 219), (392, 219))
    fig.text(345, 211, "keys, values", kind="s")
    fig.arrow("a", (73, 232), (73, 268), (462, 268), (462, 242))
    fig.text(268, 286, "query: the class token alone", kind="s")
    fig.arrow("a", (493, 196), (493, 84))
    fig.text(504, 148, "g", at="start")
    fig.labelled(480, 58, ["cls"], "a")
    fig.cells(510, 58, 6, "a")
    fig.arrow("a", (178, 58), (178, 36), (598, 36), (598, 58))
    fig.text(388, 28, "patches: unchanged", kind="s")
    fig.text(612, 170, "at once, the small", kind="s")
    fig.text(612, 186, "branch's class token", kind="s")
    fig.text(612, 202, "visits the large one", kind="s")
    return fig


def perceiver() -> Figure:
    """Perceiver IO: read, think, be read."""
    fig = Figure(
        318,
        "Perceiver IO: read, think, be read",
        "256 latents read 2,048 inputs by cross-attention, attend to themselves in 26 layers, and are read by 2,048 output queries "
        "in a second cross-attention.",
    )
    for x, first, second, kind in (
        (54, "inputs", "2,048 x 768", "b"),
        (238, "latents", "256 x 1,280", "a"),
        (440, "latents", "256 x 1,280", "b"),
        (624, "output queries", "2,048 x 768", "a"),
    ):
        is_long = second.startswith("2,048")
        fig.cells(
            x - 11, 58 if is_long else 110, 11 if is_long else 4, kind, width=22, height=14 if is_long else 20, gap=4, down=True
        )
        fig.text(x, 276, first)
        fig.text(x, 296, second, kind="s")
    for x, side in ((54, "B"), (238, "A"), (440, "B"), (624, "A")):
        fig.text(x, 44, side, kind="t")
    fig.arrow("b", (72, 156), (222, 156))
    fig.text(147, 132, "cross-attention", kind="s")
    fig.text(147, 148, "encode", kind="s")
    fig.arrow("a", (254, 156), (424, 156))
    fig.text(339, 132, "self-attention, 26 times", kind="s")
    fig.text(339, 148, "process", kind="s")
    fig.arrow("b", (456, 156), (608, 156))
    fig.text(532, 132, "cross-attention", kind="s")
    fig.text(532, 148, "decode", kind="s")
    return fig


FIGURES = (
    sequences,
    shape,
    self_and_cross,
    highlight,
    modalities,
    feed_forward,
    decoder,
    bert,
    retro,
    crossvit,
    perceiver,
)


def main(folder: Path) -> None:
    """Write every figure into the folder, under its function's name."""
    for draw in FIGURES:
        (folder / f"{draw.__name__}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
