"""Generation: against a beam search that repeats the source, against all sequences there are, and what it costs and refuses."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crossattention.models.generate import Hypothesis, beam_search, greedy, sample
from crossattention.models.transformer import Transformer, TransformerConfig

PAD, BEGIN, END = 0, 1, 2


def tiny(vocab_size: int = 9, seed: int = 4, **changes) -> Transformer:
    """A random model; with seeds 4 and 36 some targets end early, some late, some not at all."""
    torch.manual_seed(seed)
    sizes = {"dim": 12, "heads": 3, "encoder_layers": 1, "decoder_layers": 2, "feed_forward_dim": 20, "norm": "pre"}
    model = Transformer(TransformerConfig(19, vocab_size, tied="target", **{**sizes, **changes}), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def sources(z: int = 5, m: int = 6) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([m, 2, 4, 1, 3])[:z]
    ids = torch.randint(3, 19, (z, m), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return ids, torch.arange(m) < lengths[:, None]


def assert_same(found: list[Hypothesis], wanted: list[Hypothesis], tolerance: float = 1e-12) -> None:
    assert [(h.ids, h.is_finished) for h in found] == [(h.ids, h.is_finished) for h in wanted]
    for hypothesis, other in zip(found, wanted, strict=True):
        assert hypothesis.score == pytest.approx(other.score, abs=tolerance)
        assert hypothesis.log_probability == pytest.approx(other.log_probability, abs=tolerance)


def hypothesis_of(ids: tuple[int, ...], log_probability: float, alpha: float) -> Hypothesis:
    """From all symbols generated, the end included."""
    is_finished = ids[-1] == END
    score = log_probability / ((5 + len(ids)) / 6) ** alpha
    return Hypothesis(ids[:-1] if is_finished else ids, score, log_probability, is_finished)


def next_log_probs(model: Transformer, source: Tensor, mask: Tensor, targets: list[tuple[int, ...]]) -> Tensor:
    """Log-probabilities (targets, V) of the next symbol: the source repeated for each target, everything decoded anew."""
    ids = torch.tensor([(BEGIN, *target) for target in targets])
    repeated = source.expand(len(targets), -1), ids, mask.expand(len(targets), -1)
    return model(*repeated)[:, -1].log_softmax(-1)


@torch.no_grad()
def repeating_beam_search(
    model: Transformer, source: Tensor, mask: Tensor, *, beams: int, alpha: float, max_length: int, count: int
) -> list[Hypothesis]:
    """Beam search in words: one source, no caches, no early stop but "as many finished as beams"."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Hypothesis] = []
    for _ in range(max_length):
        log_probs = next_log_probs(model, source, mask, [ids for _, ids in live]).tolist()
        grown = [
            (total + log_probs[beam][symbol], (*ids, symbol))
            for beam, (total, ids) in enumerate(live)
            for symbol in range(model.config.target_vocab_size)
            if symbol not in (PAD, BEGIN)
        ]
        grown.sort(reverse=True)
        finished += [hypothesis_of(ids, total, alpha) for total, ids in grown[:beams] if ids[-1] == END]
        live = [(total, ids) for total, ids in grown if ids[-1] != END][:beams]
        if len(finished) >= beams or not live:
            break
    finished.sort(key=lambda hypothesis: -hypothesis.score)
    return (finished + [hypothesis_of(ids, total, alpha) for total, ids in live])[:count]


# ------------------------------------------------------------------------------------------------------ beam search


@pytest.mark.parametrize("alpha", [0.6, 0.0, 1.5, -0.7])
@pytest.mark.parametrize(("beams", "count"), [(1, 1), (2, 1), (4, 2), (5, 5), (8, 3)])
@pytest.mark.parametrize("seed", [4, 36])
def test_shared_beams_equal_beams_with_a_source_each(beams: int, count: int, alpha: float, seed: int) -> None:
    model = tiny(seed=seed)
    source, mask = sources()
    keywords = {"beams": beams, "max_length": 7}
    found = beam_search(model, source, mask, length_penalty=alpha, num_hypotheses=count, **keywords)
    for row in range(5):
        wanted = repeating_beam_search(model, source[row], mask[row], alpha=alpha, count=count, **keywords)
        assert_same(found[row], wanted)


def test_the_cases_above_have_both_ends_and_cuts() -> None:
    found = beam_search(tiny(), *sources(), beams=5, max_length=7, num_hypotheses=5)
    is_finished = [hypothesis.is_finished for row in found for hypothesis in row]
    assert any(is_finished)
    assert not all(is_finished)
    assert len({len(hypothesis.ids) for row in found for hypothesis in row}) > 2


