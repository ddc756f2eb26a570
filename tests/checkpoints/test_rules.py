"""Names and tensors both ways, and each way in which a file does not fit."""

import pytest
import torch
from torch import Tensor

from crossattention.checkpoints.rules import Absent, Filled, Ignored, Rules, fit, fused, joined, rename, to_ours, to_theirs, under

LAYERS = 2


def rules() -> Rules:
    layer = (
        fused("attn.qkv.{weight,bias}", ("q.{weight,bias}", "k.{weight,bias}", "v.{weight,bias}")),
        joined(("gate.weight", "up.weight"), "both.weight", sizes=(4, 3)),
        rename("LayerNorm.{weight,bias}", "norm.{weight,bias}"),
        rename("proj.weight", "out.weight", lambda t: t.T, lambda t: t.T),
    )
    return Rules(
        rename("bert.shared.weight", "embedding.weight"),
        under("bert.layer.*.", "layers.*.", *layer),
        ignored=[
            Ignored("bert.position_ids", "0, 1, 2, ...", value=lambda: torch.arange(6)[None]),
            Ignored("bert.zero", "always zero", value=lambda: torch.zeros(3), is_written=True),
            Ignored("cls.**", "a head for another task"),
        ],
        filled=[Filled("layers.*.k_offset", "their keys have none")],
        tied=[("lm_head.weight", "bert.shared.weight")],
        tied_ours=[("head.weight", "embedding.weight")],
        old_names=[("**.gamma", "**.weight"), ("**.beta", "**.bias")],
        prefixes=["bert."],
    )


def ours() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {"embedding.weight": torch.randn(11, 5)}
    made["head.weight"] = made["embedding.weight"]
    for number in range(LAYERS):
        layer = {f"{part}.weight": torch.randn(2, 5) for part in "qkv"} | {f"{part}.bias": torch.randn(2) for part in "qkv"}
        layer |= {"both.weight": torch.randn(7, 5), "norm.weight": torch.randn(5), "norm.bias": torch.randn(5)}
        layer |= {"out.weight": torch.randn(5, 2), "k_offset": torch.zeros(2)}
        made |= {f"layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return made


def wanted() -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in ours().items()}


def test_both_ways_give_the_same_tensors_back() -> None:
    theirs = to_theirs(ours(), rules())
    assert theirs["bert.layer.1.attn.qkv.weight"].shape == (6, 5)
    assert theirs["bert.layer.1.gate.weight"].shape == (4, 5)
    assert theirs["bert.layer.0.proj.weight"].shape == (2, 5)
    assert theirs["lm_head.weight"] is theirs["bert.shared.weight"]
    assert torch.equal(theirs["bert.zero"], torch.zeros(3))
    back = to_ours(theirs, rules(), wanted())
    assert back.keys() == ours().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours().items())


def test_the_pieces_of_a_fused_tensor_are_in_order() -> None:
    theirs = to_theirs(ours(), rules())
    assert torch.equal(theirs["bert.layer.0.attn.qkv.weight"][2:4], ours()["layers.0.k.weight"])
    assert torch.equal(theirs["bert.layer.0.up.weight"], ours()["layers.0.both.weight"][4:])


def test_one_error_lists_all_that_does_not_fit() -> None:
    theirs = to_theirs(ours(), rules())
    del theirs["bert.layer.1.up.weight"]
    theirs["bert.layer.2.up.weight"] = torch.zeros(3, 5)
    theirs["bert.layer.0.proj.weight"] = torch.zeros(5, 2)
    theirs["bert.layer.0.gate.weight"] = torch.zeros(4, 5, dtype=torch.int8)
    with pytest.raises(ValueError) as caught:
        to_ours(theirs, rules(), wanted(), source="a.safetensors")
    assert str(caught.value).splitlines() == [
        "the weights in a.safetensors do not fit the model:",
        "  missing: bert.layer.1.up.weight (3, 5)",
        "  unexpected: bert.layer.2.up.weight (3, 5)",
        "  no floating-point numbers: bert.layer.0.gate.weight is torch.int8",
        "  misshapen: bert.layer.0.proj.weight is (5, 2), the model's is (2, 5)",
    ]


def test_names_and_shapes_alone_are_compared_first() -> None:
    theirs = {name: tensor.to("meta") for name, tensor in to_theirs(ours(), rules()).items()}
    found = fit(theirs, rules(), wanted())
    assert found.ignored == {"bert.zero": "always zero"}
    assert found.filled == {f"layers.{number}.k_offset": "their keys have none" for number in range(LAYERS)}


def test_ignored_names_are_reported_with_their_reason() -> None:
    theirs = to_theirs(ours(), rules()) | {"cls.a.b": torch.ones(1), "bert.position_ids": torch.arange(6)[None]}
    assert fit(theirs, rules(), wanted()).ignored == {
        "bert.zero": "always zero",
        "bert.position_ids": "0, 1, 2, ...",
        "cls.a.b": "a head for another task",
    }


@pytest.mark.parametrize("name", ["bert.zero", "bert.position_ids"])
def test_an_ignored_tensor_must_be_what_the_reason_says(name: str) -> None:
    theirs = to_theirs(ours(), rules())
    theirs[name] = torch.ones(3) if name == "bert.zero" else torch.ones(1, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"in use: {name} would be ignored"):
        to_ours(theirs, rules(), wanted())


