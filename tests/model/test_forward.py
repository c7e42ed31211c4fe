"""Rows packed side by side, and losses in chunks, are those of each row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX, labels_of
from raylora.data.minibatch import pack_rows, pad_left
from raylora.model import attention
from raylora.model.adapters import LoadedModel
from raylora.model.attention import attention_in_blocks
from raylora.model.forward import Output, forward_rows, head_is_plain, inference, token_losses
from raylora.model.memory import TokenBudget
from raylora.model.packing import can_pack, can_pack_beyond_window, may_pack, window_of
from tests.helpers.tiny import make_model
from tests.helpers.training import METHOD


def test_losses_of_a_padded_batch_are_those_of_each_row_alone(loaded, encoded):
    rows, labels = [e.input_ids for e in encoded[:5]], [labels_of(e, "all") for e in encoded[:5]]
    with torch.inference_mode():
        losses = token_losses(loaded, pad_left(rows, 0, "cpu", labels)).split([len(row) - 1 for row in rows])
        for row, ids in enumerate(rows):
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1]
            alone = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            assert float(losses[row].sum()) == pytest.approx(float(alone), rel=1e-5)


def test_weights_on_single_tokens_reach_their_own_gradients(loaded, encoded):
    """The mean over a row is not the only thing that may be asked of losses."""
    (p, *_), e = loaded.attach(METHOD, 0), encoded[3]
    with torch.no_grad():
        for q in loaded.attach(METHOD, 1, "other"):
            q.copy_(torch.randn_like(q) * 0.1)
            p = q
    batch = pad_left([e.input_ids], 0, "cpu", [labels_of(e, "answer")])
    found = token_losses(loaded, batch)
    weights = torch.arange(len(found)) + 1.0
    (found * weights).sum().backward()
    gradient = p.grad.clone()
    p.grad = None
    logits = loaded.model(input_ids=batch.input_ids).logits[0, :-1]
    labels = torch.tensor(labels_of(e, "answer"))
    wanted = labels[1:] != IGNORE_INDEX
    assert batch.targets.tolist() == labels[1:][wanted].tolist()
    plain = torch.nn.functional.cross_entropy(logits[wanted], labels[1:][wanted], reduction="none")
    (plain * weights).sum().backward()
    torch.testing.assert_close(gradient, p.grad, atol=1e-5, rtol=1e-4)


class Scaled(torch.nn.Module):
    """A model whose logits are bent after the head, as Gemma's and Cohere's are."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config
        self.device = model.device

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **kwargs):
        output = self.inner(**kwargs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output


def test_logits_that_are_bent_after_the_head_are_seen():
    model = make_model()
    assert head_is_plain(model)
    assert not head_is_plain(Scaled(model))


def family(name):
    """Tiny models of other families, at random."""
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size["num_attention_heads"] = 4
    return {
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**size, num_key_value_heads=2)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**size, num_key_value_heads=2, head_dim=8)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**size, num_key_value_heads=2, sliding_window=64)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**size, pad_token_id=0)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**size, num_key_value_heads=2, head_dim=8)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=500, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32,
            )
        ),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=500, hidden_size=32, n_layer=2, n_head=4)),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=500, hidden_size=32, num_hidden_layers=2)),
    }[name]().eval()  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt2", "opt", "bloom", "mamba"])
