"""Features of the probe against independent references."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora import DynamicProbeAnalyzer, HyperParams
from raylora.config.method import Method
from raylora.config.options import FeatureOptions, ModelOptions
from raylora.data.datasets import sample_examples
from raylora.data.encoding import encode_example
from raylora.errors import UserError
from raylora.features import probe
from raylora.features.observer import ProbeObserver
from raylora.features.pipeline import extract_features
from raylora.features.probe import landscape_flatness
from raylora.features.static import as_dataset, split_sample
from raylora.model import memory
from raylora.model.adapter_weights import plain_weight
from raylora.model.loading import load_model
from raylora.rows import PROBE_NAMES
from raylora.training import gradients as step_gradients
from raylora.training.loop import train_adapter
from raylora.training.losses import example_losses
from tests.helpers.feature_rows import assert_same_row, features_of, make_records, token_losses
from tests.helpers.formats import conversation
from tests.helpers.tiny import load, make_model, make_routed


class KeepsAll(ProbeObserver):
    """Keeps every gradient, as the research code does: the reference for the running sums."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.micro, self.steps = [], []

    def after_micro_batch(self):
        super().after_micro_batch()
        self.micro.append(torch.cat([p.grad.flatten().double() for p in self.parameters]))

    def before_clipping(self):
        super().before_clipping()
        self.steps.append([p.grad.clone() for p in self.parameters])


def train_observed(loaded, observer_class, method, num_steps, records=None):
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in as_dataset(records or make_records(12)).examples]
    parameters = loaded.attach(method, 0)
    try:
        observer = observer_class(parameters) if observer_class else None
        result = train_adapter(loaded, parameters, encoded, method, 0, num_steps, observer)
        return observer, result, [p.detach().clone() for p in parameters]
    finally:
        loaded.detach()


def test_gradient_features_are_those_of_all_gradients_kept(loaded):
    method = Method(batch_size=2, gradient_accumulation=2, learning_rate=1e-2, max_length=256)
    observer, _, _ = train_observed(loaded, KeepsAll, method, 5)
    assert len(observer.micro) == 10
    unit = torch.nn.functional.normalize(torch.stack(observer.micro), dim=1)
    cosines = unit @ unit.T
    n = len(unit)
    expected = float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
    assert observer.gradient_consistency() == pytest.approx(expected, abs=1e-5)
    sparse = []
    for gradients in observer.steps:
        kept = [g for g in gradients if g.abs().max() > 0]
        below = sum(int((g.abs() < 0.01 * g.pow(2).mean().sqrt()).sum()) for g in kept)
        sparse.append(below / sum(g.numel() for g in kept))
    assert np.mean(observer.sparsities) == pytest.approx(np.mean(sparse), rel=1e-6)
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in gs)) for gs in observer.steps]
    assert observer.grad_norms == pytest.approx(norms, rel=1e-5)
    assert max(norms) > method.max_grad_norm, "the norms should be seen before clipping"


def assert_one_pass_changes_no_feature(loaded, monkeypatch, num_accumulated=4, **method):
    """A probe of three steps with groups in a pass, and with a pass for each micro-batch: each is of two examples.

    Returns:
        Forward passes of the two trainings.
    """
    method = Method(
        batch_size=2, gradient_accumulation=num_accumulated, lora_dropout=0.1, learning_rate=1e-3, max_length=256
    ).model_copy(update=method)
    records = as_dataset(make_records(4 * num_accumulated + 3)).examples
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in records]
    before, num_passes, rows = example_losses(loaded, encoded[:3], "answer", 512), [], []
    for most in (step_gradients.MOST_GROUPS, 1):
        monkeypatch.setattr(step_gradients, "MOST_GROUPS", most)
        passes = []
        hook = loaded.model.register_forward_pre_hook(
            lambda model, _, passes=passes: passes.append(1) if model.training else None
        )
        rows.append(probe.run_probe(loaded, encoded[:3], before, encoded[3:], method, 3, 0, 512).values)
        hook.remove()
        num_passes.append(len(passes))
    assert set(rows[0]) == set(PROBE_NAMES)
    for name in PROBE_NAMES:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5, abs=1e-7), name
    return num_passes


@pytest.mark.parametrize(("rank", "budget", "passes_a_step"), [(3, 4096, 1), (8, 4096, 1), (8, 512, 3)])
def test_micro_batches_that_share_a_pass_have_the_features_of_a_pass_each(
    loaded, monkeypatch, rank, budget, passes_a_step
):
    monkeypatch.setattr(memory, "CPU_TOKEN_BUDGET", budget)
    num_passes = assert_one_pass_changes_no_feature(loaded, monkeypatch, lora_r=rank)
    assert num_passes == [3 * passes_a_step, 3 * 4]