@pytest.mark.parametrize("alpha", [0.6, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.0, -0.7))])
def test_with_room_for_everything_beam_search_finds_the_best_of_all_sequences(alpha: float) -> None:
    model = tiny(vocab_size=6)
    source, mask = sources(3)
    limit, symbols = 4, range(3, 6)
    wanted = []
    for row in range(3):
        everything = []
        for length in range(limit):
            for ids in itertools.product(symbols, repeat=length):
                target = (*ids, END)
                decoded = model(source[row : row + 1], torch.tensor([(BEGIN, *ids)]), mask[row : row + 1])
                log_probs = decoded[0].log_softmax(-1)[range(length + 1), target].sum().item()
                everything.append(hypothesis_of(target, log_probs, alpha))
        everything.sort(key=lambda hypothesis: -hypothesis.score)
        wanted.append(everything)
    total = len(wanted[0])
    assert total == 1 + 3 + 9 + 27
    found = beam_search(model, source, mask, beams=200, length_penalty=alpha, max_length=limit, num_hypotheses=total)
    for row in range(3):
        assert_same(found[row], wanted[row])
    few = beam_search(model, source, mask, beams=200, length_penalty=alpha, max_length=limit, num_hypotheses=3)
    for row in range(3):
        assert_same(few[row], wanted[row][:3])


def test_fewer_hypotheses_come_only_where_there_are_no_more() -> None:
    found = beam_search(tiny(vocab_size=5), *sources(2), beams=10, max_length=1, num_hypotheses=10)
    # One symbol: the end, or one of the two others, cut.
    assert [[(len(h.ids), h.is_finished) for h in row] for row in found] == [[(0, True), (1, False), (1, False)]] * 2


@pytest.mark.parametrize("alpha", [0.6, 0.0])
def test_one_beam_is_greedy(alpha: float) -> None:
    for seed in range(5):
        model = tiny(seed=seed)
        source, mask = sources()
        found = beam_search(model, source, mask, beams=1, max_length=9, length_penalty=alpha)
        wanted = greedy(model, source, mask, max_length=9, length_penalty=alpha)
        assert found == [[hypothesis] for hypothesis in wanted]


def test_more_hypotheses_do_not_change_the_better_ones() -> None:
    model = tiny()
    source, mask = sources()
    many = beam_search(model, source, mask, beams=5, max_length=8, num_hypotheses=5)
    for count in (1, 3):
        few = beam_search(model, source, mask, beams=5, max_length=8, num_hypotheses=count)
        for row in range(5):
            assert_same(few[row], many[row][:count])


def test_the_other_sources_of_the_batch_change_nothing() -> None:
    model = tiny()
    source, mask = sources()
    found = beam_search(model, source, mask, beams=3, max_length=8, num_hypotheses=2)
    plain = greedy(model, source, mask, max_length=8)
    for row in range(5):
        length = int(mask[row].sum())
        alone = source[row : row + 1, :length]
        assert_same(beam_search(model, alone, beams=3, max_length=8, num_hypotheses=2)[0], found[row])
        assert_same(greedy(model, alone, max_length=8), plain[row : row + 1])
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = beam_search(model, source[order], mask[order], beams=3, max_length=8, num_hypotheses=2)
    for row, old in enumerate(order.tolist()):
        assert_same(permuted[row], found[old])


# ----------------------------------------------------------------------------------------------- greedy and sampling


def test_greedy_takes_the_most_probable_symbol_until_the_end_or_the_limit() -> None:
    model = tiny()
    source, mask = sources()
    found = greedy(model, source, mask, max_length=7, length_penalty=0.8)
    for row in range(5):
        ids: tuple[int, ...] = ()
        total = 0.0
        while len(ids) < 7 and END not in ids:
            log_probs = next_log_probs(model, source[row], mask[row], [ids])[0]
            log_probs[[PAD, BEGIN]] = -torch.inf
            ids, total = (*ids, int(log_probs.argmax())), total + log_probs.max().item()
        assert_same([found[row]], [hypothesis_of(ids, total, 0.8)])
    assert len({hypothesis.is_finished for hypothesis in found}) == 2


