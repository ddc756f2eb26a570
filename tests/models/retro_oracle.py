"""RETRO token by token, from the paper's algorithm and a state dict alone; and its listing 1, typed again."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoids(distance: int, dim: int) -> Tensor:
    angles = [distance / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)], dtype=torch.float64)


class Oracle:
    """The logits of a model, of its config and state dict."""

    def __init__(self, config, weights: dict[str, Tensor]) -> None:
        self.config, self.w = config, weights

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.w[f"{name}.weight"]

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w[f"{name}.up_proj.weight"].T) @ self.w[f"{name}.down_proj.weight"].T

    def attend(self, name: str, heads: int, a: Tensor, p: list[int], b: Tensor, s: list[int], may_read) -> Tensor:
        """Rows (n, a) at p read rows (m, b) at s where `may_read(i, j)`; a row that may read nothing gets zero."""
        q = (a @ self.w[f"{name}.q_proj.weight"].T + self.w[f"{name}.q_proj.bias"]).unflatten(-1, (heads, -1))
        k, v = ((b @ self.w[f"{name}.{which}_proj.weight"].T).unflatten(-1, (heads, -1)) for which in "kv")
        r_proj, bias = self.w[f"{name}.positions.r_proj.weight"], self.w[f"{name}.positions.bias"]
        distances = range(min(p) - max(s), max(p) - min(s) + 1)
        r = {d: (r_proj @ sinusoids(d, r_proj.shape[1])).unflatten(0, (heads, -1)) for d in distances}
        out = []
        for i in range(len(a)):
            seen = [j for j in range(len(b)) if may_read(i, j)]
            if not seen:
                out.append(torch.zeros_like(v[0]).flatten())
                continue
            at = torch.stack([r[p[i] - s[j]] for j in seen])
            content = torch.einsum("hk,jhk->hj", q[i], k[seen])
            position = torch.einsum("hk,jhk->hj", q[i] + bias, at)
            weights = ((content + position) / math.sqrt(q.shape[-1])).softmax(-1)
            out.append(torch.einsum("hj,jhk->hk", weights, v[seen]).flatten())
        return torch.stack(out) @ self.w[f"{name}.out_proj.weight"].T

    def encode(self, ids: Tensor, chunk: Tensor, real: Tensor) -> Tensor:
        """One neighbour (r,), of a chunk with activations (c, d)."""
        config, r = self.config, len(ids)
        table = self.w["embedding.weight" if config.shared_embedding else "encoder.embedding.weight"]
        x = math.sqrt(table.shape[1]) * table[ids]
        for n in range(config.encoder_layers):
            name = f"encoder.layers.{n}"
            y = self.norm(f"{name}.self_attention_norm", x)
            places = list(range(r))
            x = x + self.attend(f"{name}.self_attention", config.encoder_heads, y, places, y, places, lambda i, j: bool(real[j]))
            if n + 1 in config.encoder_cross_layers:
                y, h = self.norm(f"{name}.cross_attention_norm", x), self.norm(f"{name}.chunk_norm", chunk)
                x = x + self.attend(
                    f"{name}.cross_attention", config.encoder_heads, y, places, h, list(range(len(h))), lambda i, j: True
                )
            x = x + self.feed_forward(f"{name}.feed_forward", self.norm(f"{name}.feed_forward_norm", x))
        return self.norm("encoder.norm", x)

    def logits(self, ids: Tensor, neighbours: Tensor | None, mask: Tensor | None) -> Tensor:
        """Of one sequence (n,) with neighbours (l, k, r)."""
        config, n = self.config, len(ids)
        c = config.chunk_length
        h, encoded = math.sqrt(config.dim) * self.w["embedding.weight"][ids], None
        for layer in range(config.layers):
            name = f"layers.{layer}"
            y = self.norm(f"{name}.self_attention_norm", h)
            h = h + self.attend(f"{name}.self_attention", config.heads, y, list(range(n)), y, list(range(n)), lambda i, j: j <= i)
            if layer + 1 in config.cross_layers and neighbours is not None:
                if encoded is None:
                    encoded = [
                        [self.encode(neighbours[u, k], h[u * c : u * c + c], mask[u, k]) for k in range(neighbours.shape[1])]
                        for u in range(n // c)
                    ]
                y, update = self.norm(f"{name}.cross_attention_norm", h), torch.zeros_like(h)
                for i in range(c - 1, n):
                    u = (i + 1) // c - 1
                    context, real = torch.cat(encoded[u]), mask[u].flatten()
                    places = list(range(neighbours.shape[2])) * neighbours.shape[1]
                    update[i] = self.attend(
                        f"{name}.cross_attention.attention",
                        config.heads,
                        y[i : i + 1],
                        [i - u * c],
                        context,
                        places,
                        lambda _, j, real=real: bool(real[j]),
                    )[0]
                h = h + update
            h = h + self.feed_forward(f"{name}.feed_forward", self.norm(f"{name}.feed_forward_norm", h))
        return self.norm("norm", h) @ self.w["embedding.weight" if config.tied else "out_proj.weight"].T


def listing_1(observations: Tensor, neighbours: Tensor, q: Tensor, k: Tensor, v: Tensor, relative) -> Tensor:
    """Listing 1 of the paper: observations (n, d), neighbours (l, k, r, d); one head, no output projection, no scale.

    `relative(i, j)` is what the listing's table of positional encodings has for place i of the shifted chunk and j of a neighbour.
    """
    n, d = observations.shape
    chunks, num, r, _ = neighbours.shape
    m = n // chunks
    padded = F.pad(observations[m - 1 :], (0, 0, 0, m - 1))
    outputs = []
    for chunk, of_chunk in zip(padded.reshape(chunks, m, d), neighbours, strict=True):
        logits = torch.stack([(chunk @ q) @ (neighbour @ k).T for neighbour in of_chunk])
        values = torch.stack([neighbour @ v for neighbour in of_chunk])
        logits = logits + torch.tensor([[relative(i, j) for j in range(r)] for i in range(m)], dtype=logits.dtype)
        logits = logits.movedim(0, -1).reshape(m, r * num)
        values = values.movedim(0, 1).reshape(r * num, -1)
        outputs.append(logits.softmax(-1) @ values)
    return F.pad(torch.cat(outputs), (0, 0, m - 1, 0))[:n]