def test_more_micro_batches_than_a_pass_has_groups(loaded, monkeypatch):
    monkeypatch.setattr(memory, "CPU_TOKEN_BUDGET", 4096)
    monkeypatch.setattr(step_gradients, "MOST_GROUPS", 3)
    assert assert_one_pass_changes_no_feature(loaded, monkeypatch, num_accumulated=8) == [3 * 3, 3 * 8]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_groups_over_a_quantized_base(outlier_model_folder, monkeypatch, quantization):
    grouped, single = assert_one_pass_changes_no_feature(load(outlier_model_folder, quantization), monkeypatch)
    assert grouped < single


@pytest.mark.parametrize("rank", [3, 8])
def test_experts_do_not_say_whose_tokens_they_get_and_have_a_pass_for_each_micro_batch(monkeypatch, rank):
    targets = ("q_proj", "experts.0", "experts.1")
    grouped, single = assert_one_pass_changes_no_feature(
        make_routed(), monkeypatch, lora_r=rank, target_modules=targets
    )
    assert single <= grouped <= single + 1, "the first pass breaks off"


@pytest.mark.parametrize("rank", [3, 8])
def test_embeddings_compute_their_gradient_themselves_and_have_a_pass_for_each_micro_batch(loaded, monkeypatch, rank):
    targets = ("q_proj", "embed_tokens")
    grouped, single = assert_one_pass_changes_no_feature(loaded, monkeypatch, lora_r=rank, target_modules=targets)
    assert grouped == single


def test_watching_a_training_does_not_change_it(loaded):
    method = Method(batch_size=4, gradient_accumulation=1, learning_rate=1e-2, max_length=256, lora_dropout=0.0)
    _, plain, weights = train_observed(loaded, None, method, 4)
    _, watched, watched_weights = train_observed(loaded, ProbeObserver, method, 4)
    assert [s.loss for s in watched.steps] == pytest.approx([s.loss for s in plain.steps], abs=1e-5)
    for a, b in zip(weights, watched_weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_updates_are_those_of_whole_matrices(loaded):
    parameters = loaded.attach(Method(lora_r=3, lora_alpha=7), 0)
    try:
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.randn_like(p))
        expected = []
        for _, module in loaded.peft_model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                update = module.lora_B["default"].weight @ module.lora_A["default"].weight * 7 / 3
                expected.append(float(update.norm() / module.get_base_layer().weight.norm()))
        assert len(expected) == 14
        assert loaded.relative_weight_update() == pytest.approx(np.mean(expected), rel=1e-5)
    finally:
        loaded.detach()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_measuring_updates_leaves_a_quantized_base_as_it_was(tiny_model_folder, quantization):
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization), torch.device("cpu"))
    for evaluated_before in (False, True):
        before = loaded.logits_hash() if evaluated_before else None
        with torch.no_grad():
            for p in loaded.attach(Method(), 0):
                p.copy_(torch.randn_like(p))
        share = loaded.relative_weight_update()
        assert share > 0
        loaded.detach()
        assert before in {None, loaded.logits_hash()}
    plain = load_model(ModelOptions(model=str(tiny_model_folder), quantization="none"), torch.device("cpu"))
    weights = dict(plain.model.named_modules())
    for name, module in loaded.model.named_modules():
        if type(module).__name__ in {"Linear4bit", "Linear8bitLt"} and "lora" not in type(module).__module__:
            expected = weights[name.removesuffix(".base_layer")].weight
            assert (plain_weight(module) - expected).norm() < 0.15 * expected.norm()


def test_sharpness_by_hand(loaded, tokenizer):
    examples = [encode_example(tokenizer, e, 256) for e in as_dataset(make_records(3)).examples]
    method = Method(lora_dropout=0.0)
    parameters = loaded.attach(method, 0)
    try:
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.randn_like(p) * 0.05)
        before = [p.detach().clone() for p in parameters]

        def loss():
            total = count = 0
            for e in examples:
                logits = loaded.model(input_ids=torch.tensor([e.input_ids])).logits[0]
                said = [i for i in range(1, len(e)) if e.is_answer[i]]
                targets = torch.tensor([e.input_ids[i] for i in said])
                total += torch.nn.functional.cross_entropy(logits[[i - 1 for i in said]], targets, reduction="sum")
                count += len(said)
            return total / count

        at_w = loss()
        gradient = torch.autograd.grad(at_w, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        with torch.no_grad():
            for p, g in zip(parameters, gradient, strict=True):
                p.add_(0.05 * g / norm)
            worse = loss()
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
        example_losses(loaded, examples, "answer", 100, with_gradient=True)
        found = landscape_flatness(loaded, parameters, examples, float(at_w), method, 100)
        assert found == pytest.approx(1 / (1 + float(worse - at_w)), rel=1e-4)
        assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)), "the adapter was moved"
    finally:
        loaded.detach()


