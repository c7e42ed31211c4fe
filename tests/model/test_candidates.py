"""Candidates' log-likelihoods are those of each text alone: packed, behind prefixes, of several adapters, replayed."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import transformers

from raylora.errors import UserError
from raylora.model.adapters import LoadedModel
from raylora.model.candidates import Branches, CandidatePasses, Row
from raylora.model.forward import inference
from tests.helpers.adapters import attach_random
from tests.helpers.graphs import RecordedGraphs
from tests.helpers.tiny import load, make_loaded, make_model, make_tokenizer

PREFIX = [3 + 7 * i % 90 for i in range(23)]
TEXTS = [[5 + (7 * i + k) % 90 for k in range(n)] for i, n in enumerate((12, 3, 40, 25))]
CANDIDATES = [[10 + i, 30 + i, 50, 70] for i in range(len(TEXTS))]


def alone(loaded, prefix, adapter: str | None) -> np.ndarray:
    """One text after another through PEFT's own forward pass, no cache."""
    if adapter is not None:
        loaded.activate(adapter)
    found = []
    with inference(loaded.model), loaded.base() if adapter is None else contextlib.nullcontext():
        for text, candidates in zip(TEXTS, CANDIDATES, strict=True):
            logits = loaded.model(input_ids=torch.tensor([[*prefix, *text]]), use_cache=False).logits[0, -1]
            found.append([float(logits.log_softmax(-1)[c]) for c in candidates])
    return np.array(found)


def run(passes: CandidatePasses, adapters, prefix, order=(0, 1, 2, 3)) -> list[np.ndarray]:
    """Of each adapter what a pass of all texts of all adapters finds."""
    pairs = [(adapter, i) for i in order for adapter in adapters]
    rows = [Row(TEXTS[i], CANDIDATES[i], passes.slot_of(adapter)) for adapter, i in pairs]
    found = dict(zip(pairs, passes.run(rows, prefix).read(), strict=True))
    return [np.array([found[adapter, i] for i in range(len(TEXTS))]) for adapter in adapters]


@pytest.mark.parametrize("prefix", [[], PREFIX])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("adapters", [[None], ["a"], ["a", "b"], ["b", None, "a"]], ids=str)
def test_each_row_gets_what_its_text_gets_alone(adapters, captured, prefix):
    """Ranks differ; passes come again with other rows, so that captured ones are replayed."""
    loaded = make_loaded()
    attach_random(loaded, 1, "a", lora_r=4, lora_alpha=16)
    attach_random(loaded, 2, "b", lora_r=8, lora_alpha=8, target_modules=("q_proj", "down_proj"))
    expected = [alone(loaded, prefix, adapter) for adapter in adapters]
    graphs = RecordedGraphs() if captured else None
    passes = CandidatePasses(loaded, 0 if adapters == [None] else len(adapters), graphs)
    base = loaded.base() if adapters == [None] else contextlib.nullcontext()
    names = [name for name in adapters if name is not None]
    with inference(loaded.model), base, passes.ready(names, packed=True, longest_prefix=len(prefix)):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 1, 3), (1, 0, 3, 2)):
            for found, right in zip(run(passes, adapters, prefix, order), expected, strict=True):
                np.testing.assert_allclose(found, right, atol=2e-5)
    assert passes.graphed.num_replayed == (2 if captured else 0)
    # Nothing that was replaced is left.
    for adapter, right in zip(adapters, expected, strict=True):
        np.testing.assert_allclose(alone(loaded, prefix, adapter), right, atol=1e-6)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_over_a_quantized_base(outlier_model_folder, quantization):
    loaded = load(outlier_model_folder, quantization)
    attach_random(loaded, 1, "a")
    attach_random(loaded, 2, "b")
    passes = CandidatePasses(loaded, 3, None)
    with inference(loaded.model), passes.ready(["a", "b"], packed=True):
        found = run(passes, ["a", None, "b"], PREFIX)
    for adapter, values in zip(["a", None, "b"], found, strict=True):
        np.testing.assert_allclose(values, alone(loaded, PREFIX, adapter), atol=2e-5)


