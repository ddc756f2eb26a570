"""What a translator did with one text, as the plain data that `views` draws.

What lives here: which layers are shown and what they are called. What does not: the drawing (`views`), files and flags
(`cli`). Legend: n target length, m source length.
"""

from __future__ import annotations

from crossattention.recipes.translator import Translator
from crossattention.views.content import AttentionLayer, AttentionView, TextSide


def attention_view(translator: Translator, text: str, predicted: str, *, title: str | None = None) -> AttentionView:
    """What each token of a prediction read of a text, in every cross-attention of the decoder.

    Args:
        translator: the model and its vocabularies.
        text: what the model read.
        predicted: a text of the target side, such as `Translator.predict` gave.
        title: of the view; without it, the two texts.

    Raises:
        ValueError: an empty text or prediction.
        UnknownSymbol: a symbol that was never seen in training.
    """
    maps = translator.layer_maps(text, predicted)
    if not maps.rows:
        raise ValueError(
            f"nothing was written for {text!r}, so nothing read it; give an answer to look at (--answer), or train longer"
        )
    layers = tuple(
        AttentionLayer.of_weights(f"decoder.layers.{index}.cross_attention", "cross-attention", weights.cpu().numpy())
        for index, weights in enumerate(maps.weights)
    )
    return AttentionView(title or f"{text} → {predicted}", TextSide(tuple(maps.rows)), TextSide(tuple(maps.columns)), layers)
