"""What must hold of all features together, whatever the data, the model and who asks."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math

import numpy as np
import pytest
import torch

from raylora import DynamicProbeAnalyzer, FeatureExtractionPipeline, HyperParams
from raylora.config.method import Method
from raylora.config.options import FeatureOptions
from raylora.data.datasets import sample_examples
from raylora.features import static
from raylora.features.pipeline import extract_features
from raylora.features.static import as_dataset, count_held_out
from raylora.model.adapters import LoadedModel
from raylora.rows import FEATURE_COLUMNS, FEATURE_NAMES, STATIC_NAMES
from tests.helpers.feature_rows import TIMES, WORDS, assert_same_row, features_of, make_records
from tests.helpers.tiny import make_model


@pytest.mark.slow
@pytest.mark.ci
def test_every_column_is_there_within_its_range_and_none_is_another(loaded, monkeypatch):
    monkeypatch.setattr(static, "NUM_FORESTS", 1)
    rows = [features_of(loaded, make_records(50, seed), probe_steps=3) for seed in range(3)]
    for row in rows:
        assert set(row) == {*FEATURE_NAMES, *TIMES}
        for column in FEATURE_COLUMNS:
            if column.name != "feature_notes":
                assert column.minimum <= row[column.name] <= column.maximum, column.name
    values = {n: tuple(r[n] for r in rows) for n in FEATURE_NAMES if n in STATIC_NAMES}
    assert len(set(values.values())) >= len(values) - 1, "two columns are equal"


@pytest.mark.slow
@pytest.mark.ci
def test_the_file_order_changes_nothing_and_twice_is_the_same(loaded):
    records = make_records(16)
    before = loaded.logits_hash()
    one, two = features_of(loaded, records), features_of(loaded, records)
    assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in two.items() if k not in TIMES}
    assert_same_row(one, features_of(loaded, records[::-1]))
    assert loaded.logits_hash() == before, "the probe changed the base"


def test_after_the_probe_every_weight_is_bit_for_bit_what_it_was(loaded):
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    row = features_of(loaded, make_records(10), probe_steps=4, learning_rate=1e-2)
    assert row["avg_param_change"] > 0
    after = {name.replace(".base_layer", ""): p for name, p in loaded.model.named_parameters()}
    assert {name.replace(".base_layer", "") for name in before} == set(after)
    for name, weight in before.items():
        assert torch.equal(weight, after[name.replace(".base_layer", "")]), name


def test_every_example_twice_is_all_duplicates(loaded):
    assert features_of(loaded, make_records(9) * 2, probe_steps=0)["approximate_duplicates"] == 1


def test_one_sentence_copied_has_no_diversity(loaded):
    row = features_of(loaded, make_records(1) * 10, probe_steps=0)
    assert row["semantic_diversity"] == pytest.approx(0, abs=1e-5)


def test_learning_rate_zero_changes_nothing(loaded):
    row = features_of(loaded, make_records(10), learning_rate=0.0)
    for name in ("loss_decay_rate", "perplexity_change_rate", "catastrophic_forgetting"):
        assert row[name] == pytest.approx(0, abs=1e-6), name
    assert row["avg_param_change"] == 0
    assert row["relative_weight_update"] == 0
    assert row["avg_grad_norm"] > 0
    assert 0 < row["landscape_flatness"] < 1


def test_text_is_measured_on_all_examples_whatever_the_sample(loaded):
    records = make_records(30) * 2
    options = FeatureOptions(sample_size=8, probe_steps=0)
    row = extract_features(loaded, as_dataset(records), Method(max_length=256), options, 512, seed=0)
    assert row["approximate_duplicates"] == 1
    assert row["static_valid_count"] == 8


def test_the_pipeline_that_users_know(tokenizer):
    model = make_model()
    hyperparams = HyperParams(learning_rate=1e-3, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    before = LoadedModel(model, tokenizer, "", "none").logits_hash()
    pipeline = FeatureExtractionPipeline(model, tokenizer)
    row = pipeline.run_quick_pipeline(make_records(8), hyperparams, probe_steps=2)
    assert set(FEATURE_NAMES) <= set(row)
    assert row["avg_param_change"] > 0
    without = pipeline.extract_all_features(make_records(8), hyperparams, enable_dynamic_probes=False)
    assert without["avg_param_change"] is None
    analyzer = DynamicProbeAnalyzer(model, tokenizer)
    dynamic_row = analyzer.extract_all_dynamic_features(
        make_records(8), hyperparams, probe_steps=2, sample_size=0, batch_size=4
    )
    assert dynamic_row["avg_param_change"] == pytest.approx(row["avg_param_change"], rel=1e-3)
    assert LoadedModel(model, tokenizer, "", "none").logits_hash() == before, "the probe changed the base"
    ids = tokenizer("the cat sat on the blue river", return_tensors="pt")["input_ids"]
    batches = [{"input_ids": ids, "labels": ids.clone()}] * 2
    other = make_model()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    seen = analyzer.run_streaming_training(
        other, optimizer, batches, 4, gradient_accumulation_steps=2, max_grad_norm=1.0
    )
    assert len(seen["losses"]) == 4
    assert seen["losses"][-1] < seen["losses"][0]
    assert 0.9 < seen["gradient_consistency"] <= 1.0001


@pytest.mark.timeout(300)  # quadratic in the length of a text: hours
@pytest.mark.parametrize(
    "records",
    [
        [{"question": "Why?", "answer": "So."}],
        [{"question": "Why?", "answer": "So."}] * 5,
        [{"question": "为什么?", "answer": "因为。所以是这样。"}, {"question": "لماذا؟", "answer": "لأن."}],
        [{"question": "🎉?", "answer": "🎉🎉"}, {"question": "?", "answer": "!"}],
        pytest.param(
            [{"question": "x" * 1_000_000, "answer": "y " * 500}, {"question": "a", "answer": "b"}],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [{"question": "a", "answer": "y " * 500_000}, {"question": "a", "answer": "b"}], marks=pytest.mark.slow
        ),
        [{"question": "a", "answer": "Yes it is. " * 90_000}, {"question": "a", "answer": "b"}],
    ],
    ids=["one", "same", "scripts", "emoji", "long question", "long answer", "many sentences"],
)
def test_trouble_gives_nulls_with_reasons_and_never_a_crash(loaded, records):
    row = features_of(loaded, records)
    for name in FEATURE_NAMES:
        assert row[name] is not None or f"{name}: " in row["feature_notes"], name


def test_a_model_that_gives_no_numbers_gives_nulls(tokenizer):
    model = make_model().requires_grad_(False)
    with torch.no_grad():
        model.get_output_embeddings().weight *= math.nan
    row = features_of(LoadedModel(model, tokenizer, "tiny", "none"), make_records(6))
    assert row["base_model_perplexity"] is None
    assert row["initial_loss"] is None
    assert "base_model_perplexity: the model gave no finite number" in row["feature_notes"]


@pytest.fixture
def loaded_without_zebras(tokenizer):
    """A model that has no number for one token, which stands in one word alone."""
    model = make_model().requires_grad_(False)
    odd = next(t for t in tokenizer("zebra", add_special_tokens=False)["input_ids"] if t not in seen_ids(tokenizer))
    table = model.get_input_embeddings().weight.data.clone()
    table[odd] = math.nan
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.clone(), requires_grad=False)  # no longer tied
    model.get_input_embeddings().weight = torch.nn.Parameter(table, requires_grad=False)
    return LoadedModel(model, tokenizer, "tiny", "none")


def test_an_example_without_numbers_leaves_the_others_theirs(loaded_without_zebras):
    records = make_records(6)
    row = features_of(loaded_without_zebras, [*records, {"question": "zebra", "answer": "It is."}], probe_steps=0)
    assert row["static_valid_count"] == 6
    assert row["static_skipped_count"] == 1
    expected = features_of(loaded_without_zebras, records, probe_steps=0)
    for name in ("base_model_perplexity", "reference_perplexity", "semantic_diversity", "avg_activation_sparsity"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name


def test_a_probe_whose_loss_is_no_number_keeps_what_was_measured_before_it(loaded_without_zebras):
    for i in range(20):  # until the odd one is not among those held out
        records = [*make_records(6), {"question": "zebra", "answer": f"It is{'.' * i}"}]
        dataset = as_dataset(records)
        sample = sample_examples(dataset.examples, 0, dataset.seed)
        if all("zebra" not in e.question for e in sample[: count_held_out(len(sample))]):
            break
    row = features_of(loaded_without_zebras, records, probe_steps=2, batch_size=8)
    assert row["initial_loss"] > 0
    assert row["loss_decay_rate"] is None
    assert "loss_decay_rate: the loss became nan" in row["feature_notes"]
    assert not any(p.requires_grad for p in loaded_without_zebras.model.parameters()), "the adapter was left behind"


def seen_ids(tokenizer):
    texts = [" ".join(r.values()) for r in make_records(6)] + [" ".join(WORDS), " ".join(WORDS).title(), "It is."]
    return {i for t in tokenizer(texts)["input_ids"] for i in t}


def test_answers_that_are_empty_are_counted_and_skipped(loaded):
    from raylora.records import Example, Message

    known = list(as_dataset(make_records(4)).examples)
    empty = Example((Message("user", "Why?"),), "", "Why?")
    row = features_of(loaded, [*known, empty, empty])
    assert row["static_valid_count"] == 4
    assert row["static_skipped_count"] == 2
    nothing = features_of(loaded, [empty, empty])
    assert nothing["base_model_perplexity"] is None
    assert "base_model_perplexity: no example of the sample has an answer" in nothing["feature_notes"]
    for name in FEATURE_NAMES:
        assert nothing[name] is not None or f"{name}: " in nothing["feature_notes"], name


def test_what_users_lend_they_get_back_as_it_was(tokenizer):
    """Modules, modes, flags and outputs: whoever measures first trains afterwards."""
    model = make_model().train()
    model.lm_head.requires_grad_(False)
    seen = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    hyperparams, records = HyperParams(lora_r=2), make_records(8)
    one = FeatureExtractionPipeline(model, tokenizer).run_quick_pipeline(records, hyperparams, probe_steps=2)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == seen
    assert [(name, id(m), m.training) for name, m in model.named_modules()] == modules
    two = FeatureExtractionPipeline(model, tokenizer).run_quick_pipeline(records, hyperparams, probe_steps=2)
    assert_same_row(one, two)


def test_a_tokenizer_without_a_pad_token_does_as_well(loaded, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    assert other.pad_token_id is None
    expected = features_of(loaded, make_records(8))
    model = make_model()
    pipeline = FeatureExtractionPipeline(model, other)
    row = pipeline.run_quick_pipeline(make_records(8), HyperParams(), probe_steps=2)
    assert row["base_model_perplexity"] == pytest.approx(expected["base_model_perplexity"], rel=1e-4)
    assert row["avg_param_change"] > 0


def test_without_a_probe_the_first_loss_is_there_all_the_same(loaded):
    records = make_records(10)
    without, row = features_of(loaded, records, probe_steps=0), features_of(loaded, records)
    assert without["initial_loss"] == row["initial_loss"] > 0
    assert without["loss_decay_rate"] is None
    assert "initial_loss" not in without["feature_notes"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_column_differs_between_real_datasets_and_none_is_a_function_of_another(smollm2, shared_data):
    from raylora.data.datasets import read_dataset

    before = smollm2.logits_hash()
    rows = []
    for path in sorted((shared_data / "chunk_001").iterdir()):
        dataset = read_dataset(path)
        method = Method(batch_size=2, gradient_accumulation=1, max_length=192)
        rows.append(
            extract_features(smollm2, dataset, method, FeatureOptions(sample_size=12, probe_steps=3), 512, seed=0)
        )
    assert len(rows) == 4
    assert smollm2.logits_hash() == before
    constant = {
        "static_valid_count",
        "static_skipped_count",
        "static_imputed_count",
        "static_coverage",
        "embedding_outlier_ratio",  # null, of 12 examples
    }
    names = [n for n in FEATURE_NAMES if n not in constant | {"feature_notes"}]
    values = {n: tuple(r[n] for r in rows) for n in names}
    for name, column in values.items():
        assert None not in column, (name, rows[column.index(None)]["feature_notes"])
        assert len(set(column)) > 1, name
    assert len(set(values.values())) == len(values), "two columns are equal"
    for one, other in itertools.combinations(names, 2):
        correlation = np.corrcoef(values[one], values[other])[0, 1]
        assert abs(correlation) < 1 - 1e-9, f"{one} is {other}, moved or stretched"
    for one in names:
        for other in names:
            for function in (lambda x: 1 - x, lambda x: 1 / (1 + x) if x != -1 else 0, math.exp, lambda x: -x):
                with contextlib.suppress(OverflowError):
                    same = [
                        function(a) == pytest.approx(b, rel=1e-6)
                        for a, b in zip(values[one], values[other], strict=True)
                    ]
                    assert not all(same), (one, other)
