"""Classes of `transformers` whose cross-attention is known here, in families that have one forward pass under several names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

Given = Mapping[str, Any]
"""A call's arguments by name."""


@dataclass(frozen=True)
class Family:
    """Classes with one forward pass, and what they call things.

    Args:
        classes: their names.
        projections: attributes of the query, key, value and output projections; "" where the output projection is outside.
        heads: attribute of the number of heads.
        head_dim: attribute of the width of a head's queries and keys.
        value_head_dim: attribute of that of its values.
        kv_heads: attribute of the number of key-value heads.
        context: argument of what is read.
        mask: argument of its mask.
        dropout: attribute of the probability of dropping a weight, or of a module that has it as `p`.
        cache: "encoder-decoder" for keys and values in an `EncoderDecoderCache`, "plain" for those in any cache, "" for none.
        norms: attributes of norms of queries and keys within heads.
        has_kernels: whether its forward pass runs the kernel that `attn_implementation` names.
        gives: makes of the output what the forward pass gives.
    """

    classes: tuple[str, ...]
    projections: tuple[str, str, str, str]
    heads: str
    head_dim: str
    value_head_dim: str = ""
    kv_heads: str = ""
    context: str = "key_value_states"
    mask: str = "attention_mask"
    dropout: str = "dropout"
    cache: str = "encoder-decoder"
    norms: tuple[str, str] | None = None
    has_kernels: bool = True
    gives: Callable[[Tensor, Given], Any] = lambda out, given: (out, None)


BART = Family(
    classes=(
        *("BartAttention", "BigBirdPegasusDecoderAttention", "BlenderbotAttention", "BlenderbotSmallAttention", "M2M100Attention"),
        *("MBartAttention", "MarianAttention", "PLBartAttention", "PegasusAttention", "PegasusXAttention"),
        *("TimeSeriesTransformerAttention", "WhisperAttention"),
    ),
    projections=("q_proj", "k_proj", "v_proj", "out_proj"),
    heads="num_heads",
    head_dim="head_dim",
)
TROCR = replace(BART, classes=("TrOCRAttention",), has_kernels=False)
BERT = Family(
    classes=tuple(
        f"{name}CrossAttention"
        for name in (
            *("Bert", "BertGeneration", "Camembert", "Data2VecText", "Electra", "Ernie", "RoCBert", "Roberta"),
            *("RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "Xmod"),
        )
    ),
    projections=("query", "key", "value", ""),
    heads="num_attention_heads",
    head_dim="attention_head_size",
    context="encoder_hidden_states",
)
T5 = Family(
    classes=tuple(f"{name}Attention" for name in ("LongT5", "MT5", "Pop2Piano", "SwitchTransformers", "T5", "Udop")),
    projections=("q", "k", "v", "o"),
    heads="n_heads",
    head_dim="key_value_proj_dim",
    mask="mask",
    gives=lambda out, given: (out, None, None),
)
QFORMER = Family(
    classes=tuple(f"{name}QFormerMultiHeadAttention" for name in ("Blip2", "InstructBlip", "InstructBlipVideo")),
    projections=("query", "key", "value", ""),
    heads="num_attention_heads",
    head_dim="attention_head_size",
    context="encoder_hidden_states",
    mask="encoder_attention_mask",
    dropout="attention_dropout",
    cache="",
)
PERCEIVER = Family(
    classes=("PerceiverSelfAttention",),
    projections=("query", "key", "value", ""),
    heads="num_heads",
    head_dim="qk_channels_per_head",
    value_head_dim="v_channels_per_head",
    context="inputs",
    mask="inputs_mask",
    cache="",
    has_kernels=False,
    gives=lambda out, given: (out,),
)
MLLAMA = Family(
    classes=("MllamaTextCrossAttention",),
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    heads="num_heads",
    head_dim="head_dim",
    kv_heads="num_key_value_heads",
    context="cross_attention_states",
    cache="plain",
    norms=("q_norm", "k_norm"),
)
DETR = Family(
    classes=("DetrCrossAttention", "MaskFormerDetrCrossAttention"),
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    heads="",
    head_dim="head_dim",
    dropout="attention_dropout",
    cache="",
)
FAMILIES = {name: family for family in (BART, TROCR, BERT, T5, QFORMER, PERCEIVER, MLLAMA, DETR) for name in family.classes}

SELF_ATTENTION = ("self_attn", "SelfAttention")
"""Names of modules that read their own sequence, of classes that could read another."""


def family_of(module: nn.Module) -> Family | None:
    """The family of a module's class; None for a class that is not known, or not one of transformers itself."""
    kind = type(module)
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None


def known_modules(model: nn.Module) -> list[nn.Module]:
    """Modules of a family's class, or of a class that was made from one."""
    return [module for module in model.modules() if any(kind.__name__ in FAMILIES for kind in type(module).__mro__)]


def reads_itself(module: nn.Module, name: str) -> bool:
    """Whether a module is there for self-attention, as far as its name in the model and what it has tell."""
    path = name.split(".")
    if isinstance(module._modules.get("layernorm2"), nn.Identity):  # Perceiver's latents among themselves
        return True
    if family_of(module) is QFORMER:
        return "attention" in path and "crossattention" not in path
    return any(part in SELF_ATTENTION for part in path[-2:])  # some hold what attends as "self"


def heads_of(module: nn.Module, family: Family) -> tuple[int, int, int, int]:
    """Query heads, key-value heads, width of scores and width of values in a head."""
    k = int(getattr(module, family.head_dim))
    queries: Any = getattr(module, family.projections[0])
    h = int(getattr(module, family.heads)) if family.heads else queries.out_features // k
    g = int(getattr(module, family.kv_heads)) if family.kv_heads else h
    return h, g, k, int(getattr(module, family.value_head_dim)) if family.value_head_dim else k
