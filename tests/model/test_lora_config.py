"""LoRA's relatives: each is trained, saved and scored as PEFT's own forward pass has it, and leaves the base alone."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raylora.config.method import LATER, Method
from raylora.data.encoding import IGNORE_INDEX, encode_example, labels_of
from raylora.errors import UserError
from raylora.model.lora_config import adapted_with, check_options, going_on
from raylora.model.targets import skeleton
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import train_adapter
from tests.helpers.adapters import logits, save_kind
from tests.helpers.tiny import load, make_tokenizer, tiny_config
from tests.helpers.training import make_examples

PLAIN = Method(lora_r=4, lora_alpha=8, lora_dropout=0.0, batch_size=4, gradient_accumulation=1, learning_rate=1e-2)
VARIANTS = {
    "rslora": {"lora_variant": "rslora"},
    "ranks": {"rank_pattern": ("q_proj=2", "layers.1.mlp.up_proj=8")},
    "ranks and alphas": {"rank_pattern": ("v_proj=1",), "alpha_pattern": ("v_proj=3", "down_proj=0.5")},
    "ranks of one scaling": {"rank_pattern": ("v_proj=1",), "alpha_pattern": ("v_proj=2",)},
    "rslora and ranks": {"lora_variant": "rslora", "rank_pattern": ("q_proj=2",)},
    "dora": {"lora_variant": "dora", "target_modules": ("q_proj", "v_proj", "up_proj")},
    "all biases": {"bias": "all", "target_modules": ("q_proj", "up_proj")},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ("q_proj",)},
    "output head": {"modules_to_save": ("lm_head",)},
    "norms": {"modules_to_save": ("norm", "input_layernorm")},
    "embeddings": {"modules_to_save": ("embed_tokens",)},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "target_modules": ("q_proj", "v_proj")},
    "eva": {"init": "eva", "target_modules": ("q_proj", "v_proj", "down_proj")},
    "all at once": {
        "lora_variant": "dora", "bias": "all", "modules_to_save": ("lm_head",), "rank_pattern": ("q_proj=2",),
        "target_modules": ("q_proj", "v_proj"),
    },
    "pissa, dora, biases, head": {
        "init": "pissa", "lora_variant": "dora", "bias": "all", "modules_to_save": ("lm_head",),
        "target_modules": ("q_proj", "v_proj"), "rank_pattern": ("q_proj=2",),
    },
    "pissa, rslora, ranks": {"init": "pissa", "lora_variant": "rslora", "rank_pattern": ("q_proj=2",)},
    "eva, rslora, biases": {
        "init": "eva", "lora_variant": "rslora", "bias": "lora_only", "target_modules": ("q_proj",),
    },
}  # fmt: skip
SLOW = {
    "dora", "all biases", "biases of adapted layers", "all at once", "pissa, dora, biases, head", "eva, rslora, biases",
}  # fmt: skip
"""Those whose adapted layers PEFT computes."""
TAKES_PARTS = {"pissa", "olora", "pissa, dora, biases, head", "pissa, rslora, ranks"}


def make_biased() -> LlamaForCausalLM:
    """A tiny Llama whose layers have biases, none of them zero."""
    torch.manual_seed(0)
    config = tiny_config(LlamaConfig)
    config.attention_bias = config.mlp_bias = True
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biased")
    make_biased().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def weights_hash(model) -> str:
    """Of all parameters of a model, by name."""
    digest = hashlib.sha256()
    named = ((name.replace(".base_layer", ""), parameter) for name, parameter in model.named_parameters())
    for name, parameter in sorted(named):
        digest.update(name.encode() + parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encoded_of(loaded) -> list:
    return [encode_example(loaded.tokenizer, e, 128) for e in make_examples(8)]


def peft_gradients(peft, encoded, train_on) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all supervised tokens, and its gradients, by PEFT's own forward pass, an example at a time."""
    peft.zero_grad()
    labels = [labels_of(e, train_on) for e in encoded]
    num_supervised = sum(label != IGNORE_INDEX for row in labels for label in row)
    total = 0.0
    for example, row in zip(encoded, labels, strict=True):
        output = peft(input_ids=torch.tensor([list(example.input_ids)]), use_cache=False)
        targets = torch.tensor(row[1:])
        loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], targets, reduction="sum", ignore_index=-100)
        (loss / num_supervised).backward()
        total += float(loss) / num_supervised
    return total, {n: p.grad.clone() for n, p in peft.named_parameters() if p.grad is not None}