def test_a_model_that_may_be_packed_says_the_same_of_each_example(name):
    model = family(name)
    rows = [[(17 * i + k) % 500 for i in range(n)] for n, k in ((12, 1), (30, 7), (5, 2))]
    if name in {"qwen2", "qwen3", "mistral", "phi3", "gemma"}:
        assert can_pack(model), "the families that are trained most should not lose their speed"
    if not can_pack(model):
        return
    before = model.config._attn_implementation
    with torch.inference_mode(), attention_in_blocks(model):
        packed = model(**pack_rows(rows, "cpu").model_inputs(), use_cache=False).logits[0].split([12, 30, 5])
    assert model.config._attn_implementation == before
    for row, logits in zip(rows, packed, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(input_ids=torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-3)


def test_positions_that_run_on_forbid_packing():
    class RunsOn(torch.nn.Module):
        """Counts positions itself."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.device = model, model.config, model.device

        def forward(self, input_ids, position_ids, **kwargs):
            shift = 0 if "attention_mask" in kwargs else torch.arange(input_ids.shape[1]) ** 2
            return self.model(input_ids=input_ids, position_ids=position_ids + shift, **kwargs)

    assert can_pack(make_model())
    assert not can_pack(RunsOn(make_model()))


def test_a_mask_over_the_whole_row_forbids_packing(monkeypatch):
    """A block that sees the one before it: torch's attention over everything, in place of block by block."""

    def attend_to_everything(module, query, key, value, attention_mask, *, blocks=None, **kwargs):
        return attention.sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.BLOCKS, attend_to_everything)
    assert not can_pack(make_model())


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_examples_longer_than_the_window_are_packed_where_the_model_says_its_window_to_attention(tokenizer, name):
    model = family(name)
    model.config.sliding_window = 64
    rows = [[(17 * i + k) % 500 for i in range(n)] for n, k in ((70, 1), (150, 7), (5, 2))]
    assert window_of(model) == 64
    assert can_pack_beyond_window(model)
    with torch.inference_mode(), attention_in_blocks(model):
        packed = model(**pack_rows(rows, "cpu").model_inputs(), use_cache=False).logits[0].split([70, 150, 5])
    for row, logits in zip(rows, packed, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(input_ids=torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-3)


def test_a_window_that_attention_is_not_told_of_is_the_longest_example_that_is_packed(tokenizer, encoded, monkeypatch):
    model = family("mistral").requires_grad_(False)
    model.resize_token_embeddings(len(tokenizer))
    loaded = LoadedModel(model, tokenizer, "mistral", "none")
    assert window_of(model) == 64

    def without_window(*args, sliding_window=None, **kwargs):
        return attention.attend_in_blocks(*args, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.BLOCKS, without_window)
    assert can_pack(model)
    assert not can_pack_beyond_window(model)
    assert [may_pack(loaded, longest) for longest in (64, 65)] == [True, False]


ROWS = [[5 + (7 * i + k) % 90 for k in range(n)] for i, n in enumerate((12, 3, 40, 7, 25))]
LABELS = [[IGNORE_INDEX, *(t if (t + i) % 3 else IGNORE_INDEX for t in row[1:])] for i, row in enumerate(ROWS)]
CHOSEN = [[(t + i) % 2 == 0 for t in row] for i, row in enumerate(ROWS)]


def run_rows(loaded, token_budget, **more):
    results = {}

    def use(part: list[int], output: Output):
        states = [None] * len(part) if output.states is None else output.states.split(output.num_states)
        return list(zip(output.losses.split(output.num_losses), states, strict=True))

    with inference(loaded.model):
        for part, found in forward_rows(loaded, ROWS, LABELS, TokenBudget(token_budget), use, **more):
            results.update(zip(part, found, strict=True))
    return [results[i] for i in range(len(ROWS))]


def assert_as_alone(loaded, results):
    for row, labels, chosen, (losses, states) in zip(ROWS, LABELS, CHOSEN, results, strict=True):
        with torch.inference_mode():
            output = loaded.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        wanted = torch.tensor(labels[1:]) != IGNORE_INDEX
        expected = F.cross_entropy(output.logits[0, :-1][wanted], torch.tensor(row[1:])[wanted], reduction="none")
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states, output.hidden_states[-1][0][torch.tensor(chosen)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("token_budget", [1, 50, 10_000])
def test_losses_and_states_are_those_of_each_row_alone(loaded, token_budget, packed):
    assert_as_alone(loaded, run_rows(loaded, token_budget, chosen=CHOSEN, packed=packed))


def test_nothing_but_losses_is_computed_where_no_state_is_chosen(loaded):
    assert all(states is None for _, states in run_rows(loaded, 50))


@pytest.mark.parametrize("head", ["named", "not named"])
def test_a_model_whose_logits_are_bent_or_whose_head_has_no_name_is_run_as_it_is(loaded, head, monkeypatch):
    allows = loaded.allows
    if head == "named":
        monkeypatch.setattr(loaded, "allows", lambda trial: trial is not head_is_plain and allows(trial))
    else:
        monkeypatch.setattr(loaded.model, "get_output_embeddings", lambda: None)
    assert_as_alone(loaded, run_rows(loaded, 50, chosen=CHOSEN))


def test_memory_that_runs_out_changes_no_number(loaded):
    shapes = []

    def refuse(module, args, kwargs):
        shapes.append(len(kwargs["input_ids"]))
        if shapes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    results = run_rows(loaded, 10_000, chosen=CHOSEN)
    hook.remove()
    assert max(shapes) > 2
    assert_as_alone(loaded, results)