def test_what_is_finished_does_not_change_any_more() -> None:
    model = tiny()
    source, mask = sources()
    short, long = (greedy(model, source, mask, max_length=length) for length in (6, 12))
    finished = [row for row in range(5) if short[row].is_finished]
    assert finished
    assert_same([short[row] for row in finished], [long[row] for row in finished])
    drawn = sample(
        model, source, mask, num_samples=6, max_length=12, generator=torch.Generator(torch.get_default_device()).manual_seed(1)
    )
    for row in range(5):
        for hypothesis in drawn[row]:
            if not hypothesis.is_finished:
                continue
            target = torch.tensor([(*hypothesis.ids, END)])
            ids = torch.tensor([(BEGIN, *hypothesis.ids)])
            log_probs = model(source[row : row + 1], ids, mask[row : row + 1]).log_softmax(-1)
            wanted = log_probs.gather(-1, target[..., None]).sum().item()
            assert hypothesis.log_probability == pytest.approx(wanted, abs=1e-12)


def test_sampling_the_best_symbol_only_is_greedy() -> None:
    model = tiny()
    source, mask = sources()
    drawn = sample(model, source, mask, num_samples=3, top_k=1, max_length=8)
    for row, wanted in zip(drawn, greedy(model, source, mask, max_length=8), strict=True):
        assert_same(row, [wanted] * 3)