@pytest.mark.parametrize("kept", ["lm_head.weight", "bert.shared.weight"])
def test_a_tied_tensor_may_be_in_the_file_under_either_name(kept: str) -> None:
    theirs = to_theirs(ours(), rules())
    (dropped,) = {"lm_head.weight", "bert.shared.weight"} - {kept}
    del theirs[dropped]
    back = to_ours(theirs, rules(), wanted())
    assert torch.equal(back["embedding.weight"], ours()["embedding.weight"])
    assert torch.equal(back["head.weight"], ours()["embedding.weight"])


def test_a_tied_tensor_that_is_in_the_file_twice_must_be_equal() -> None:
    theirs = to_theirs(ours(), rules()) | {"lm_head.weight": torch.zeros(11, 5)}
    with pytest.raises(ValueError, match=r"tied: lm_head.weight differs from bert.shared.weight"):
        to_ours(theirs, rules(), wanted())
    theirs["lm_head.weight"] = torch.zeros(12, 5)
    with pytest.raises(ValueError, match=r"misshapen: lm_head.weight is \(12, 5\), the model's is \(11, 5\)"):
        to_ours(theirs, rules(), wanted())


def test_a_tensor_that_a_file_may_lack_is_what_the_reason_says() -> None:
    theirs = to_theirs(ours(), rules())
    for number in range(LAYERS):
        del theirs[f"bert.layer.{number}.attn.qkv.bias"]
    with pytest.raises(ValueError, match=r"missing: bert.layer.0.attn.qkv.bias \(6,\)"):
        fit(theirs, rules(), wanted())
    lenient = replace_absent(rules(), Absent("bert.layer.*.attn.qkv.bias", "older ones have none"))
    found = fit(theirs, lenient, wanted())
    assert list(found.absent) == ["bert.layer.0.attn.qkv.bias", "bert.layer.1.attn.qkv.bias"]
    assert torch.equal(dict(found.tensors())["layers.1.k.bias"], torch.zeros(2))


def replace_absent(rules: Rules, *absent: Absent) -> Rules:
    object.__setattr__(rules, "absent", absent)
    return rules


def test_old_names_are_read() -> None:
    theirs = to_theirs(ours(), rules())
    for number in range(LAYERS):
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            theirs[f"bert.layer.{number}.LayerNorm.{old}"] = theirs.pop(f"bert.layer.{number}.LayerNorm.{new}")
    back = to_ours(theirs, rules(), wanted())
    assert all(torch.equal(back[name], tensor) for name, tensor in ours().items())
    theirs["bert.layer.0.LayerNorm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"gamma and .*weight both mean bert.layer.0.LayerNorm.weight"):
        to_ours(theirs, rules(), wanted())


def test_a_file_may_lack_a_prefix_throughout() -> None:
    theirs = {name.removeprefix("bert."): tensor for name, tensor in to_theirs(ours(), rules()).items()}
    back = to_ours(theirs, rules(), wanted())
    assert all(torch.equal(back[name], tensor) for name, tensor in ours().items())
    theirs["bert.shared.weight"] = theirs.pop("shared.weight")  # with and without it: neither
    with pytest.raises(ValueError, match=r"missing: bert.layer.0.attn.qkv.weight"):
        to_ours(theirs, rules(), wanted())


def test_a_wrapper_before_all_names_is_taken_away() -> None:
    theirs = {f"module._orig_mod.{name}": tensor for name, tensor in to_theirs(ours(), rules()).items()}
    back = to_ours(theirs, rules(), wanted())
    assert all(torch.equal(back[name], tensor) for name, tensor in ours().items())
    theirs["bert.shared.weight"] = theirs.pop("module._orig_mod.bert.shared.weight")
    with pytest.raises(ValueError, match=r"unexpected: module._orig_mod.bert.layer.0.attn.qkv.weight"):
        to_ours(theirs, rules(), wanted())


def test_what_theirs_cannot_hold_is_refused() -> None:
    model = ours() | {"layers.1.k_offset": torch.ones(2), "head.weight": torch.zeros(11, 5)}
    with pytest.raises(ValueError) as caught:
        to_theirs(model, rules())
    assert [line.strip().split(" ")[:2] for line in str(caught.value).splitlines()[1:]] == [
        ["in", "use:"],
        ["tied:", "head.weight"],
    ]


def test_rules_that_do_not_cover_our_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"extra.weight of ours is in 0 rules"):
        to_theirs(ours() | {"extra.weight": torch.zeros(1)}, rules())
    model = ours()
    del model["layers.0.q.weight"], model["embedding.weight"]
    with pytest.raises(ValueError, match=r"(?s)no embedding.weight, which a rule names.*no layers.0.q.weight, which a rule names"):
        to_theirs(model, rules())


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of wildcards"):
        rename("a.*", "b")
    with pytest.raises(ValueError, match="same number of alternatives"):
        rename("a.{weight,bias}", "b.{weight,bias,scale}")
    with pytest.raises(ValueError, match="both to_ours and to_theirs"):
        rename("a", "b", lambda t: t)
    with pytest.raises(ValueError, match="without a reason"):
        Ignored("a", " ")
    with pytest.raises(ValueError, match="one name and a value"):
        Ignored("a", "why", is_written=True)
