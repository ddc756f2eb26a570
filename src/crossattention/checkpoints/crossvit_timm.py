"""timm's `CrossVit` and our `CrossViT`.

The same function of the same weights; timm joins queries, keys and values of a layer in one matrix, and its fusions are one block
each (`depth` ends with 0). What only its class can be is refused with the reason: more than one block a fusion, the mean of the
patches for the class token, crops in place of resized images, no biases, dropout, and encoders or branches that are not alike.

A file of weights without `config.json` is told by its shapes where they are those of a variant that timm registers; the number of
heads shows in none. The authors' own files have dots in four names (`pos_embed.0`), which are read too.

Source: Chen et al. 2021, arXiv:2103.14899; timm, models/crossvit.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from crossattention.checkpoints.rules import Rules, fused, rename, under
from crossattention.models import crossvit
from crossattention.models.crossvit import CrossViTConfig

ARCHITECTURES = (
    "crossvit_tiny_240",
    "crossvit_small_240",
    "crossvit_base_240",
    "crossvit_9_240",
    "crossvit_15_240",
    "crossvit_18_240",
    "crossvit_9_dagger_240",
    "crossvit_15_dagger_240",
    "crossvit_15_dagger_408",
    "crossvit_18_dagger_240",
    "crossvit_18_dagger_408",
)
"""The names that timm registers; each is a preset of ours too."""

BASE = "crossvit_small_240"
"""Under whose name a model of other sizes is written, with all of them in `model_args`."""

NORM_EPS = 1e-6

_FIXED: dict[str, tuple[Any, str]] = {
    "global_pool": ("token", "the class tokens are what the heads read"),
    "crop_scale": (False, "the large branch sees the image resized"),
    "qkv_bias": (True, "every projection has a bias"),
    "drop_rate": (0.0, "there is no dropout"),
    "pos_drop_rate": (0.0, "there is no dropout"),
    "proj_drop_rate": (0.0, "there is no dropout"),
    "attn_drop_rate": (0.0, "there is no dropout"),
}
_SIZES = ("img_size", "img_scale", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")
_OTHERS = ("multi_conv", "drop_path_rate")


def recognises(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a config names one of timm's CrossViTs, or, without one, the tensors have its names."""
    if config:
        return str(config.get("architecture", "")).startswith("crossvit_")
    return any(name.endswith("blocks.0.revert_projs.0.2.weight") for name in names)