def test_forgetting_is_the_rise_of_the_loss_on_plain_texts(loaded, tokenizer):
    """With the loss of transformers itself, one text at a time."""
    texts = json.loads((Path(probe.__file__).parents[1] / "demo" / "general_knowledge.json").read_text())
    total = count = 0
    for text_ in texts:
        ids = torch.tensor([tokenizer(text_)["input_ids"]])
        with torch.inference_mode():
            total += float(loaded.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    losses = probe.general_losses_of(loaded, 512)
    assert probe.mean_loss(losses) == pytest.approx(total / count, rel=1e-5)
    row = features_of(loaded, make_records(10), probe_steps=30, learning_rate=3e-2)
    assert abs(row["catastrophic_forgetting"]) > 1e-3


def test_what_a_probe_changes_is_what_its_steps_change(loaded, tokenizer):
    """The same steps by hand, and every loss by a plain loop."""
    dataset, method = as_dataset(make_records(12)), Method(learning_rate=2e-2, lora_r=4, max_length=256)
    options = FeatureOptions(sample_size=0, probe_steps=6)
    row = extract_features(loaded, dataset, method, options, 512, seed=0)
    sample = sample_examples(dataset.examples, 0, dataset.seed)
    encoded = [encode_example(tokenizer, e, 256) for e in sample]
    held_out, training = ([encoded[i] for i in part] for part in split_sample(sample))

    def losses():
        supervised, perplexities = [], []
        for e in held_out:
            each = token_losses(loaded.model, e.input_ids)
            supervised += [each[i] for i in range(1, len(e)) if e.is_answer[i]]
            perplexities.append(math.exp(np.mean([each[i] for i in range(1, len(e)) if e.is_answer_text[i]])))
        return np.mean(supervised), np.mean(perplexities)

    loss, perplexity = losses()
    parameters = loaded.attach(method, dataset.seed % 2**62)
    try:
        start = torch.cat([p.detach().clone().flatten() for p in parameters])
        train_adapter(loaded, parameters, training, method, dataset.seed % 2**62, 6)
        new_loss, new_perplexity = losses()
        moved = torch.cat([p.detach().flatten() for p in parameters]) - start
    finally:
        loaded.detach()
    assert new_loss < loss, "nothing was learnt: the test shows nothing"
    assert row["initial_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["loss_decay_rate"] == pytest.approx((loss - new_loss) / loss, rel=1e-3)
    assert row["perplexity_change_rate"] == pytest.approx(new_perplexity / perplexity - 1, rel=1e-3)
    assert row["avg_param_change"] == pytest.approx(float(moved.norm()), rel=1e-3)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_learning_rate_zero_changes_nothing_of_a_quantized_base(tiny_model_folder, quantization):
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization), torch.device("cpu"))
    row = features_of(loaded, make_records(10), learning_rate=0.0)
    for name in ("loss_decay_rate", "perplexity_change_rate", "catastrophic_forgetting", "avg_param_change"):
        assert row[name] == pytest.approx(0, abs=1e-6), name
    assert row["relative_weight_update"] == 0


def test_adapters_of_embeddings_have_an_update_too(loaded):
    row = features_of(loaded, make_records(10), target_modules=("embed_tokens", "q_proj"))
    assert row["relative_weight_update"] > 0


def test_a_model_without_the_adapters_modules_keeps_its_other_features(loaded):
    row = features_of(loaded, make_records(10), target_modules=("no_such_module",))
    assert row["initial_loss"] > 0
    assert row["base_model_perplexity"] > 1
    assert row["avg_param_change"] is None
    assert "avg_param_change: --target-modules" in row["feature_notes"]


def test_memory_that_runs_out_on_the_way_back_counts_nothing_twice(loaded, tokenizer):
    encoded = [encode_example(tokenizer, e, 256) for e in as_dataset(make_records(9)).examples]
    parameters = loaded.attach(Method(lora_dropout=0.0), 0)
    try:
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.randn_like(p) * 0.05)
        expected = example_losses(loaded, encoded, "answer", 4096, with_gradient=True)
        wanted = [p.grad.clone() for p in parameters]
        failed = []

        def break_off(gradient):
            num_tokens = gradient.shape[0] * gradient.shape[1]
            if num_tokens > 100 and len(failed) < 2:  # half the parameters have their gradient by now
                failed.append(num_tokens)
                raise torch.OutOfMemoryError("CUDA out of memory")

        layer = loaded.model.model.layers[1]
        hook = layer.register_full_backward_hook(lambda _, __, outgoing: break_off(outgoing[0]))
        try:
            found = example_losses(loaded, encoded, "answer", 4096, with_gradient=True)
        finally:
            hook.remove()
        assert failed
        assert [loss.total for loss in found] == pytest.approx([loss.total for loss in expected], rel=1e-5)
        for p, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)
    finally:
        loaded.detach()


