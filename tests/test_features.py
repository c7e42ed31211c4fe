"""What must hold of every feature, and independent references where there are any."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import IsolationForest
from sklearn.feature_extraction.text import TfidfVectorizer

from raylora import DynamicProbeAnalyzer, FeatureExtractionPipeline, HyperParams, StaticFeatureExtractor
from raylora.config import FeatureOptions, Method
from raylora.datasets import sample_examples
from raylora.encoding import encode_example
from raylora.features import text
from raylora.features.columns import COLUMNS, FEATURE_NAMES, STATIC_NAMES
from raylora.features.dynamic import loss_stability
from raylora.features.forward import sentence_slices
from raylora.features.pipeline import extract_features
from raylora.features.static import as_dataset, count_held_out, extract_static
from raylora.model import LoadedModel
from raylora.records import UserError
from tests.tiny import make_model

WORDS = ["river", "mountain", "answer", "photosynthesis", "the", "of", "blue", "eleven", "understanding", "cat", "it"]
TIMES = ("text_seconds", "static_seconds", "probe_seconds")


def make_records(num: int = 12, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    sentence = lambda n: " ".join(rng.choice(WORDS) for _ in range(n)).capitalize() + "."  # noqa: E731
    return [
        {"question": sentence(6)[:-1] + "?", "answer": f"{sentence(5)} {sentence(4)}", "context": sentence(9)}
        for _ in range(num)
    ]


def features_of(loaded, records, probe_steps=2, **method):
    options = FeatureOptions(sample_size=0, probe_steps=probe_steps)
    method = Method(batch_size=2, gradient_accumulation=1, learning_rate=1e-3, max_length=256).model_copy(update=method)
    return extract_features(loaded, as_dataset(records), method, options, 512, seed=0)


def assert_same_row(one, two, tolerance=1e-4):
    for name in set(one) - set(TIMES):
        if isinstance(one[name], float):
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-6), name
        else:
            assert two[name] == one[name], name


def test_every_column_is_there_within_its_range_and_none_is_another(loaded):
    rows = [features_of(loaded, make_records(12, seed), probe_steps=3) for seed in range(3)]
    for row in rows:
        assert set(row) == {*FEATURE_NAMES, *TIMES}
        for column in COLUMNS:
            if column.name != "feature_notes":
                assert column.minimum <= row[column.name] <= column.maximum, column.name
    values = {n: tuple(r[n] for r in rows) for n in FEATURE_NAMES if n in STATIC_NAMES}
    assert len(set(values.values())) >= len(values) - 1, "two columns are equal"


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


def test_activation_sparsity_is_that_of_every_token_by_itself(loaded, tokenizer):
    dataset = as_dataset(make_records(5))
    row = extract_static(loaded.model, tokenizer, dataset, dataset.examples, token_budget=200).values
    seen, shares = [], []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        for n, m in loaded.model.named_modules()
        if n.endswith("down_proj")
    ]
    for example in dataset.examples:
        e = encode_example(tokenizer, example, 1024)
        content = [i for i in range(len(e)) if e.is_question[i] or e.is_answer_text[i]]
        seen.clear()
        with torch.inference_mode():
            loaded.model(input_ids=torch.tensor([e.input_ids]))
        own = [float((x[i].abs() < 0.1 * x[i].pow(2).mean().sqrt()).float().mean()) for x in seen for i in content]
        shares.append(np.mean(own))
    for hook in hooks:
        hook.remove()
    assert row["avg_activation_sparsity"] == pytest.approx(np.mean(shares), rel=1e-4)


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


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), num=st.integers(2, 150), num_words=st.integers(3, 400))
def test_near_doubles_among_many_words_are_those_of_brute_force(seed, num, num_words):
    rng = random.Random(seed)
    texts = [" ".join(f"w{int(rng.paretovariate(0.7)) % num_words}" for _ in range(12)) for _ in range(num)]
    texts += [f"{t} w1" for t in texts[::5]]
    matrix = TfidfVectorizer(analyzer=text.words_of).fit(sorted(set(texts))).transform(texts)
    cosines = (matrix @ matrix.T).toarray()
    np.fill_diagonal(cosines, 0)
    if not (np.abs(cosines - 0.8) < 1e-5).any():
        assert text.share_with_a_double(texts) == pytest.approx((cosines > 0.8).any(1).mean())


def test_perplexities_are_those_of_a_plain_loop(loaded, tokenizer):
    dataset = as_dataset(make_records(8))
    row = extract_static(loaded.model, tokenizer, dataset, dataset.examples, token_budget=200).values
    whole, answers, ratios = [], [], []
    for example in dataset.examples:
        e = encode_example(tokenizer, example, 1024)
        losses = token_losses(loaded.model, e.input_ids)
        content = [i for i in range(1, len(e)) if e.is_question[i] or e.is_answer_text[i]]
        said = [i for i in range(1, len(e)) if e.is_answer_text[i]]
        alone = token_losses(loaded.model, [tokenizer.bos_token_id, *(e.input_ids[i] for i in said)])[1:]
        whole.append(math.exp(np.mean([losses[i] for i in content])))
        answers.append(math.exp(np.mean([losses[i] for i in said])))
        ratios.append(math.log(answers[-1]) / np.mean(alone))
    assert row["reference_perplexity"] == pytest.approx(np.mean(whole), rel=1e-4)
    assert row["reference_perplexity_std"] == pytest.approx(np.std(whole), rel=1e-3)
    assert row["base_model_perplexity"] == pytest.approx(np.mean(answers), rel=1e-4)
    assert row["base_perplexity_std"] == pytest.approx(np.std(answers), rel=1e-3)
    assert row["instruction_following_difficulty"] == pytest.approx(np.mean(ratios), rel=1e-4)


def token_losses(model, ids):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [0.0, *torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()]


def test_diversity_and_similarity_are_those_of_the_whole_matrix(loaded, tokenizer):
    dataset = as_dataset(make_records(7))
    row = extract_static(loaded.model, tokenizer, dataset, dataset.examples).values
    unit, similar = [], []
    for example in dataset.examples:
        e = encode_example(tokenizer, example, 1024)
        with torch.inference_mode():
            output = loaded.model(input_ids=torch.tensor([e.input_ids]), output_hidden_states=True)
        states = output.hidden_states[-1][0]
        question, answer = torch.tensor(e.is_question), torch.tensor(e.is_answer_text)
        unit.append(torch.nn.functional.normalize(states[question | answer].mean(0), dim=0))
        similar.append(torch.cosine_similarity(states[question].mean(0), states[answer].mean(0), dim=0))
    cosines = torch.stack(unit) @ torch.stack(unit).T
    n = len(cosines)
    mean = (cosines.sum() - cosines.trace()) / (n * (n - 1))
    assert row["semantic_diversity"] == pytest.approx(1 - float(mean), abs=1e-5)
    assert row["io_similarity"] == pytest.approx(float(torch.stack(similar).mean()), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab cd", min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=30))
def test_duplicates_are_those_of_brute_force(texts):
    matrix = TfidfVectorizer(analyzer=text.words_of).fit(sorted(set(texts))).transform(texts)
    cosines = (matrix @ matrix.T).toarray()
    np.fill_diagonal(cosines, 0)
    near_border = np.abs(cosines - 0.8) < 1e-5
    if not near_border.any():
        assert text.share_with_a_double(texts) == pytest.approx((cosines > 0.8).any(1).mean())


def test_duplicates_of_many_texts_are_found_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(text, "MAX_PAIRS", 7)
    texts = [f"word{i} other{i} third{i}" for i in range(50)] + ["word3 other3 third3"]
    assert text.share_with_a_double(texts) == pytest.approx(2 / 51)


def test_text_statistics_by_hand():
    assert text.calculate_special_char_ratio("a,b+c d") == pytest.approx(2 / 7)
    assert text.calculate_answer_groundedness("The cat sat.", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert text.calculate_answer_groundedness("x", "!!") is None
    assert text.repetition(["a", "b", "a", "b", "a"]) == pytest.approx(1 - 2 / 3)
    assert loss_stability([3.0, 2.0, 1.0]) == pytest.approx(1)
    assert loss_stability([3.0, 2.0]) is None


def test_words_of_every_script():
    for said, expected in {
        "The CAT's 3 straße_1!": ["the", "cat", "s", "3", "strasse_1"],
        "हिन्दी भाषा": ["हिन्दी", "भाषा"],
        "مُحَمَّد كتب": ["مُحَمَّد", "كتب"],
        "我喜欢ABC茶": ["我", "喜", "欢", "abc", "茶"],
        "ひらがな カタカナ": ["ひ", "ら", "が", "な", "カタカナ"],
        "🎉 ... —": [],
    }.items():
        assert text.words_of(said) == expected


@given(st.text(max_size=60))
def test_words_of_ascii_are_those_of_the_rule_for_all(said):
    assert [w for w in text.words_of(said) if w.isascii()] == [
        w for w in text._WORD.findall(said.casefold()) if w.isascii()
    ]


def test_text_features_by_hand(tokenizer):
    """Two examples that anyone can count."""
    records = [
        {"question": "Why, why is the sky blue?", "answer": "Scattering of light of light of light."},
        {"question": "Is it?", "answer": "It is, understandably; it is."},
    ]
    dataset = as_dataset(records)
    values, notes = text.text_features(dataset.examples, tokenizer)
    tokens = {k: [len(tokenizer(r[k], add_special_tokens=False)["input_ids"]) for r in records] for k in records[0]}
    asked, said = tokens["question"], tokens["answer"]
    assert asked[0] > asked[1]
    assert said != asked
    letters = "".join(r["question"] + r["answer"] for r in records)
    assert values == pytest.approx(
        {
            "avg_input_length": sum(asked) / 2,
            "input_length_std": abs(asked[0] - asked[1]) / 2,
            "avg_output_length": sum(said) / 2,
            "output_length_std": abs(said[0] - said[1]) / 2,
            "io_length_ratio": sum(said) / sum(asked),
            "input_ttr": (5 / 6 + 2 / 2) / 2,
            "output_ttr": (3 / 7 + 3 / 5) / 2,
            # Of five 3-grams three are distinct, "of light of" and "light of light" among them; the other's three all.
            "output_ngram_repetition": ((1 - 3 / 5) + 0) / 2,
            "vocab_complexity": 2 / 20,  # scattering, understandably
            "special_char_ratio": sum(c in ",?.;" for c in letters) / len(letters),
            "approximate_duplicates": 0.0,
            "answer_groundedness": (0 + (4 / 5 + 0 + 0) / 3) / 2,
        },
        abs=1e-9,
    ), values
    assert notes == {}


def test_sentences_are_found_in_other_scripts(tokenizer):
    for answer, expected in {
        "One two. Three four! Five six?": 3,
        'It costs 3.50 dollars, says www.example.com today. "Too much!" said he.': 3,
        "वह आया। वह गया।": 2,
        "हل هذا كتاب؟ هذه مدرسة.": 2,
        "今天下雨。明天晴天。": 2,
        "هذا كتاب. هذه مدرسة.": 2,
        "First line\nSecond line": 2,
        "Ok. Yes.": 0,
        "...": 0,
    }.items():
        offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert len(sentence_slices(answer, offsets)) == expected, answer


@pytest.mark.parametrize(
    "records",
    [
        [{"question": "Why?", "answer": "So."}],
        [{"question": "Why?", "answer": "So."}] * 5,
        [{"question": "为什么?", "answer": "因为。所以是这样。"}, {"question": "لماذا؟", "answer": "لأن."}],
        [{"question": "🎉?", "answer": "🎉🎉"}, {"question": "?", "answer": "!"}],
        [{"question": "x" * 1_000_000, "answer": "y " * 500}, {"question": "a", "answer": "b"}],
        [{"question": "a", "answer": "y " * 500_000}, {"question": "a", "answer": "b"}],
        [{"question": "a", "answer": "Yes it is. " * 90_000}, {"question": "a", "answer": "b"}],
    ],
    ids=["one", "same", "scripts", "emoji", "long question", "long answer", "many sentences"],
)
def test_trouble_gives_nulls_with_reasons_and_never_a_crash(loaded, records):
    started = time.perf_counter()
    row = features_of(loaded, records)
    assert time.perf_counter() - started < 60
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


def test_characters_are_those_of_the_records(tmp_path, loaded):
    import json

    from raylora.datasets import load_dataset

    records = [
        {
            "messages": [{"role": r, "content": "x" * n} for r, n in (("user", 3), ("assistant", 5)) * 2],
            "source": "abcd",
        }
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    from_file, from_memory = load_dataset(tmp_path / "a.json"), as_dataset(records)
    assert from_memory.total_chars == from_file.total_chars
    assert from_memory.num_items == from_file.num_items == 1


def test_memory_that_runs_out_halves_the_batch(loaded, tokenizer):
    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    dataset = as_dataset(make_records(9))
    expected = extract_static(loaded.model, tokenizer, dataset, dataset.examples, token_budget=4096).values
    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        found = extract_static(loaded.model, tokenizer, dataset, dataset.examples, token_budget=4096).values
    finally:
        hook.remove()
    assert_same_row(expected, found)


def test_the_class_that_users_know(loaded, tokenizer):
    extractor = StaticFeatureExtractor(loaded.model, tokenizer)
    row = extractor.extract_all_static_features(make_records(20), sample_size=5, batch_size=2)
    assert row["static_valid_count"] == 5
    assert row["dataset_num_items"] == 20
    assert extractor.calculate_special_char_ratio("a!") == 0.5
    assert extractor.calculate_answer_groundedness("a b c", "a b c") == 1
    with pytest.raises(UserError):
        extractor.extract_all_static_features([{"foo": 1}])


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


def test_models_that_join_rows_before_their_mlp_are_counted_all_the_same(tokenizer):
    """OPT's last matrix sees (B * T, I)."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=512, **size)
    dataset = as_dataset(make_records(6))
    model = OPTForCausalLM(config).eval()
    together = extract_static(model, tokenizer, dataset, dataset.examples, token_budget=1000).values
    alone = extract_static(model, tokenizer, dataset, dataset.examples, token_budget=1).values
    assert 0 < together["avg_activation_sparsity"] < 1
    assert_same_row(together, alone)