def config_to_ours(config: Mapping[str, Any]) -> CrossViTConfig:
    """Our config of timm's: the variant's, with what `pretrained_cfg` and `model_args` change of it.

    Raises:
        ValueError: a variant that timm does not register, or what our `CrossViT` cannot be, every reason.
    """
    architecture = str(config.get("architecture")).partition(".")[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {config.get('architecture')!r}")
    preset: CrossViTConfig = getattr(crossvit, architecture)()
    about = config.get("pretrained_cfg") or {}
    size = about.get("input_size") or (preset.channels, *_pair(preset.image_size))
    given = {
        **_arguments(preset),
        "img_size": tuple(size[1:]),
        "in_chans": size[0],
        "num_classes": config.get("num_classes", about.get("num_classes", preset.classes)),
        **{name: config[name] for name in ("global_pool",) if name in config},
        **(config.get("model_args") or {}),
    }
    reasons = [
        f"{name} is {given[name]!r}, here it is {wanted!r}: {why}"
        for name, (wanted, why) in _FIXED.items()
        if given.get(name, wanted) != wanted
    ]
    reasons += [f"{name} is {given[name]!r}: it has no counterpart" for name in given if name not in {*_FIXED, *_SIZES, *_OTHERS}]
    depths, ratios = [tuple(depth) for depth in given["depth"]], given["mlp_ratio"]
    if len(set(depths)) != 1:
        reasons.append(f"depth is {given['depth']!r}: all encoders are alike here")
    if any(len(depth) != 3 or depth[-1] != 0 for depth in depths):
        reasons.append(f"depth is {given['depth']!r}: an encoder has layers of two branches and one fusion each way, (N, M, 0)")
    if ratios[0] != ratios[1]:
        reasons.append(f"mlp_ratio is {ratios!r}: both branches have the same one here")
    if len(given["patch_size"]) != 2:
        reasons.append(f"patch_size is {given['patch_size']!r}: there are two branches here")
    if not given["num_classes"]:
        reasons.append("num_classes is 0: here there is a head")
    if reasons:
        raise ValueError("this CrossVit cannot be a CrossViT of ours:\n  " + "\n  ".join(reasons))
    return CrossViTConfig(
        classes=given["num_classes"],
        image_size=_pair(given["img_size"]),
        scales=_pair(given["img_scale"]),
        patch_sizes=tuple(given["patch_size"]),
        dims=tuple(given["embed_dim"]),
        heads=tuple(given["num_heads"]),
        layers=depths[0][:2],  # type: ignore[arg-type]
        encoders=len(depths),
        feed_forward_ratio=float(ratios[0]),
        stem="convolutions" if given["multi_conv"] else "linear",
        channels=given["in_chans"],
        stochastic_depth=float(given["drop_path_rate"]),
        norm_eps=NORM_EPS,
    )


def config_to_theirs(ours: CrossViTConfig) -> dict[str, Any]:
    """A config for timm, of ours: the variant that it is, else the base's name with all sizes in `model_args`.

    Raises:
        ValueError: another `norm_eps` than timm's.
    """
    if ours.norm_eps != NORM_EPS:
        raise ValueError(f"norm_eps is {ours.norm_eps}, timm's CrossVit always has {NORM_EPS}")
    name = next((name for name in ARCHITECTURES if _is_variant(ours, getattr(crossvit, name)())), None)
    arguments = {key: value for key, value in _arguments(ours).items() if name is None or (key == "drop_path_rate" and value)}
    first = ".0" if ours.stem == "convolutions" else ""
    return {
        "architecture": name or BASE,
        "num_classes": ours.classes,
        "num_features": sum(ours.dims),
        "pretrained_cfg": {
            "num_classes": ours.classes,
            "input_size": [ours.channels, *_pair(ours.image_size)],
            "fixed_input_size": True,
            "pool_size": None,
            "first_conv": [f"patch_embed.{branch}.proj{first}" for branch in (0, 1)],
            "classifier": ["head.0", "head.1"],
        },
        **({"model_args": arguments} if arguments else {}),
    }


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of a bare file, if its shapes are those of a variant that timm registers.

    Raises:
        ValueError: they are those of none.
    """
    found = {name.replace("pos_embed.", "pos_embed_"): shape for name, shape in shapes.items()}

    def shape(name: str) -> tuple[int, ...]:
        return next((tuple(shape) for key, shape in found.items() if key.endswith(name)), ())

    for name in ARCHITECTURES:
        preset: CrossViTConfig = getattr(crossvit, name)()
        first = "patch_embed.0.proj.0.weight" if preset.stem == "convolutions" else "patch_embed.0.proj.weight"
        wanted = {
            f"pos_embed_{branch}": (1, 1 + rows * columns, preset.dims[branch])
            for branch, (rows, columns) in enumerate(preset.grids)
        }
        wanted[f"blocks.0.blocks.1.{preset.layers[1] - 1}.mlp.fc1.weight"] = (preset.feed_forward_dims[1], preset.dims[1])
        has_more = shape(f"blocks.0.blocks.1.{preset.layers[1]}.mlp.fc1.weight") or shape(
            f"blocks.{preset.encoders}.projs.0.2.weight"
        )
        if shape(first) and not has_more and all(shape(key) == value for key, value in wanted.items()):
            size = [shape(first)[1], *_pair(preset.image_size)]
            return {"architecture": name, "num_classes": shape("head.0.weight")[0], "pretrained_cfg": {"input_size": size}}
    raise ValueError(
        f"positions of shapes {shape('pos_embed_0')} and {shape('pos_embed_1')} are of no variant that timm registers "
        f"({', '.join(ARCHITECTURES)}), and the number of heads shows in no shape; put the model's config.json beside the file"
    )


def rules(ours: CrossViTConfig) -> Rules:
    """Which tensor is which."""
    layer = under(
        "blocks.*.blocks.*.*.",
        "encoders.*.branches.*.*.",
        rename("norm1.{weight,bias}", "attention_norm.{weight,bias}"),
        fused("attn.qkv.{weight,bias}", [f"attention.{part}_proj.{{weight,bias}}" for part in "qkv"]),
        rename("attn.proj.{weight,bias}", "attention.out_proj.{weight,bias}"),
        rename("norm2.{weight,bias}", "feed_forward_norm.{weight,bias}"),
        rename("mlp.fc1.{weight,bias}", "feed_forward.up_proj.{weight,bias}"),
        rename("mlp.fc2.{weight,bias}", "feed_forward.down_proj.{weight,bias}"),
    )
    fusion = under(
        "blocks.*.",
        "encoders.*.fusions.",
        rename("projs.*.0.{weight,bias}", "*.enter_norm.{weight,bias}"),
        rename("projs.*.2.{weight,bias}", "*.enter_proj.{weight,bias}"),
        rename("fusion.*.norm1.{weight,bias}", "*.attention_norm.{weight,bias}"),
        *(rename(f"fusion.*.attn.w{part}.{{weight,bias}}", f"*.attention.{part}_proj.{{weight,bias}}") for part in "qkv"),
        rename("fusion.*.attn.proj.{weight,bias}", "*.attention.out_proj.{weight,bias}"),
        rename("revert_projs.*.0.{weight,bias}", "*.leave_norm.{weight,bias}"),
        rename("revert_projs.*.2.{weight,bias}", "*.leave_proj.{weight,bias}"),
    )
    their_stem, our_stem = ("proj.*", "*") if ours.stem == "convolutions" else ("proj", "0")
    return Rules(
        *(rename(f"pos_embed_{branch}", f"positions.{branch}") for branch in (0, 1)),
        *(rename(f"cls_token_{branch}", f"class_tokens.{branch}") for branch in (0, 1)),
        rename(f"patch_embed.*.{their_stem}.{{weight,bias}}", f"embeddings.*.{our_stem}.{{weight,bias}}"),
        layer,
        fusion,
        rename("norm.*.{weight,bias}", "norms.*.{weight,bias}"),
        rename("head.*.{weight,bias}", "heads.*.{weight,bias}"),
        old_names=[(f"{name}.{branch}", f"{name}_{branch}") for name in ("pos_embed", "cls_token") for branch in (0, 1)],
    )


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int | float) else tuple(value)


def _is_variant(ours: CrossViTConfig, preset: CrossViTConfig) -> bool:
    """Whether only what `pretrained_cfg` says differs, and the rate of stochastic depth."""
    free = {"classes": ours.classes, "channels": ours.channels, "stochastic_depth": ours.stochastic_depth}
    return replace(preset, image_size=ours.image_size, **free) == ours


def _arguments(ours: CrossViTConfig) -> dict[str, Any]:
    """What timm's class is built with, but for what `pretrained_cfg` says."""
    return {
        "img_scale": list(ours.scales),
        "patch_size": list(ours.patch_sizes),
        "embed_dim": list(ours.dims),
        "depth": [[*ours.layers, 0]] * ours.encoders,
        "num_heads": list(ours.heads),
        "mlp_ratio": [ours.feed_forward_ratio, ours.feed_forward_ratio, 1],
        "multi_conv": ours.stem == "convolutions",
        "drop_path_rate": ours.stochastic_depth,
    }