def disturb(parameters) -> None:
    """Move trained parameters away from their initial values, of which B's are zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_and_logits_are_those_of_peft(biased_folder, name, quantization):
    if quantization != "none" and name in TAKES_PARTS:
        pytest.skip("refused: see the test of refusals")
    loaded, method = load(biased_folder, quantization), PLAIN.model_copy(update=VARIANTS[name])
    encoded = encoded_of(loaded)
    parameters = loaded.attach(method, 3, examples=encoded)
    disturb(parameters)
    expected_loss, expected = peft_gradients(loaded.peft_model, encoded, method.train_on)
    theirs = {p: expected[n] for n, p in loaded.peft_model.named_parameters() if n in expected}
    assert {*theirs} == {*parameters}, "what PEFT trains is what raylora trains"
    loaded.peft_model.zero_grad()
    runner = GradientAccumulator(loaded, [Job(parameters, encoded, method, 3)], None)
    loaded.model.train()
    with runner.ready():
        found = runner.backward({0: (0, range(len(encoded)))})[0]
        assert ("peft" in runner.adapter_forward) == (name in SLOW)
    assert float(found.loss) == pytest.approx(expected_loss, rel=1e-5)
    for parameter in parameters:
        torch.testing.assert_close(parameter.grad, theirs[parameter], rtol=1e-3, atol=1e-6)
    runner.restore()


@pytest.mark.parametrize(
    "quantization", ["none", *(pytest.param(bits, marks=pytest.mark.slow) for bits in ("8bit", "4bit"))]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_trained_and_saved_loads_in_peft_and_leaves_the_base_as_it_was(
    biased_folder, tmp_path, name, quantization
):
    from peft import PeftModel

    if quantization != "none" and name in TAKES_PARTS:
        pytest.skip("refused: see the test of refusals")
    loaded, method = load(biased_folder, quantization), PLAIN.model_copy(update=VARIANTS[name])
    encoded, before = encoded_of(loaded), weights_hash(loaded.model)
    base = logits(loaded.model)
    parameters = loaded.attach(method, 3, examples=encoded)
    torch.testing.assert_close(logits(loaded.model), base, atol=1e-5, rtol=1e-4)
    assert loaded.changes_nothing()
    result = train_adapter(loaded, parameters, encoded, method, 3, num_steps=4)
    assert result.metrics.num_trained_parameters == sum(p.numel() for p in parameters)
    assert result.metrics.train_notes == ""
    assert ("peft" in result.metrics.adapter_forward) == (name in SLOW)
    assert not loaded.changes_nothing()
    assert loaded.relative_weight_update() > 0
    trained = logits(loaded.model)
    assert float((trained - base).abs().max()) > 1e-4
    loaded.save_adapter(tmp_path / "adapter")
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded.detach()
    assert weights_hash(loaded.model) == before
    assert torch.equal(logits(loaded.model), base)
    loaded.attach_saved(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.model), trained, atol=1e-4, rtol=1e-3)
    loaded.detach()
    loaded.attach(PLAIN, 1)  # and the next training can begin
    loaded.unwrap()
    assert weights_hash(loaded.model) == before
    theirs = PeftModel.from_pretrained(loaded.model, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), trained, atol=1e-4, rtol=1e-3)


def test_later_options_are_in_the_identity_only_where_they_are_not_the_default():
    assert not {*LATER} & Method().identity().keys()
    assert Method(bias="all", rank_pattern="q_proj=2").identity().keys() & {*LATER} == {"bias", "rank_pattern"}


@pytest.mark.parametrize(
    ("quantization", "options", "expected"),
    [
        ("8bit", {"init": "pissa"}, "--init pissa: .* give --quantization none"),
        ("4bit", {"init": "olora"}, "--init olora: .* give --quantization none"),
        ("fp8", {"lora_variant": "dora"}, "--lora-variant dora: not with --quantization fp8"),
        ("fp8", {"bias": "all"}, "--bias all: not with --quantization fp8"),
        ("4bit", {"modules_to_save": ("up_proj",)}, "--modules-to-save: .*up_proj cannot be trained whole"),
        (
            "none",
            {"modules_to_save": ("lm_hed",)},
            "--modules-to-save: no module is called lm_hed; there are .*lm_head",
        ),
        ("none", {"rank_pattern": ("w=2",)}, "--rank-pattern: no layer with an adapter is called w; there are q_proj"),
        ("none", {"alpha_pattern": ("w(=2",)}, "--alpha-pattern: w\\( is no name"),
        ("none", {"init": "pissa", "rank_pattern": ("q_proj=65",)}, "q_proj has a rank of 65, and its weight 64 parts"),
        ("none", {"init": "eva", "target_modules": ("embed_tokens",)}, "embed_tokens is no linear layer"),
        ("none", {"modules_to_save": ("model",)}, "--target-modules: No modules were targeted"),
    ],
)
def test_what_does_not_go_together_is_one_line_before_the_model_is_read(biased_folder, quantization, options, expected):
    method, bare = PLAIN.model_copy(update=options), skeleton(str(biased_folder))

    def check() -> None:
        check_options(method, quantization)
        adapted_with(bare, method, "tiny", quantization)

    with pytest.raises(UserError, match=expected) as raised:
        check()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_trained_is_counted_on_a_skeleton(biased_folder, name):
    method = PLAIN.model_copy(update={**VARIANTS[name], "init": "default"})
    adapted = adapted_with(skeleton(str(biased_folder)), method, "tiny", "none")
    loaded = load(biased_folder, "none")
    assert adapted.num_parameters == sum(p.numel() for p in loaded.attach(method, 0))
    assert len(adapted.modules) == len(loaded.lora_modules())


def test_a_model_without_biases_is_noted(tiny_model_folder):
    method = PLAIN.model_copy(update={"bias": "all"})
    adapted = adapted_with(skeleton(str(tiny_model_folder)), method, "tiny", "none")
    assert adapted.note == "--bias all: there is no bias to train"


def test_only_an_adapter_of_this_base_is_gone_on_from(biased_folder, tmp_path):
    """One line, before anything runs: missing, damaged, of another kind, of another model, or with other options."""
    loaded, method = load(biased_folder, "none"), PLAIN.model_copy(update={"target_modules": ("q_proj",)})
    loaded.attach(method, 0)
    loaded.save_adapter(tmp_path / "good")
    source, bare = str(biased_folder), skeleton(str(biased_folder))

    def refused(folder, given=(), **options) -> str:
        wanted = Method(init_adapter=str(folder), **options)
        with pytest.raises(UserError) as raised:
            adapted_with(bare, going_on(wanted, given, source), source, "none")
        assert "\n" not in str(raised.value)
        return str(raised.value)

    taken = going_on(Method(init_adapter=str(tmp_path / "good")), (), source)
    assert (taken.lora_r, taken.lora_alpha, taken.target_modules) == (4, 8, ("q_proj",))
    assert adapted_with(bare, taken, source, "none").target_modules == ("q_proj",)
    given = {"lora_r", "target_modules", "bias"}
    assert going_on(Method(init_adapter=str(tmp_path / "good"), lora_r=4, target_modules="q_proj"), given, source)
    assert "--lora-r 8: the adapter whose training is continued" in refused(tmp_path / "good", {"lora_r"}, lora_r=8)
    assert "has none: leave" in refused(tmp_path / "good", {"rank_pattern"}, rank_pattern="q_proj=3")
    assert "--init eva" in refused(tmp_path / "good", {"init"}, init="eva")
    assert "nowhere: no adapter_config.json" in refused(tmp_path / "nowhere")
    assert "is IA3, and only LoRA" in refused(save_kind("IA3", tmp_path / "ia3"))
    assert "is prompt tuning" in refused(save_kind("prompt tuning", tmp_path / "prompt"))
    assert "began with parts of the base's weights (pissa)" in refused(save_kind("PiSSA", tmp_path / "pissa"))
    for change, expected in (
        ({"base_model_name_or_path": "org/other"}, "was trained on org/other, and the base is"),
        ({"r": 5}, "is of another model: of "),
        ({"target_modules": ["q_proj", "v_proj"]}, "it has nothing"),
        ({"target_modules": ["w"]}, "no layer is called w"),
        ({"peft_type": "NEWEST"}, "of a kind that raylora does not know (NEWEST)"),
    ):
        folder = shutil.copytree(tmp_path / "good", tmp_path / "changed", dirs_exist_ok=True)
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**values, **change}))
        assert expected in refused(folder), change
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "adapter_model.safetensors: cannot be read" in refused(tmp_path / "good")
