"""What training and generation are measured against: `torch.nn.Transformer` with embeddings, as tutorials write it."""

import math

import torch
from torch import Tensor, nn

from crossattention.layers import sinusoidal_positions
from crossattention.models.transformer import Transformer, TransformerConfig

NAME = "torch.nn.Transformer"


class PlainTransformer(nn.Module):
    """Sizes and dropout of a configuration of ours, pre-norm with target-tied output."""

    def __init__(self, config: TransformerConfig, *, only_our_dropout: bool = False) -> None:
        super().__init__()
        if (config.norm, config.tied, config.positions) != ("pre", "target", "sinusoidal"):
            raise SystemExit(f"the plain model is pre-norm, target-tied and sinusoidal only, got {config}")
        self.config = config
        self.source_embedding = nn.Embedding(config.source_vocab_size, config.dim)
        self.target_embedding = nn.Embedding(config.target_vocab_size, config.dim)
        layer = {
            "d_model": config.dim,
            "nhead": config.heads,
            "dim_feedforward": config.feed_forward_dim,
            "dropout": config.dropout,
            "activation": config.activation,
            "layer_norm_eps": config.norm_eps,
            "batch_first": True,
            "norm_first": True,
        }
        norms = [nn.LayerNorm(config.dim, eps=config.norm_eps) for _ in range(2)]
        self.transformer = nn.Transformer(
            config.dim,
            custom_encoder=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer), config.encoder_layers, norms[0], enable_nested_tensor=False
            ),
            custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), config.decoder_layers, norms[1]),
            nhead=config.heads,
            batch_first=True,
        )
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.target_embedding.weight, std=config.dim**-0.5)
        if only_our_dropout:  # its own stands on attention weights and hidden units, too
            for module in self.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = 0.0
                if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                    module.dropout = nn.Identity()

    def forward(self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor) -> Tensor:
        """Logits (z, n, V)."""
        return self.decode(target_ids, self.encode(source_ids, source_mask), source_mask)

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> Tensor:
        """The encoder's output (z, m, d)."""
        return self.transformer.encoder(self._embed(source_ids, self.source_embedding), src_key_padding_mask=~source_mask)

    def decode(self, target_ids: Tensor, states: Tensor, source_mask: Tensor) -> Tensor:
        """Logits (z, n, V) of the whole target."""
        length, device = target_ids.shape[1], target_ids.device
        x = self.transformer.decoder(
            self._embed(target_ids, self.target_embedding),
            states,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(length, device=device, dtype=torch.bool),
            memory_key_padding_mask=~source_mask,
            tgt_is_causal=True,
        )
        return x @ self.target_embedding.weight.T

    @torch.no_grad()
    def greedy(self, source_ids: Tensor, source_mask: Tensor, max_length: int) -> Tensor:
        """The usual loop: the whole target anew at every step, until every row has ended; symbols (z, length) with the end."""
        config = self.config
        states = self.encode(source_ids, source_mask)
        ids = torch.full((len(source_ids), 1), config.begin_id)
        has_ended = torch.zeros(len(source_ids), dtype=torch.bool)
        for _ in range(max_length):
            logits = self.decode(ids, states, source_mask)[:, -1]
            logits[:, [config.pad_id, config.begin_id]] = -torch.inf
            newest = logits.argmax(-1).where(~has_ended, config.pad_id)
            ids = torch.cat((ids, newest[:, None]), 1)
            has_ended |= newest == config.end_id
            if bool(has_ended.all()):
                break
        return ids[:, 1:]

    @torch.no_grad()
    def load_from(self, model: Transformer) -> None:
        """Take over the weights of a model of ours."""
        for name in ("source_embedding", "target_embedding"):
            getattr(self, name).load_state_dict(getattr(model, name).state_dict())
        for side in ("encoder", "decoder"):
            ours, theirs = getattr(model, side), getattr(self.transformer, side)
            theirs.norm.load_state_dict(ours.norm.state_dict())
            for mine, other in zip(ours.layers, theirs.layers, strict=True):
                _copy_layer(mine, other)

    def _embed(self, ids: Tensor, table: nn.Embedding) -> Tensor:
        positions = sinusoidal_positions(torch.arange(ids.shape[1], device=ids.device), self.config.dim)
        return self.dropout(table(ids) * math.sqrt(self.config.dim) + positions)


def _copy_layer(ours: nn.Module, theirs: nn.Module) -> None:
    attentions = [("self_attention", "self_attn"), ("cross_attention", "multihead_attn")]
    attentions = [(a, b) for a, b in attentions if hasattr(ours, a)]
    for name, other in attentions:
        mine, its = getattr(ours, name), getattr(theirs, other)
        projections = (mine.q_proj, mine.k_proj, mine.v_proj)
        its.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        its.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        its.out_proj.load_state_dict(mine.out_proj.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.up_proj.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.down_proj.state_dict())
    for number, name in enumerate([*(a for a, _ in attentions), "feed_forward"], 1):
        getattr(theirs, f"norm{number}").load_state_dict(getattr(ours, f"{name}_residual").norm.state_dict())