def test_the_next_prefix_and_the_next_adapter_are_replayed():
    loaded = make_loaded()
    graphs = RecordedGraphs()
    passes = CandidatePasses(loaded, 1, graphs)
    for number, name in enumerate(("a", "b", "c")):
        attach_random(loaded, number, name)
        with inference(loaded.model), passes.ready([name], packed=True, longest_prefix=30):
            for prefix in (PREFIX, PREFIX[:9], [], PREFIX[3:]):
                (found,) = run(passes, [name], prefix)
                np.testing.assert_allclose(found, alone_beside(loaded, passes, prefix, name), atol=2e-5)
        loaded.detach(name)
    assert graphs.num_captures == 2, "one behind prefixes, one without"
    assert passes.graphed.num_replayed == 12 - 2 * 2


def alone_beside(loaded, passes, prefix, name) -> np.ndarray:
    """As ``alone``, of a copy of the model: ``loaded`` serves passes."""
    other = make_loaded()
    attach_random(other, "abc".index(name), name)
    return alone(other, prefix, name)


def test_a_longer_prefix_than_there_is_room_for_is_captured_anew():
    loaded = make_loaded()
    passes = CandidatePasses(loaded, 0, RecordedGraphs())
    expected = {n: alone(loaded, [*PREFIX * 30][:n], None) for n in (20, 600)}
    for longest in (20, 600, 20):
        with inference(loaded.model), passes.ready([], packed=True, longest_prefix=longest):
            for _ in range(3):
                (found,) = run(passes, [None], [*PREFIX * 30][:longest])
                np.testing.assert_allclose(found, expected[longest], atol=2e-5)


def test_rows_of_a_model_that_cannot_be_packed_are_padded():
    loaded = make_loaded()
    attach_random(loaded, 1, "a")
    passes = CandidatePasses(loaded, 0, None)
    with inference(loaded.model), passes.ready([], packed=False):
        (found,) = run(passes, [None], [])
    np.testing.assert_allclose(found, alone(loaded, [], "a"), atol=2e-5)


def test_a_head_without_a_name_is_run_as_it_is(monkeypatch):
    loaded = make_loaded()
    expected = alone(loaded, PREFIX, None)
    monkeypatch.setattr(loaded.model, "get_output_embeddings", lambda: None)
    passes = CandidatePasses(loaded, 0, None)
    with inference(loaded.model), passes.ready([], packed=True):
        np.testing.assert_allclose(run(passes, [None], PREFIX)[0], expected, atol=2e-5)


def test_adapters_that_are_no_matrices_cannot_share_a_pass():
    loaded = make_loaded()
    attach_random(loaded, 1, "a", target_modules=("embed_tokens",))
    attach_random(loaded, 2, "b")
    passes = CandidatePasses(loaded, 2, None)
    with pytest.raises(UserError, match="cannot share a pass"), passes.ready(["a", "b"], packed=True):
        pass


def test_each_module_may_scale_its_adapter_in_its_own_way(tmp_path):
    """As PEFT's rank and alpha patterns have it, and a bias behind B, which is PEFT's own to add."""
    from peft import LoraConfig, get_peft_model

    model = make_model()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 32}, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path / "patterns")
    model = make_model()
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], lora_bias=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    biased = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in biased.named_parameters():
            if name.endswith("lora_B.default.bias"):
                p.fill_(0.5)
    biased.save_pretrained(tmp_path / "biased")
    for folder in ("patterns", "biased"):
        loaded = make_loaded()
        loaded.attach_saved(tmp_path / folder, "a")
        expected = alone(loaded, PREFIX, "a")
        assert np.abs(expected - alone(loaded, PREFIX, None)).max() > 0.1
        passes = CandidatePasses(loaded, 1, RecordedGraphs())
        with inference(loaded.model), passes.ready(["a"], packed=True, longest_prefix=len(PREFIX)):
            for _ in range(3):
                np.testing.assert_allclose(run(passes, ["a"], PREFIX)[0], expected, atol=2e-5)


# Texts behind rows

BRANCHES = [[[5, 9, 11], [8], [70, 3]], [[10], [11], [12]], [[4, 4, 4, 4, 4, 4], [5, 6]], [[9], [20, 21, 22]]]