def test_streaming_ends_where_an_iterator_ends(tokenizer):
    ids = tokenizer("the cat sat on the blue river", return_tensors="pt")["input_ids"]
    batches = [{"input_ids": ids, "labels": ids.clone()}] * 3
    model = make_model()
    analyzer = DynamicProbeAnalyzer(model, tokenizer)

    def run(batches, steps):
        return analyzer.run_streaming_training(model, torch.optim.SGD(model.parameters(), lr=0.01), batches, steps)

    assert len(run(iter(batches), 10)["losses"]) == 3
    assert len(run(itertools.cycle(batches), 5)["losses"]) == 5
    assert run(batches, 0)["avg_grad_norm"] is None
    with pytest.raises(UserError, match="no batch"):
        run([], 3)


def test_equal_examples_have_consistent_gradients(loaded):
    same = features_of(loaded, make_records(1) * 12, lora_dropout=0.0, batch_size=2)
    mixed = features_of(loaded, make_records(12), lora_dropout=0.0, batch_size=1)
    # Not 1: between two steps the adapter itself moves.
    assert same["gradient_consistency"] > 0.95
    assert mixed["gradient_consistency"] < same["gradient_consistency"]


def make_conversations(num, num_turns=3):
    """Each of a system turn and ``num_turns`` questions and answers."""
    parts = make_records(num * num_turns)
    return [conversation([r[k] for r in parts[i::num] for k in ("question", "answer")]) for i in range(num)]


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_no_answer_that_is_held_out_stands_in_what_the_probe_trains_on(loaded, tokenizer, train_on):
    records = make_conversations(10)
    dataset = as_dataset(records)
    sample = sample_examples(dataset.examples, 0, dataset.seed)
    held_out, training = split_sample(sample)
    assert (len(held_out), len(training)) == (6, 24)
    prompts = [m.content for i in training for m in sample[i].messages]
    assert not {sample[i].answer for i in held_out} & set(prompts)

    encoded = [encode_example(tokenizer, e, 256) for e in sample]
    losses = [example_losses(loaded, [encoded[i]], train_on, 512)[0] for i in held_out]
    expected = sum(loss.total for loss in losses) / sum(loss.num_supervised for loss in losses)
    row = features_of(loaded, records, train_on=train_on)
    assert row["initial_loss"] == pytest.approx(expected, rel=1e-4)
    assert row["avg_param_change"] > 0
    assert_same_row(row, features_of(loaded, records[::-1], train_on=train_on))


@pytest.mark.slow
@pytest.mark.ci
def test_conversations_that_begin_alike_are_the_same_in_any_order(loaded):
    beginning = make_conversations(1)[0]["messages"][:4]
    records = [{"messages": beginning + r["messages"][:2]} for r in make_conversations(6)]
    assert_same_row(features_of(loaded, records), features_of(loaded, records[::-1]))


def test_a_single_conversation_has_no_probe_and_says_why(loaded):
    row = features_of(loaded, make_conversations(1, num_turns=12))
    assert row["initial_loss"] is row["gradient_consistency"] is None
    assert "initial_loss: the probe needs two conversations" in row["feature_notes"]
    assert row["base_model_perplexity"] > 1
    assert features_of(loaded, make_conversations(2, num_turns=6))["initial_loss"] > 0


def test_the_class_that_users_know_splits_in_the_same_way(loaded, tokenizer):
    records = make_conversations(6)
    row = features_of(loaded, records, learning_rate=2e-4, gradient_accumulation=4, max_length=1024)
    model = make_model()
    theirs = DynamicProbeAnalyzer(model, tokenizer).extract_all_dynamic_features(
        records, HyperParams(), probe_steps=2, sample_size=0, batch_size=2
    )
    assert theirs["initial_loss"] == pytest.approx(row["initial_loss"], rel=1e-4)
    assert theirs["loss_decay_rate"] == pytest.approx(row["loss_decay_rate"], rel=1e-2, abs=1e-6)


def test_features_that_move_with_the_number_of_examples_say_so(loaded):
    """Where the probe goes over a small sample several times."""
    several, once = (features_of(loaded, make_records(12), probe_steps=steps, batch_size=2) for steps in (8, 4))
    assert several["gradient_consistency"] is not None
    assert "gradient_consistency: below 100 examples it depends on their number (12 here)" in several["feature_notes"]
    assert "gradient_consistency" not in once["feature_notes"]


@given(st.integers(2, 300), st.integers(0, 300))
def test_no_note_where_every_sample_is_as_small(num_examples, sample_size):
    notes = probe.drift_notes(num_examples, sample_size)
    assert set(notes) <= set(PROBE_NAMES)
    assert not any("; " in note for note in notes.values()), "that is what stands between notes"
    assert bool(notes) == (num_examples < min(100, sample_size or 100))