def test_consistency_and_outliers_are_those_of_plain_loops(loaded, tokenizer):
    answers = ["The cat sat. It was blue.", "A river is long. A mountain is high. Cats sleep.", "No sentence more"]
    records = [{"question": f"What of {w}?", "answer": a} for w, a in zip(WORDS, answers * 3, strict=False)]
    dataset = as_dataset(records)
    row = extract_static(loaded.model, tokenizer, dataset, dataset.examples).values
    embeddings, consistent = [], []
    for example in dataset.examples:
        e = encode_example(tokenizer, example, 1024)
        with torch.inference_mode():
            states = loaded.model(input_ids=torch.tensor([e.input_ids]), output_hidden_states=True).hidden_states[-1][0]
        answer = [i for i in range(len(e)) if e.is_answer_text[i]]
        content = [i for i in range(len(e)) if e.is_question[i] or e.is_answer_text[i]]
        embeddings.append(torch.nn.functional.normalize(states[content].mean(0), dim=0).numpy())
        # A token belongs to the sentence that it ends in: none here reaches over a border.
        parts, said, start = [], "", 0
        for k, i in enumerate(answer):
            said += tokenizer.decode([e.input_ids[i]])
            if said.rstrip().endswith(".") and said.count(" ") + 1 >= 2:
                parts.append(states[answer[start : k + 1]].mean(0))
                said, start = "", k + 1
        if len(parts) > 1:
            unit = torch.nn.functional.normalize(torch.stack(parts), dim=1)
            pairs = [float(unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i)]
            consistent.append(np.mean(pairs))
    assert len(consistent) == 6
    assert row["semantic_consistency"] == pytest.approx(np.mean(consistent), abs=1e-4)
    forest = IsolationForest(contamination="auto", random_state=0).fit(np.stack(embeddings))
    assert row["embedding_outlier_ratio"] == np.mean(forest.predict(np.stack(embeddings)) == -1)


