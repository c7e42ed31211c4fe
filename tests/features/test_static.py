"""Features of one look at the sample, against plain loops over it."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import IsolationForest
from transformers import PreTrainedTokenizerFast

from raylora import StaticFeatureExtractor
from raylora.data.datasets import sample_examples
from raylora.data.encoding import encode_example
from raylora.data.parse_record import parse_record
from raylora.errors import UserError
from raylora.features import static
from raylora.features.static import as_dataset, extract_static
from tests.helpers.feature_rows import WORDS, assert_same_row, make_records, token_losses
from tests.helpers.formats import conversation
from tests.helpers.tiny import make_tokenizer


def test_characters_are_those_of_the_records(tmp_path, loaded):
    import json

    from raylora.data.datasets import read_dataset

    records = [
        {
            "messages": [{"role": r, "content": "x" * n} for r, n in (("user", 3), ("assistant", 5)) * 2],
            "source": "abcd",
        }
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    from_file, from_memory = read_dataset(tmp_path / "a.json"), as_dataset(records)
    assert from_memory.total_chars == from_file.total_chars
    assert from_memory.num_items == from_file.num_items == 1


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


def test_consistency_is_that_of_a_plain_loop(loaded, tokenizer):
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
    assert row["embedding_outlier_ratio"] is None, "of so few a forest finds outliers whatever they are"


@pytest.mark.slow
def test_outliers_are_those_of_several_forests_and_the_odd_ones_are_among_them():
    rng = np.random.default_rng(0)
    clean = rng.normal(1, 0.1, (60, 16))
    ratios = [
        np.mean(IsolationForest(contamination="auto", random_state=seed).fit(clean).predict(clean) == -1)
        for seed in range(static.NUM_FORESTS)
    ]
    assert static.outlier_ratio(clean) == pytest.approx(np.mean(ratios))
    assert len(set(ratios)) > 1, "one forest would have done"
    odd = np.concatenate([clean[:54], rng.normal(-1, 0.1, (6, 16))])
    assert static.outlier_ratio(odd) > 0.09 > static.outlier_ratio(clean)


def test_outliers_are_measured_from_fifty_examples_on(loaded, monkeypatch):
    monkeypatch.setattr(static, "NUM_FORESTS", 1)
    for num in (49, 50):
        dataset = as_dataset(make_records(num))
        result = extract_static(loaded.model, loaded.tokenizer, dataset, dataset.examples)
        assert (result.values["embedding_outlier_ratio"] is None) == (num < 50)
        assert result.notes.get("embedding_outlier_ratio") == ("needs 50 examples" if num < 50 else None)


# What the probe holds out


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_no_conversation_is_on_both_sides(sizes, rng):
    examples = [e for i, size in enumerate(sizes) for e in turns(f"{i}.", size)]
    rng.shuffle(examples)
    sample = examples[: rng.randint(1, len(examples))]
    split = static.split_sample(sample)
    keys = [e.conversation or e.digest for e in sample]
    held_out, training = ({keys[i] for i in part} for part in split)
    assert not held_out & training
    if len(set(keys)) < 2:
        assert split == ([], [])
        return
    assert sorted([*split.held_out, *split.training]) == list(range(len(sample)))
    assert held_out
    assert training
    wanted, smallest = static.count_held_out(len(sample)), min(map(keys.count, keys))
    assert len(split.held_out) <= max(wanted, smallest)
    # Fuller only with a conversation that is broken up.
    if smallest <= wanted:
        assert all(keys.count(key) > wanted - len(split.held_out) for key in training)


def test_of_single_turns_the_first_are_held_out():
    sample = as_dataset(make_records(20)).examples
    assert static.split_sample(sample) == ([0, 1, 2, 3], list(range(4, 20)))
    assert static.split_sample(sample[:1]) == ([], [])


def turns(name, num):
    contents = [f"{who}{name}{k}" for k in range(num) for who in ("question ", "answer ")]
    return parse_record(conversation(contents)).examples


@pytest.mark.slow
def test_real_prose_and_noise_differ_as_they_should(smollm2, shared_data):
    from raylora.data.datasets import read_dataset

    loaded = smollm2
    path = sorted((shared_data / "chunk_001").iterdir())[0]
    examples = sample_examples(read_dataset(path, limit=400).examples, 24, 0)
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


def test_a_tokenizer_without_begin_and_end_leaves_one_feature_out(tiny_model):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(make_tokenizer().backend_tokenizer))
    dataset = as_dataset(make_records(3))
    result = extract_static(tiny_model, tokenizer, dataset, dataset.examples)
    assert result.values["instruction_following_difficulty"] is None
    assert result.notes["instruction_following_difficulty"] == "the tokenizer has no token that begins or ends a text"
    assert result.values["base_model_perplexity"] > 1
    assert result.values["static_valid_count"] == 3
