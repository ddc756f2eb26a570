"""RETRO against the paper's algorithm written out, and what must never leak: later tokens, later neighbours, filling."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from crossattention import record_attention
from crossattention.attention.partial import Part, attend_parts
from crossattention.maps import Highlight
from crossattention.models.pretrained import load
from crossattention.models.retro import (
    ChunkedCrossAttention,
    Retro,
    RetroConfig,
    is_of_retrieval,
    retro_1_5b,
    retro_7_5b,
    retro_172m,
    retro_425m,
    retro_fit,
)
from models.retro_oracle import Oracle, listing_1
from tolerances import assert_close

# All sizes different, so that no two can be mistaken.
SMALL = RetroConfig(
    13,
    dim=6,
    heads=2,
    head_dim=5,
    layers=3,
    feed_forward_dim=7,
    cross_layers=(2, 3),
    encoder_dim=4,
    encoder_heads=3,
    encoder_head_dim=2,
    encoder_layers=2,
    encoder_feed_forward_dim=9,
    chunk_length=4,
    neighbour_length=8,
)
C = SMALL.chunk_length


def small(dtype: torch.dtype = torch.float64, **changes: object) -> Retro:
    torch.manual_seed(1)
    model = Retro(replace(SMALL, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return model


def inputs(n: int = 14, k: int = 2, r: int = 7, z: int = 2, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, neighbours and a mask in which a chunk has no neighbour, one has a single one, and some have short ones."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    ids = torch.randint(SMALL.vocab_size, (z, n), generator=generator)
    neighbours = torch.randint(SMALL.vocab_size, (z, n // C, k, r), generator=generator)
    mask = torch.arange(r) < torch.randint(1, r + 1, (z, n // C, k, 1), generator=generator)
    if n >= 2 * C:
        mask[0, 1, 1:] = False
        mask[1, 0] = False
    return ids, neighbours, mask


# --------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize(
    ("preset", "millions", "decoder"),
    [(retro_172m, 172.5, 132.1), (retro_425m, 425.5, 368.1), (retro_1_5b, 1451.4, 1308.6), (retro_7_5b, 7531.5, 6979.3)],
)
def test_the_published_sizes_have_the_published_parameters(preset, millions, decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for draw in ("kaiming_uniform_", "xavier_uniform_", "normal_", "zeros_", "ones_"):
        monkeypatch.setattr(torch.nn.init, draw, lambda tensor, **options: tensor)
    monkeypatch.setattr(Retro, "reset_parameters", lambda model: None)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Retro(preset()).named_parameters() if "embedding" not in name}
    matrices = {name: size for name, size in sizes.items() if name.endswith("weight") and "norm" not in name}
    assert sum(matrices.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert sum(size for name, size in matrices.items() if not is_of_retrieval(name)) / 1e6 == pytest.approx(decoder, abs=0.05)
    assert sum(sizes.values()) / 1e6 == pytest.approx(millions, rel=5e-4)  # norms and position biases are that little


@pytest.mark.parametrize("n", [3, 8, 14])
def test_it_is_the_algorithm_written_out(n: int) -> None:
    model = small()
    ids, neighbours, mask = (given if n == 14 else given[:1] for given in inputs(n))
    logits, oracle = model(ids, neighbours, mask), Oracle(SMALL, model.state_dict())
    for item in range(len(ids)):
        assert (logits[item] - oracle.logits(ids[item], neighbours[item], mask[item])).abs().max() < 1e-9
    single = model.float()(ids, neighbours, mask)
    torch.testing.assert_close(single.double(), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": False, "shared_embedding": True, "encoder_dim": 6},
        {"encoder_cross_layers": (1, 2), "cross_layers": (1,)},
        {"encoder_cross_layers": (), "layers": 2},
    ],
)
def test_its_variants_are_the_algorithm_too(changes: dict) -> None:
    model = small(**{"cross_layers": (2,), **changes})
    ids, neighbours, mask = (given[:1] for given in inputs(9, k=3, r=8))
    wanted = Oracle(model.config, model.state_dict()).logits(ids[0], neighbours[0], mask[0])
    assert (model(ids, neighbours, mask)[0] - wanted).abs().max() < 1e-9


def test_chunked_cross_attention_is_the_papers_listing() -> None:
    torch.manual_seed(0)
    m, r, k, d, chunks = 4, 7, 3, 6, 3
    layer = ChunkedCrossAttention(d, d, heads=1, head_dim=d, chunk_length=m, furthest=8).double()
    attention = layer.attention
    q, key, v = ((w := torch.randn(d, d, dtype=torch.float64)), torch.randn_like(w), torch.randn_like(w))
    table = torch.randn(m, r, dtype=torch.float64)
    attention.positions.score_bias = lambda queries, p, s, scale: table[(p - (m - 1))[:, None], s]  # any table of the distances
    attention.scale = 1.0
    with torch.no_grad():
        for projection, weight in ((attention.q_proj, q), (attention.k_proj, key), (attention.v_proj, v)):
            projection.weight.copy_(weight.T)
        attention.out_proj.weight.copy_(torch.eye(d))
    observations, neighbours = torch.randn(m * chunks, d, dtype=torch.float64), torch.randn(chunks, k, r, d, dtype=torch.float64)
    wanted = listing_1(observations, neighbours, q, key, v, lambda i, j: float(table[i, j]))
    assert_close(layer(observations[None], neighbours[None])[0], wanted)


def test_the_merge_over_neighbours_is_one_softmax_over_all_their_tokens() -> None:
    torch.manual_seed(0)
    layer = ChunkedCrossAttention(6, 5, heads=2, head_dim=3, chunk_length=4, furthest=8).double()
    a, states = torch.randn(1, 7, 6, dtype=torch.float64), torch.randn(1, 1, 3, 8, 5, dtype=torch.float64)
    attention, at, places = layer.attention, torch.arange(3, 7), torch.arange(8)
    queries = attention.q_proj(a[:, 3:]).unflatten(-1, (2, 3)).transpose(1, 2)
    bias = attention.positions.score_bias(queries, at, places, attention.scale).detach()
    parts = []
    for neighbour in states[0, 0]:  # each by itself, then merged by its log-sum-exp
        keys, values = (
            projection(neighbour).unflatten(-1, (2, 3)).transpose(0, 1).unsqueeze(0)
            for projection in (attention.k_proj, attention.v_proj)
        )
        parts.append(Part(keys, values, bias))
    merged = attend_parts(queries, parts, scale=attention.scale)
    assert_close(layer(a, states)[:, 3:], attention.out_proj(merged.output.transpose(1, 2).flatten(2)))


# ------------------------------------------------------------------------------------------------------- what may leak


def test_a_token_changes_nothing_before_it() -> None:
    model = small()
    ids, neighbours, mask = inputs()
    before = model(ids, neighbours, mask)
    for at in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, at] = (ids[:, at] + 1) % SMALL.vocab_size
        after = model(changed, neighbours, mask)
        assert torch.equal(before[:, :at], after[:, :at])
        assert (before[:, at] != after[:, at]).any(-1).all()


def test_a_neighbour_first_bears_on_the_last_token_of_its_chunk_and_on_none_before() -> None:
    model = small()
    ids, neighbours, _ = inputs(k=2, r=5)
    before = model(ids, neighbours)
    for u, k, token in product(range(3), range(2), range(5)):
        changed = neighbours.clone()
        changed[:, u, k, token] = (neighbours[:, u, k, token] + 1) % SMALL.vocab_size
        differs = (before != model(ids, changed)).any(-1)
        first = u * C + C - 1
        assert not differs[:, :first].any() and differs[:, first].all()


def test_the_first_read_of_a_chunk_ends_with_the_last_but_one_of_the_next() -> None:
    """With one reading layer at the top nothing travels on, so a neighbour bears on its own c positions alone."""
    model = small(cross_layers=(3,))
    ids, neighbours, _ = inputs()
    changed = (neighbours + torch.tensor([0, 1, 0])[:, None, None]) % SMALL.vocab_size
    differs = (model(ids, neighbours) != model(ids, changed)).any(-1)
    assert differs.nonzero()[:, 1].tolist() == [7, 8, 9, 10] * 2


def test_a_prefix_gets_what_the_whole_gives_it() -> None:
    model = small()
    ids, neighbours, mask = inputs()
    whole = model(ids, neighbours, mask)
    for n in range(ids.shape[1]):
        assert_close(model(ids[:, :n], neighbours[:, : n // C], mask[:, : n // C]), whole[:, :n])


def test_the_order_of_neighbours_says_nothing() -> None:
    model = small()
    ids, neighbours, mask = inputs(k=3)
    order = torch.tensor([2, 0, 1])
    assert_close(model(ids, neighbours[:, :, order], mask[:, :, order]), model(ids, neighbours, mask))


def test_masked_tokens_of_neighbours_are_not_read() -> None:
    model = small()
    ids, neighbours, mask = inputs()
    other = torch.where(mask, neighbours, (neighbours + 5) % SMALL.vocab_size)
    assert torch.equal(model(ids, neighbours, mask), model(ids, other, mask))
    # A neighbour without a real token is none, and a short one is the same without its filling.
    alone = model(ids, neighbours[:, :, :1, :5])
    filled = torch.cat((torch.arange(7) < 5, torch.zeros(7, dtype=torch.bool))).view(2, 7).expand(2, 3, 2, 7)
    assert_close(model(ids, neighbours, filled), alone)


def test_without_retrieval_it_is_the_language_model_to_the_bit() -> None:
    model = small(torch.float32)
    plain = Retro(replace(SMALL, cross_layers=())).eval()
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if not is_of_retrieval(name)})
    ids, neighbours, mask = inputs()
    assert torch.equal(model(ids), plain(ids))
    assert torch.equal(model(ids, neighbours[:, :, :0]), plain(ids))
    assert torch.equal(model(ids, neighbours, torch.zeros_like(mask)), plain(ids))
    read = model(ids, neighbours, mask)
    assert torch.equal(read[:, : C - 1], plain(ids)[:, : C - 1])
    assert torch.equal(read[1, : 2 * C - 1], plain(ids)[1, : 2 * C - 1])  # its first chunk has no neighbour
    assert (read[1, 2 * C - 1] != plain(ids)[1, 2 * C - 1]).any()


def test_gradients_are_those_of_the_algorithm() -> None:
    model = small()
    ids, neighbours, mask = (given[:1] for given in inputs(9))
    weights = torch.randn(9, SMALL.vocab_size, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((model(ids, neighbours, mask)[0] * weights).sum(), parameters)
    wanted = (Oracle(SMALL, dict(model.named_parameters())).logits(ids[0], neighbours[0], mask[0]) * weights).sum()
    for name, mine, theirs in zip(names, found, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9, msg=name)
        assert mine.abs().max() > 0, name


# ------------------------------------------------------------------------------------------------------------- steps


def looked_up(vocab_size: int = SMALL.vocab_size, k: int = 2, r: int = 7):
    """A database that answers a chunk by what its tokens say, and remembers what it was asked."""
    asked: list[Tensor] = []

    def retrieve(tokens: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(tokens.clone())
        numbers = torch.arange(k * r).view(k, r)
        found = (tokens.sum(1)[:, None, None] * (numbers + 3) + tokens[:, :1, None] * numbers) % vocab_size
        real = torch.arange(r) < 1 + (tokens.sum(1)[:, None, None] + torch.arange(k)[:, None]) % r
        real[tokens.sum(1) % 3 == 0, 1:] = False
        return found, real

    return retrieve, asked


@pytest.mark.parametrize("sizes", [[1] * 14, [14], [3, 1, 1, 5, 4], [4, 4, 6]])
def test_steps_are_the_forward_pass(sizes: list[int]) -> None:
    model = small()
    ids, neighbours, mask = inputs()
    whole, state, done, logits = model(ids, neighbours, mask), None, 0, []
    for t in sizes:
        new = slice(done // C, (done + t) // C)
        given = (neighbours[:, new], mask[:, new]) if new.stop > new.start else ()
        out, state = model.step(ids[:, done : done + t], state, *given)
        logits.append(out)
        done += t
    assert_close(torch.cat(logits, 1), whole)
    assert state.length == 14 and state.unfinished.shape == (2, 2, 6)


def test_steps_without_retrieval_are_the_language_model() -> None:
    model = small()
    ids, neighbours, mask = inputs()
    state, logits = None, []
    for at in range(14):
        out, state = model.step(ids[:, at : at + 1], state)
        logits.append(out)
    assert_close(torch.cat(logits, 1), model(ids))
    # A chunk without neighbours ends the reading of those before it.
    first, state = model.step(ids[:, :5], None, neighbours[:, :1], mask[:, :1])
    rest, state = model.step(ids[:, 5:], state)
    none = mask.clone()
    none[:, 1:] = False
    assert_close(torch.cat((first, rest), 1), model(ids, neighbours, none))
    assert state.prepared is None


@pytest.mark.parametrize("encoder_dim", [6, 4])
def test_a_new_model_begins_ready_to_copy(encoder_dim: int) -> None:
    """Heads that look at the token before and behind, and queries that meet keys of their own kind, where both are of one width."""
    model = Retro(replace(SMALL, encoder_dim=encoder_dim, encoder_heads=2, encoder_head_dim=5))
    assert model.encoder is not None
    for stack, heads in ((model.layers, 1), (model.encoder.layers, 2)):
        has_bias = [layer.self_attention.positions.bias.bool().any(1).tolist() for layer in stack]
        assert has_bias[0] == [head < heads for head in range(2)] and not any(map(any, has_bias[1:]))
    for layer in (model.layers[1], model.layers[2]):
        attention = layer.cross_attention.attention
        is_equal = attention.k_proj.weight.shape == attention.q_proj.weight.shape
        assert is_equal == (encoder_dim == 6)
        assert not is_equal or torch.equal(attention.k_proj.weight, attention.q_proj.weight)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_greedy_writes_what_the_forward_pass_would(n: int) -> None:
    model = small(tied=False)  # tied, random weights would write the same token again and again, whatever they read
    ids, _, _ = inputs(n)
    retrieve, asked = looked_up()
    written = model.greedy(ids, retrieve, new_tokens=19 - n)
    assert torch.equal(written[:, :n], ids) and written.shape == (2, 19)
    assert [tuple(tokens.shape) for tokens in asked] == [(2, C)] * 4  # each whole chunk once, in order; the last stays unread
    for u, tokens in enumerate(asked):
        assert torch.equal(tokens, written[:, u * C : u * C + C])
    found = [looked_up()[0](written[:, u * C : u * C + C]) for u in range(4)]
    neighbours, mask = (torch.stack(part, 1) for part in zip(*found, strict=True))
    chosen = model(written[:, :-1], neighbours, mask).argmax(-1)
    assert torch.equal(chosen[:, n - 1 :], written[:, n:])
    assert not torch.equal(written, model.greedy(ids, new_tokens=19 - n))


def test_neighbours_are_encoded_and_projected_once_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = small(), []
    for name, module in model.named_modules():
        if name == "encoder" or (name.endswith("attention.k_proj") and "cross" in name):
            module.register_forward_hook(lambda module, args, out, name=name: calls.append((name, out.shape)))
    retrieve, _ = looked_up()
    sizes, state = [], None
    ids, _, _ = inputs(26)
    with torch.no_grad():
        for at in range(26):
            given = retrieve(ids[:, at + 1 - C : at + 1]) if (at + 1) % C == 0 else ()
            _, state = model.step(ids[:, at : at + 1], state, *(part.unsqueeze(1) for part in given))
            sizes.append(sum(p.nbytes for p in state.prepared or ()) + state.unfinished.nbytes)
    assert sum(name == "encoder" for name, _ in calls) == 6  # chunks that became whole
    assert {shape[:2] for name, shape in calls if name.startswith("layers")} == {(2, 14)}  # k r positions, never those before
    assert sum(name.startswith("layers") for name, _ in calls) == 6 * len(SMALL.cross_layers)
    assert set(sizes[C + 1 :: C]) == {sizes[C + 1]}


def test_sampling_draws_within_what_is_asked_and_is_repeatable() -> None:
    model = small()
    ids = inputs(3)[0][:1].expand(40, -1)
    retrieve, _ = looked_up()
    drawn = [
        model.sample(ids, retrieve, new_tokens=1, generator=torch.Generator(torch.get_default_device()).manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    best = model(ids[:1])[0, -1].topk(3).indices
    few = model.sample(ids, retrieve, new_tokens=1, top_k=3, temperature=3.0)
    assert set(few[:, -1].tolist()) <= set(best.tolist()) and len(set(few[:, -1].tolist())) > 1
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-4}):
        assert torch.equal(model.sample(ids[:2], retrieve, new_tokens=9, **narrow), model.greedy(ids[:2], retrieve, new_tokens=9))


def test_a_text_ends_at_its_end() -> None:
    model = small()
    ids, _, _ = inputs(5)
    free = model.greedy(ids, new_tokens=9)
    end_id = int(free[0, 7])
    ended = model.greedy(ids, new_tokens=9, end_id=end_id)
    for row, text in zip(free.tolist(), ended.tolist(), strict=True):
        stop = row.index(end_id, 5) + 1 if end_id in row[5:] else len(row)
        assert text[: min(stop, len(text))] == row[: min(stop, len(text))] and set(text[stop:]) <= {end_id}


# ----------------------------------------------------------------------------------------------------------- retro-fit


def trained(model: Retro, steps: int, retrieval: bool) -> Retro:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(steps):
        ids, neighbours, mask = inputs(13, seed=step)
        logits = model(ids[:, :-1], neighbours, mask) if retrieval else model(ids[:, :-1])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("shared", [False, True])
def test_retro_fitting_trains_what_is_new_and_leaves_the_rest_to_the_bit(shared: bool, tmp_path) -> None:
    torch.manual_seed(0)
    model = trained(Retro(replace(SMALL, cross_layers=())), 2, retrieval=False)
    ids, neighbours, mask = inputs()
    with torch.no_grad():
        before = model(ids)
    with_gradients = model(ids).detach()
    changes = {"encoder_dim": 6, "shared_embedding": True} if shared else {"encoder_dim": 10}
    fitted = retro_fit(model, cross_layers=(1, 3), **changes)
    assert torch.equal(fitted(ids, neighbours, mask), fitted(ids))  # the new outputs are zero
    kept = {name: w.clone() for name, w in fitted.state_dict().items()}
    trained(fitted, 3, retrieval=True)
    with torch.no_grad():
        assert torch.equal(fitted(ids), before)
        assert not torch.equal(fitted(ids, neighbours, mask), before)
    assert torch.equal(fitted(ids), with_gradients)
    for name, weight in fitted.state_dict().items():
        assert torch.equal(weight, kept[name]) != is_of_retrieval(name), name
    again = Retro.from_pretrained(fitted.save_pretrained(tmp_path / "fitted")).freeze_language_model()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n in kept if is_of_retrieval(n)}


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda: retro_fit(small(), cross_layers=(1,)), r"has cross-attention already, in layers \(2, 3\)"),
        (lambda: retro_fit(small(cross_layers=()), cross_layers=()), "at least one layer that shall read"),
        (lambda: retro_fit(small(cross_layers=()), cross_layers=(4,)), r"from 1 to 3, got \(4,\)"),
        (lambda: retro_fit(small(cross_layers=()), cross_layers=(1,), dim=8), "got dim"),
        (lambda: small(cross_layers=()).freeze_language_model(), "nothing would be left to train"),
    ],
)
def test_impossible_fits_are_refused(fit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit()


# ------------------------------------------------------------------------------------------------- around the model


def test_it_is_saved_and_found_by_its_family(tmp_path) -> None:
    model = small(cross_layers=(1, 3), neighbour_length=7)
    ids, neighbours, mask = inputs()
    loaded = load(model.save_pretrained(tmp_path / "retro"))
    assert loaded.config == model.config and loaded.config.cross_layers == (1, 3)
    assert torch.equal(loaded(ids, neighbours, mask), model(ids, neighbours, mask))


def test_recording_shows_which_neighbour_and_which_of_its_tokens_each_token_reads() -> None:
    model = small()
    ids, neighbours, mask = inputs()
    with record_attention(model, [Highlight()]) as seen:
        out = model(ids, neighbours, mask)
    assert torch.equal(out, model(ids, neighbours, mask))
    assert list(seen.layers) == [
        "encoder.layers.0.cross_attention",
        "layers.1.cross_attention.attention",
        "layers.2.cross_attention.attention",
    ]
    mass = seen.layers["layers.1.cross_attention.attention"].merged[0].view(2, 3, SMALL.heads, 2, 7)
    assert not mass.masked_select(~mask[:, :, None].expand_as(mass)).any()
    assert mass[0, 1, :, 0].sum() > 0 and not mass[0, 1, :, 1].any()  # that chunk has one neighbour


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"dim": 7}, "dim must be even, as positions are sinusoids, got 7"),
        ({"encoder_dim": 5}, "encoder_dim must be even"),
        ({"cross_layers": (2, 4)}, r"cross_layers must be ascending numbers of layers from 1 to 3, got \(2, 4\)"),
        ({"cross_layers": (3, 2)}, r"got \(3, 2\)"),
        ({"cross_layers": 3}, "must be a tuple of layers counted from 1, got 3"),
        ({"encoder_cross_layers": (0,)}, r"from 1 to 2, got \(0,\)"),
        ({"activation": "tanh"}, "one of relu, gelu, silu, got 'tanh'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"shared_embedding": True}, "got dim=6 and encoder_dim=4"),
        ({"neighbour_length": 0}, "neighbour_length must be an integer of at least 1, got 0"),
    ],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


IDS, NEIGHBOURS, MASK = inputs()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((IDS[0],), ValueError, r"ids must be int64 or int32 of shape \(batch, length\), got torch.int64 of shape \(14,\)"),
        ((IDS.float(),), ValueError, "got torch.float32"),
        ((IDS, NEIGHBOURS[:, :2]), ValueError, r"14 tokens make 3 chunks of 4 whole, so neighbours must be \(2, 3, k, r\), got"),
        ((IDS, NEIGHBOURS[:1]), ValueError, r"got \(1, 3, 2, 7\)"),
        ((IDS, NEIGHBOURS[0]), ValueError, "neighbours must be int64 or int32 of shape"),
        ((IDS, NEIGHBOURS.repeat(1, 1, 1, 2)), ValueError, "14 tokens long, but the config's neighbour_length is 8"),
        ((IDS, NEIGHBOURS, MASK.long()), TypeError, "must be bool with True at real tokens, got torch.int64"),
        ((IDS, NEIGHBOURS, MASK[..., :1]), ValueError, r"the shape of neighbours, \(2, 3, 2, 7\), got \(2, 3, 2, 1\)"),
        ((IDS, None, MASK), ValueError, "neighbour_mask was passed without neighbours"),
    ],
)
def test_wrong_input_is_refused(given: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        small()(*given)


def test_wrong_steps_are_refused() -> None:
    model, plain = small(), small(cross_layers=())
    _, state = model.step(IDS[:, :3])
    for call, message in (
        (lambda: model.step(IDS[:, 3:5], state, NEIGHBOURS), r"2 tokens after 3 others make 1 chunks of 4 whole"),
        (lambda: model.step(IDS[:1, 3:5], state), "ids have batch 1 but the state has batch 2"),
        (lambda: small(layers=4).step(IDS[:, 3:5], state), "a model of 3 layers, this one has 4"),
        (lambda: model.step(IDS[:, :0], state), "at least one token"),
        (lambda: plain(IDS, NEIGHBOURS), "this model has no cross_layers to read them"),
        (lambda: plain.greedy(IDS, looked_up()[0], new_tokens=1), "this model has no cross_layers"),
        (lambda: model.greedy(IDS[:, :0], new_tokens=1), "a token to begin with"),
        (lambda: model.greedy(IDS, new_tokens=0), "new_tokens must be an integer of at least 1, got 0"),
        (lambda: model.train().greedy(IDS, new_tokens=1), "in training mode"),
        (lambda: model.eval().sample(IDS, new_tokens=1, temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda: model.sample(IDS, new_tokens=1, top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("tied", [True, False])
def test_labels_give_the_cross_entropy_of_the_logits(tied: bool) -> None:
    torch.manual_seed(0)
    model = Retro(replace(SMALL, tied=tied), dtype=torch.float64)
    ids, labels = torch.randint(13, (2, 9)), torch.randint(13, (2, 9))
    labels[1, 4:] = -100
    neighbours = torch.randint(13, (2, 9 // SMALL.chunk_length, 2, 3))
    logits = model(ids, neighbours)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = model(ids, neighbours, labels=labels)
    assert_close(found, wanted)
    for mine, whole in zip(*(torch.autograd.grad(y, list(model.parameters())) for y in (found, wanted)), strict=True):
        assert_close(mine, whole)
    if model.out_proj is not None:  # a head that something looks at is called
        model.out_proj.register_forward_hook(lambda module, given, out: 2 * out)
        doubled = torch.nn.functional.cross_entropy(2 * logits.flatten(0, 1), labels.flatten(), reduction="sum")
        assert_close(model(ids, neighbours, labels=labels), doubled)
    with pytest.raises(ValueError, match=r"labels must be one for each token, \(2, 9\), got \(2, 8\)"):
        model(ids, neighbours, labels=labels[:, 1:])