def test_without_a_probe_the_first_loss_is_there_all_the_same(loaded):
    records = make_records(10)
    without, row = features_of(loaded, records, probe_steps=0), features_of(loaded, records)
    assert without["initial_loss"] == row["initial_loss"] > 0
    assert without["loss_decay_rate"] is None
    assert "initial_loss" not in without["feature_notes"]


@pytest.mark.slow
def test_real_prose_and_noise_differ_as_they_should(smollm2, shared_data):
    from raylora.datasets import load_dataset

    loaded = smollm2
    path = sorted((shared_data / "chunk_001").iterdir())[0]
    examples = sample_examples(load_dataset(path, limit=400).examples, 24, 0)
    rng = random.Random(0)
    pairs = [{"question": e.question[:300], "answer": e.answer[:300]} for e in examples]
    shuffled = [{**p, "answer": pairs[i - 1]["answer"]} for i, p in enumerate(pairs)]
    noise = [{**p, "answer": "".join(rng.choice("abcdefghij klm") for _ in range(80))} for p in pairs]
    rows = {}
    for name, records in {"clean": pairs, "shuffled": shuffled, "noise": noise}.items():
        dataset = as_dataset(records)
        rows[name] = extract_static(loaded.model, loaded.tokenizer, dataset, dataset.examples).values
    assert rows["shuffled"]["base_model_perplexity"] > rows["clean"]["base_model_perplexity"]
    assert rows["shuffled"]["io_similarity"] < rows["clean"]["io_similarity"]
    assert rows["noise"]["base_model_perplexity"] > 5 * rows["clean"]["base_model_perplexity"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_column_differs_between_real_datasets_and_none_is_a_function_of_another(smollm2, shared_data):
    from raylora.datasets import load_dataset

    before = smollm2.logits_hash()
    rows = []
    for path in sorted((shared_data / "chunk_001").iterdir()):
        dataset = load_dataset(path)
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