def test_one_generator_state_gives_one_sample() -> None:
    model = tiny()
    drawn = [
        sample(
            model,
            *sources(z=2),
            num_samples=4,
            max_length=6,
            generator=torch.Generator(torch.get_default_device()).manual_seed(seed),
        )
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# --------------------------------------------------------------------- a model of one's own, whose numbers are known


@dataclass(frozen=True)
class Rows:
    """What a toy remembers of each row: all that generation asks of prepared contexts and caches is `select`."""

    tensor: Tensor

    def select(self, rows: Tensor) -> "Rows":
        return Rows(self.tensor[rows])


@dataclass(frozen=True)
class ToyConfig:
    pad_id: int = PAD
    begin_id: int = BEGIN
    end_id: int = END


class Toy:
    """The next symbol depends on the newest one alone: source z's logits are tables[z][newest]. No nn.Module."""

    config = ToyConfig()

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables
        self.batches: list[tuple[int, int]] = []

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        return self.tables[source_ids[:, 0]]

    def prepare(self, states: Tensor, source_mask: Tensor | None = None, **hints: int) -> list[Rows]:
        self.hints = hints
        return [Rows(states)]

    def step(self, ids: Tensor, prepared: list[Rows], caches: list[Rows] | None = None) -> tuple[Tensor, list[Rows]]:
        self.batches.append(tuple(ids.shape))
        (states,) = prepared
        assert states.tensor.shape[0] == ids.shape[0]
        history = ids.flatten()[:, None]
        if caches is not None:
            history = torch.cat((caches[0].tensor, history), 1)
        self.history = history
        rows = torch.arange(len(ids))[:, None]
        return states.tensor[rows, ids], [Rows(history)]


def chain(*probabilities: dict[int, float], vocab_size: int = 6) -> Tensor:
    """A table of logits (V, V): row i is the distribution after symbol i; rows not given end at once."""
    table = torch.full((vocab_size, vocab_size), -torch.inf, dtype=torch.float64)
    table[:, END] = 0.0
    for symbol, row in zip((BEGIN, 3, 4, 5), probabilities, strict=False):
        table[symbol] = torch.tensor([row.get(v, 0.0) for v in range(vocab_size)], dtype=torch.float64).log()
    return table


def test_any_model_that_encodes_prepares_and_steps_can_generate() -> None:
    # After the begin: 3 (0.6) or 4 (0.4); after 3: the end or 5, even; after 4: the end. So greedy is not the best.
    toy = Toy(chain({3: 0.6, 4: 0.4}, {END: 0.5, 5: 0.5}, {END: 1.0})[None])
    source = torch.zeros(1, 1, dtype=torch.long)
    ((best, second),) = beam_search(toy, source, beams=3, length_penalty=0.0, max_length=5, num_hypotheses=2)
    assert (best.ids, second.ids) == ((4,), (3,))
    assert best.log_probability == pytest.approx(math.log(0.4))
    assert second.log_probability == pytest.approx(math.log(0.3))
    assert toy.hints == {"uses": 5, "query_length": 1, "repeats": 3}
    (first,) = greedy(toy, source, max_length=5)
    assert first.ids[0] == 3


def test_the_length_penalty_is_the_papers() -> None:
    toy = Toy(chain({3: 0.5, END: 0.5}, {4: 1.0}, {5: 1.0}, {END: 1.0})[None])
    source = torch.zeros(1, 1, dtype=torch.long)
    ((found, other),) = beam_search(toy, source, beams=3, length_penalty=0.6, max_length=5, num_hypotheses=2)
    assert (found.ids, other.ids) == ((3, 4, 5), ())
    assert found.log_probability == pytest.approx(math.log(0.5))
    assert found.score == pytest.approx(math.log(0.5) / ((5 + 4) / 6) ** 0.6)
    assert other.score == pytest.approx(math.log(0.5) / ((5 + 1) / 6) ** 0.6)
    ((found,),) = beam_search(toy, source, beams=3, length_penalty=-1.0, max_length=5)
    assert found.ids == ()


def test_a_source_stops_as_soon_as_no_live_beam_can_win() -> None:
    # The end at once has 0.9; what lives on starts at 0.1 and never ends by itself.
    endless = chain({END: 0.9, 3: 0.1}, {3: 1.0})
    source = torch.zeros(1, 1, dtype=torch.long)
    for alpha, steps in ((0.0, 1), (0.6, 1), (5.0, 40)):
        toy = Toy(endless[None])
        ((found,),) = beam_search(toy, source, beams=4, length_penalty=alpha, max_length=40)
        # With alpha 5 the endless one would win if it ended at the limit: log 0.1 / 7.5^5 > log 0.9.
        assert len(toy.batches) == steps
        assert found.ids == ()
    toy = Toy(endless[None])
    ((first, second),) = beam_search(toy, source, beams=4, max_length=40, num_hypotheses=2)
    assert len(toy.batches) == 40  # a second is wanted, so the search goes on
    assert (first.is_finished, second.is_finished, len(second.ids)) == (True, False, 40)


def test_a_penalty_below_zero_bounds_live_beams_by_their_next_length() -> None:
    # 3 and then the end has log 0.7 x 7/6, better than the end at once; at the limit it would have log 0.7 x 45/6.
    toy = Toy(chain({END: 0.3, 3: 0.7}, {END: 1.0})[None])
    ((found,),) = beam_search(toy, torch.zeros(1, 1, dtype=torch.long), beams=2, length_penalty=-1.0, max_length=40)
    assert found.ids == (3,)
    assert found.score == pytest.approx(math.log(0.7) * 7 / 6)


def test_sources_that_are_done_leave_the_batch() -> None:
    ends_after = [chain({3: 1.0}, {END: 1.0}), chain({3: 1.0}, {4: 1.0}, {5: 1.0}, {END: 1.0}), chain({END: 1.0})]
    source = torch.tensor([[2], [0], [1], [0]])
    for generate in (
        lambda toy: [row[0] for row in beam_search(toy, source, beams=1, max_length=9)],
        lambda toy: greedy(toy, source, max_length=9),
        lambda toy: [row[0] for row in sample(toy, source, max_length=9)],
    ):
        toy = Toy(torch.stack(ends_after))
        found = generate(toy)
        assert [hypothesis.ids for hypothesis in found] == [(), (3,), (3, 4, 5), (3,)]
        assert all(hypothesis.is_finished for hypothesis in found)
        # Dropping copies, so it waits until at least a quarter is done.
        assert [batch for batch, _ in toy.batches] == [4, 3, 1, 1]


def test_caches_follow_the_surviving_beams() -> None:
    torch.manual_seed(0)
    toy = Toy(torch.randn(3, 6, 6, dtype=torch.float64))
    toy.tables[:, :, END] = -5.0
    source = torch.tensor([[1], [0], [2]])
    found = beam_search(toy, source, beams=3, max_length=6, num_hypotheses=3)
    rows = toy.history.view(3, 3, 6)  # what the last step's caches held of each beam
    for row, hypotheses in zip(rows.tolist(), found, strict=True):
        cut = {(BEGIN, *hypothesis.ids)[:6] for hypothesis in hypotheses if not hypothesis.is_finished}
        assert cut
        assert cut <= {tuple(beam) for beam in row}


def test_padding_and_begin_are_never_generated() -> None:
    tables = torch.zeros(1, 6, 6)
    tables[..., [PAD, BEGIN]] = 9.0
    source = torch.zeros(1, 1, dtype=torch.long)
    drawn = sample(
        Toy(tables), source, num_samples=50, max_length=5, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    for hypothesis in (
        *drawn[0],
        *greedy(Toy(tables), source, max_length=5),
        *beam_search(Toy(tables), source, beams=30, max_length=5, num_hypotheses=30)[0],
    ):
        assert {PAD, BEGIN}.isdisjoint(hypothesis.ids)


def draws(tables: Tensor, **keywords) -> list[float]:
    """Shares of the symbols drawn first, out of 20,000 samples."""
    source = torch.zeros(1, 1, dtype=torch.long)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    (drawn,) = sample(Toy(tables), source, num_samples=20_000, max_length=1, generator=generator, **keywords)
    first = [hypothesis.ids[0] if hypothesis.ids else END for hypothesis in drawn]
    return [first.count(symbol) / len(first) for symbol in range(tables.shape[-1])]


@pytest.mark.parametrize(
    ("keywords", "shares"),
    [
        ({}, [0, 0, 0.1, 0.5, 0.3, 0.1]),
        ({"temperature": 0.5}, [0, 0, 0.01 / 0.36, 0.25 / 0.36, 0.09 / 0.36, 0.01 / 0.36]),
        ({"top_k": 2}, [0, 0, 0, 0.625, 0.375, 0]),
        ({"top_p": 0.5}, [0, 0, 0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 0, 0, 0.625, 0.375, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 0, 1, 0, 0]),  # of the two, the first alone has 0.625
        ({"top_p": 1.0, "top_k": 99}, [0, 0, 0.1, 0.5, 0.3, 0.1]),
    ],
)
def test_symbols_are_drawn_in_the_stated_shares(keywords: dict, shares: list[float]) -> None:
    tables = torch.tensor([0, 0, 0.1, 0.5, 0.3, 0.1]).log().expand(1, 6, 6).clone()
    assert draws(tables, **keywords) == pytest.approx(shares, abs=0.012)


def test_a_samples_probability_is_the_models_own() -> None:
    tables = torch.tensor([0, 0, 0.1, 0.5, 0.3, 0.1], dtype=torch.float64).log().expand(1, 6, 6)
    source = torch.zeros(1, 1, dtype=torch.long)
    ((found,),) = sample(Toy(tables), source, temperature=0.3, top_k=1, max_length=4)
    assert found.ids == (3, 3, 3, 3)
    assert found.log_probability == pytest.approx(4 * math.log(0.5))


# ----------------------------------------------------------------------------------------------- costs and refusals


@pytest.mark.parametrize("generate", [greedy, sample, beam_search])
def test_the_source_is_encoded_and_projected_once(generate) -> None:
    model = tiny()
    source, mask = sources()
    encoded, projected = [], []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    for layer in model.decoder.layers:
        layer.cross_attention.plan = "textbook"
        layer.cross_attention.v_proj.register_forward_hook(lambda _, args, out: projected.append(out.shape[:2]))
    keywords = {greedy: {}, sample: {"num_samples": 3}, beam_search: {"beams": 3}}[generate]
    generate(model, source, mask, max_length=6, **keywords)
    assert encoded == [1]
    assert projected == [(5, 6)] * 2  # five sources, not fifteen


def test_no_sources_give_no_hypotheses() -> None:
    model = tiny()
    source = torch.zeros(0, 4, dtype=torch.long)
    assert greedy(model, source, max_length=3) == []
    assert beam_search(model, source, max_length=3) == []
    assert sample(model, source, max_length=3) == []


def test_generation_leaves_no_graph_behind() -> None:
    model = tiny()
    (found,) = greedy(model, *sources(z=1), max_length=3)
    assert isinstance(found.score, float)
    assert isinstance(found.ids, tuple)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("generate", "keywords", "message"),
    [
        (greedy, {"max_length": 0}, "max_length must be at least 1, got 0"),
        (beam_search, {"beams": 0}, "beams must be at least 1, got 0"),
        (beam_search, {"num_hypotheses": 0}, "num_hypotheses must be at least 1, got 0"),
        (beam_search, {"beams": 3, "num_hypotheses": 4}, "num_hypotheses must be at most beams, got 4 of 3 beams"),
        (sample, {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        (sample, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (sample, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (sample, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        (sample, {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_impossible_wishes_are_refused(generate, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny(), *sources(), **{"max_length": 5, **keywords})


@pytest.mark.parametrize("generate", [greedy, sample, beam_search])
def test_a_model_in_training_mode_is_refused(generate) -> None:
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        generate(tiny().train(), *sources(), max_length=5)


def test_a_limit_beyond_the_learned_positions_is_refused_when_it_is_reached() -> None:
    model = tiny(positions="learned", max_length=6)
    model.target_embedding.weight.data[END] = 0
    with pytest.raises(ValueError, match="length 7 is longer than the max_length=6"):
        beam_search(model, *sources(), beams=9, num_hypotheses=9, max_length=30)
