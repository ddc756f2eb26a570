"""A picture that words read: shapes, padding, what a patch knows, saving."""

import pytest
import torch

from crossattention.models import load
from crossattention.models.bert import BertConfig
from crossattention.models.picture_reader import PictureReader, PictureReaderConfig, pixels

WORDS = BertConfig(
    23, dim=12, layers=2, heads=3, feed_forward_dim=20, max_length=7, type_vocab_size=1, context_dim=10, begin_id=1, end_id=2
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PictureReader(PictureReaderConfig(height=16, width=24, channels=(5,), decoder=WORDS)).eval()


def test_every_word_answers_and_the_answer_is_their_mean(model):
    images, ids = torch.rand(2, 3, 16, 24), torch.randint(3, 23, (2, 5))
    logits = model(images, ids)
    assert logits.shape == (2, 5, 23)
    assert model.encode(images).shape == (2, 4 * 6, 10)
    choices = [4, 9, 20]
    expected = logits[..., choices].log_softmax(-1).mean(1).softmax(-1)
    assert torch.allclose(model.answer(images, ids, choices=choices).exp(), expected, atol=1e-6)


def test_padding_changes_no_answer(model):
    images, ids = torch.rand(2, 3, 16, 24), torch.randint(3, 23, (2, 4))
    padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.int64)], dim=1)
    mask = padded != 0
    assert torch.allclose(model.answer(images, padded, mask, choices=[3, 5]), model.answer(images, ids, choices=[3, 5]), atol=1e-6)
    mask[1] = False
    with pytest.raises(ValueError, match="every question must have a word"):
        model.answer(images, padded, mask, choices=[3, 5])


def test_a_patch_knows_nothing_of_pixels_far_away(model):
    images = torch.rand(1, 3, 16, 24)
    changed = images.clone()
    changed[..., 12:, 20:] = 0.0  # the last patch
    differs = (model.encode(images) - model.encode(changed)).abs().amax(-1).reshape(4, 6) > 0
    assert bool(differs[3, 5])
    assert not bool(differs[:3, :4].any())


def test_a_model_comes_back_from_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    images, ids = torch.rand(1, 3, 16, 24), torch.randint(3, 23, (1, 4))
    assert torch.equal(again(images, ids), model(images, ids))


def test_sizes_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, 16, 24\), got shape \(1, 3, 24, 16\)"):
        model(torch.rand(1, 3, 24, 16), torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"whole patches of 4 x 4 pixels, got 24 x 18"):
        PictureReaderConfig(height=18, width=24, channels=(5,), decoder=WORDS)
    with pytest.raises(ValueError, match="channels must be integers of at least 1, got 0"):
        PictureReaderConfig(channels=(0,), decoder=WORDS)
    for wrong in (None, BertConfig(23, dim=12, heads=3, begin_id=1, end_id=2)):
        with pytest.raises(ValueError, match="with a context_dim and a head, not causal"):
            PictureReaderConfig(decoder=wrong)
    with pytest.raises(ValueError, match="fields that BertConfig does not know: colour"):
        PictureReaderConfig(decoder={"colour": 1})


def test_bytes_become_numbers_from_minus_one_to_one():
    images = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert pixels(images).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
