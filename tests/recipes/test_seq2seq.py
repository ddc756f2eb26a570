"""The general recipe: parts that never share a source, tokenizers of each side, metrics, descriptions."""

import json
import math

import pytest
import torch

from crossattention.data.vocabulary import UNKNOWN, UnknownSymbol
from crossattention.recipes.seq2seq import (
    Seq2SeqConfig,
    Seq2SeqTask,
    check_files,
    config_from_json,
    read_parts,
    score_pairs,
)
from recipes.reversing_words import TINY, write_reversed_words


def write_pairs(path, pairs):
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    return path


def numbered(count, offset=0):
    return [(f"s{index}", f"t{index}") for index in range(offset, offset + count)]


def test_one_source_never_stands_on_two_sides(tmp_path):
    twice = [(source, target + suffix) for source, target in numbered(2000) for suffix in ("", "x")]
    parts = read_parts(Seq2SeqConfig(write_pairs(tmp_path / "p.tsv", twice)))
    sources = [{source for source, _ in part} for part in (parts.train, parts.valid, parts.test)]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 2000
    assert len(parts.train) + len(parts.valid) + len(parts.test) == 4000
    assert len(parts.valid) / 4000 == pytest.approx(0.05, abs=0.02)
    assert len(parts.test) / 4000 == pytest.approx(0.05, abs=0.02)


def test_a_source_keeps_its_part_when_the_file_grows(tmp_path):
    small = read_parts(Seq2SeqConfig(write_pairs(tmp_path / "a.tsv", numbered(500))))
    large = read_parts(Seq2SeqConfig(write_pairs(tmp_path / "b.tsv", numbered(2000)[::-1])))
    assert set(small.valid) <= set(large.valid)
    assert set(small.test) <= set(large.test)


def test_given_files_are_taken_whole_and_never_trained_on(tmp_path):
    data = write_pairs(tmp_path / "data.tsv", numbered(500))
    held = numbered(20, offset=490)
    valid = write_pairs(tmp_path / "valid.tsv", held)
    parts = read_parts(Seq2SeqConfig(data, valid=valid))
    assert parts.valid == held
    assert not {source for source, _ in parts.train} & {source for source, _ in held}
    assert 0 < len(parts.test) < 60
    both = read_parts(Seq2SeqConfig(data, valid=valid, test=write_pairs(tmp_path / "test.tsv", numbered(5))))
    assert len(both.train) == 500 - 10 - 5


def test_too_few_pairs_to_divide_is_an_error(tmp_path):
    path = write_pairs(tmp_path / "p.tsv", numbered(3))
    with pytest.raises(ValueError, match=r"part of .*p\.tsv is empty: 3 pairs are too few.*--valid, --test"):
        read_parts(Seq2SeqConfig(path))


def test_bad_lines_are_counted_over_all_files(tmp_path):
    data = write_pairs(tmp_path / "data.tsv", numbered(500))
    data.write_bytes(data.read_bytes() + b"no tab\n\xff\tx\n")
    with pytest.raises(ValueError, match=r"data\.tsv, line 501: expected 2 columns, got 1"):
        read_parts(Seq2SeqConfig(data))
    parts = read_parts(Seq2SeqConfig(data, skip_bad=True))
    assert parts.skipped == 2
    assert parts.problems[1].endswith("line 502: not UTF-8: byte 0xff at position 1 of the line")


@pytest.mark.parametrize(("source", "target"), [("characters", "words"), ("words", "bpe"), ("bpe", "characters")])
def test_each_side_has_its_own_tokens_and_the_loss_falls(tmp_path, source, target):
    pytest.importorskip("tokenizers", reason="BPE needs the data extra")
    pairs = [(f"{a} and {b}", f"{b} und {a}") for a in ("cat", "dog", "cow", "hen", "fox") for b in map(str, range(30))]
    size = None if {source, target} == {"characters"} else 280
    config = Seq2SeqConfig(
        write_pairs(tmp_path / "p.tsv", pairs),
        source_tokens=source,
        target_tokens=target,
        vocabulary_size=size,
        metrics=("exact",),
        model=TINY,
    )
    task = Seq2SeqTask(config)
    assert (task.learner.source.kind, task.learner.target.kind) == (source, target)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = task.learner.held_out_loss(model, task.readable)
    for step in range(15):
        optimizer.zero_grad()
        task.loss(model, task.batch_at(step)).backward()
        optimizer.step()
    assert task.learner.held_out_loss(model, task.readable) < before - 0.3


def test_an_untrained_model_is_about_as_good_as_chance(reversing):
    task, _ = reversing
    torch.manual_seed(0)
    # Output logits of an untrained model have a variance of about 1, so half a nat above the uniform is expected.
    loss = task.learner.held_out_loss(task.build_model().eval(), task.readable)
    assert math.log(task.learner.target.size) - 0.5 < loss < math.log(task.learner.target.size) + 1.5