@pytest.mark.parametrize("prefix", [[], PREFIX])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_each_text_behind_a_row_gets_what_it_gets_alone(adapter, prefix):
    """Different numbers of texts, of one token and of several."""
    loaded = make_loaded()
    attach_random(loaded, 1, "a")
    base = loaded.base() if adapter is None else contextlib.nullcontext()
    rows = [Branches(text, branches) for text, branches in zip(TEXTS, BRANCHES, strict=True)]
    with inference(loaded.model), base:
        expected = []
        for row in rows:
            for text in row.texts:
                ids = [*prefix, *row.ids, *text]
                logprobs = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
                first = len(ids) - len(text)
                expected.append(sum(float(logprobs[first + i - 1, token]) for i, token in enumerate(text)))
        passes = CandidatePasses(loaded, 0 if adapter is None else 1, None)
        with passes.ready([] if adapter is None else [adapter], packed=True):
            for order in ([0, 1, 2, 3], [1], [3, 2]):
                found = iter(passes.run_branches([rows[i] for i in order], prefix).read().tolist())
                of_rows = {i: [next(found) for _ in rows[i].texts] for i in order}
                starts = [0, 3, 6, 8, 10]
                for i, values in of_rows.items():
                    np.testing.assert_allclose(values, expected[starts[i] : starts[i + 1]], atol=3e-5)


def loaded_of(config, **settings) -> LoadedModel:
    """A tiny model of another family, of random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = transformers.AutoModelForCausalLM.from_config(config(**{**sizes, **settings})).eval()
    return LoadedModel(model, make_tokenizer(), "tiny", "none")


def replayed(loaded, prefix=(), num_passes: int = 4, longest_prefix: int | None = None) -> CandidatePasses:
    """Passes that were run so often that captured ones are replayed, each as its texts alone."""
    expected = alone(loaded, prefix, None)
    passes = CandidatePasses(loaded, 0, RecordedGraphs())
    room = len(prefix) if longest_prefix is None else longest_prefix
    with inference(loaded.model), passes.ready([], packed=True, longest_prefix=room):
        for _ in range(num_passes):
            np.testing.assert_allclose(run(passes, [None], prefix)[0], expected, atol=2e-5)
    return passes


@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_what_fills_a_pass_up_has_no_positions_that_the_model_lacks(prefix):
    """GPT-2's positions are a table of as many rows as its context is long: here 64, and a pass has 512 tokens."""
    passes = replayed(loaded_of(transformers.GPT2Config, n_positions=64), prefix)
    assert passes.graphed.num_replayed == 2


def test_texts_within_a_sliding_window_are_captured_behind_a_prefix():
    """Though the room that is kept for prefixes, 512 tokens, is wider than the window; and no longer ones are."""
    passes = replayed(loaded_of(transformers.MistralConfig, sliding_window=70), PREFIX)
    assert passes.graphed.num_replayed == 2
    passes = replayed(loaded_of(transformers.MistralConfig, sliding_window=40), PREFIX)
    assert passes.graphed.num_replayed == 0


def test_keys_that_have_no_fixed_place_are_not_captured():
    assert replayed(make_loaded(), PREFIX, longest_prefix=0).graphed.num_replayed == 0


def test_a_longer_prefix_has_room_where_captures_were_given_up():
    def cannot_capture(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    loaded = make_loaded()
    passes = CandidatePasses(loaded, 0, cannot_capture)
    for prefix in (PREFIX, PREFIX * 30):
        with inference(loaded.model), passes.ready([], packed=True, longest_prefix=len(prefix)):
            found = [run(passes, [None], prefix)[0] for _ in range(3)]
        for each in found:
            np.testing.assert_allclose(each, alone(loaded, prefix, None), atol=2e-5)
    assert not passes.graphed.are_wanted


def test_the_base_shares_no_pass_with_an_adapter_that_is_no_matrix():
    """Its module would add it to the base's rows."""
    loaded = make_loaded()
    attach_random(loaded, 1, "a", target_modules=("embed_tokens", "q_proj"))
    passes = CandidatePasses(loaded, 2, None)
    with pytest.raises(UserError, match="cannot share a pass"), passes.ready(["a"], packed=True):
        pass