def test_a_held_out_pair_may_be_longer_than_any_batch(tmp_path):
    valid = write_pairs(tmp_path / "v.tsv", [("abc" * 40, "C B A " * 40)])
    data = write_reversed_words(tmp_path / "p.tsv")
    config = Seq2SeqConfig(data, valid=valid, target_tokens="words", metrics=("exact",), tokens_per_batch=60, model=TINY)
    task = Seq2SeqTask(config)
    assert math.isfinite(task.evaluate(task.build_model().eval()).metrics["loss"])


def test_evaluation_of_a_model_that_has_learned(reversing):
    task, model = reversing
    evaluation = task.evaluate(model)
    assert evaluation.metrics["exact"] > 0.8
    assert evaluation.metrics["loss"] < 0.6
    sample = evaluation.sample
    assert sample["predicted"] == sample["reference"] == " ".join(reversed(sample["source"].upper()))
    assert sample["columns"] == list(sample["source"])
    assert len(sample["weights"]) == len(sample["rows"]) == len(sample["source"])
    json.dumps(sample)


def test_unreadable_sources_count_as_wrong(reversing):
    task, model = reversing
    scores = score_pairs(task.learner.translator(model), [("abc", "C B A"), ("a!c", "C ! A")], ["exact"])
    assert scores == {"exact": 0.5, "pairs": 2, "unreadable": 1}


def test_the_metric_to_minimise_is_an_error_rate_else_the_loss(tmp_path):
    pytest.importorskip("jiwer", reason="error rates need the data extra")
    path = write_reversed_words(tmp_path / "p.tsv")
    names = {("exact", "wer", "cer"): "wer", ("exact",): "loss"}
    for metrics, name in names.items():
        assert Seq2SeqTask(Seq2SeqConfig(path, metrics=metrics, model=TINY)).metric == name


def test_the_description_is_json_and_brings_the_settings_back(reversing):
    task, _ = reversing
    description = json.loads(json.dumps(task.describe()))
    assert config_from_json(description["config"]) == task.config
    assert description == json.loads(json.dumps(task.describe()))


def test_changed_or_missing_data_is_named(tmp_path):
    path = write_reversed_words(tmp_path / "p.tsv")
    task = Seq2SeqTask(Seq2SeqConfig(path, metrics=("exact",), model=TINY))
    digests = task.describe()["data"]
    check_files(task.config, digests)
    path.write_text(path.read_text() + "x\ty\n")
    with pytest.raises(ValueError, match=rf"p\.tsv has changed .*expected sha256 {digests[str(path)]}"):
        check_files(task.config, digests)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"p\.tsv, found nothing"):
        check_files(task.config, digests)


def test_faults_of_the_caller_are_named(tmp_path):
    path = write_reversed_words(tmp_path / "p.tsv")
    with pytest.raises(ValueError, match="vocabulary_size=9 has no use"):
        Seq2SeqConfig(path, vocabulary_size=9, metrics=("exact",))
    with pytest.raises(ValueError, match="evaluation_pairs of at least 1, got 0"):
        Seq2SeqConfig(path, evaluation_pairs=0, metrics=("exact",))
    with pytest.raises(ValueError, match="got 'rouge'"):
        Seq2SeqConfig(path, metrics=("rouge",))
    with pytest.raises(ValueError, match=r"tokens_per_batch=5; raise tokens_per_batch to at least 7"):
        Seq2SeqTask(Seq2SeqConfig(path, target_tokens="words", tokens_per_batch=5, metrics=("exact",), model=TINY))


def task_of_words(path, pairs):
    config = Seq2SeqConfig(write_pairs(path, pairs), source_tokens="words", target_tokens="words", metrics=("exact",), model=TINY)
    return Seq2SeqTask(config)


def test_an_unseen_source_word_is_unknown_because_words_seen_once_were_trained_as_unknown(tmp_path):
    task = task_of_words(tmp_path / "p.tsv", [(f"word{index} end", f"wort{index} ende") for index in range(300)])
    assert task.learner.source.symbols == ("end",)
    assert task.readable == task.held_out
    assert task.learner.source.encode(task.parts.train[0][0])[0] == UNKNOWN
    assert task.learner.source.encode(task.held_out[0][0])[0] == UNKNOWN


def test_an_unseen_source_word_is_an_error_where_unknown_was_never_trained(tmp_path):
    task = task_of_words(tmp_path / "p.tsv", [(f"a{i % 7} b{i % 11} c{i % 13}", "x") for i in range(1000)])
    with pytest.raises(UnknownSymbol, match=r"symbol 'd1', word 2 of 'a1 d1', was never seen in training"):
        task.learner.source.encode("a1 d1")


def test_no_readable_validation_pair_is_an_error(tmp_path):
    data = write_pairs(tmp_path / "p.tsv", numbered(300))
    valid = write_pairs(tmp_path / "v.tsv", [("\u00e4", "t1"), ("\u00f6", "t2")])
    with pytest.raises(ValueError, match=r"none of 2 validation pairs is in symbols that the training part has"):
        Seq2SeqTask(Seq2SeqConfig(data, valid=valid, metrics=("exact",), model=TINY))
