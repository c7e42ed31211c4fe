"""Estimates beside what is measured: weights in memory, tensors saved for the backward pass, tokens that are run."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from raylora.config.method import LORA_TARGETS
from raylora.config.options import ModelOptions
from raylora.config.run import load_config
from raylora.console import make_console
from raylora.data.encoding import EncodedExample
from raylora.data.examples import count_chars
from raylora.errors import UserError
from raylora.model.loading import load_model
from raylora.model.lora_config import adapted_with
from raylora.model.targets import skeleton
from raylora.planning import estimate, hardware, show_plan
from raylora.planning.plan import find_files, make_plan
from raylora.planning.questions import QuestionTokens
from raylora.planning.shape import LLM_INT8, Shape, base_bytes, shape_of, shape_of_skeleton, weight_bytes
from raylora.planning.training_memory import ADAPTER_BYTES, training_bytes
from raylora.records import Example, Experiment, Message
from raylora.training.gradients import GradientAccumulator, Job
from tests.helpers.chunks import OPTIONS, write_dataset
from tests.helpers.families import FAMILIES, load_family, make_family
from tests.helpers.shapes import h200, llama_3_8b, shape_of_8b
from tests.helpers.tiny import make_tokenizer

CPU = hardware.Hardware("cpu", 4, 24 * 10**9, 1e11)
SHAPES = {
    "SmolLM2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "Llama-3": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    """A model of two layers, as wide in proportion as those people use."""
    path = tmp_path_factory.mktemp(request.param)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=2, pad_token_id=0, **SHAPES[request.param])
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def gpu(gigabytes: float) -> hardware.Hardware:
    return hardware.Hardware("cuda", 2, int(gigabytes * 1e9), 1e14, 1e12)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_weights_take_what_they_take(folder, quantization):
    shape = shape_of(str(folder), load_config(model="x").target_modules)
    loaded = load_model(ModelOptions(model=str(folder), quantization=quantization), torch.device("cpu"))
    held = loaded.model.get_memory_footprint(return_buffers=False)
    assert weight_bytes(shape, quantization, CPU) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_minibatch_keeps_what_is_said(folder, dropout):
    method = load_config(model="x", lora_dropout=dropout).method()
    shape = shape_of(str(folder), method.target_modules)
    loaded = load_model(ModelOptions(model=str(folder), quantization="none"), torch.device("cpu"))
    parameters = loaded.attach(method, 0)
    own = {t.untyped_storage().data_ptr() for t in [*loaded.model.parameters(), *loaded.model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no storage is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    num_tokens = 200
    example = EncodedExample(list(range(5, 5 + num_tokens)), *([flag] * num_tokens for flag in (False, True, True)))
    passes = GradientAccumulator(loaded, [Job(parameters, [example], method, 0)], None)
    loaded.model.train()
    with passes.ready(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        passes.backward({0: (0, [0])})
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    adapter = ADAPTER_BYTES * sum(p.numel() for p in parameters)
    said = training_bytes(shape, method, num_tokens, CPU, checkpointing=False)
    assert said - adapter == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_keeps_more_by_what_is_said(folder, dropout):
    """Of what is saved, that which is still there when the backward pass begins: PEFT makes much that it drops."""
    example = EncodedExample(list(range(5, 205)), *([flag] * 200 for flag in (False, True, True)))

    def bytes_of(variant: str) -> tuple[int, int]:
        """Held and said of 200 tokens."""
        method = load_config(model="x", lora_dropout=dropout, lora_variant=variant).method()
        loaded = load_model(ModelOptions(model=str(folder), quantization="none"), torch.device("cpu"))
        parameters = loaded.attach(method, 0)
        own = {t.untyped_storage().data_ptr() for t in [*loaded.model.parameters(), *loaded.model.buffers()]}
        kept: weakref.WeakSet[Kept] = weakref.WeakSet()
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> Kept:
            kept.add(found := Kept(tensor.detach()))
            return found

        def use(found: Kept) -> torch.Tensor:
            if not sizes:
                storages = [k.tensor.untyped_storage() for k in kept]
                sizes.update({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own})
            return found.tensor

        passes = GradientAccumulator(loaded, [Job(parameters, [example], method, 0)], None)
        loaded.model.train()
        with passes.ready(), torch.autograd.graph.saved_tensors_hooks(keep, use):
            passes.backward({0: (0, [0])})
        shape = shape_of(str(folder), method.target_modules)
        said = [training_bytes(shape, method, n, CPU, checkpointing=False) for n in (0, 200)]
        return sum(sizes.values()), said[1] - said[0]

    (held, said), (held_by_dora, said_of_dora) = bytes_of("lora"), bytes_of("dora")
    assert said_of_dora - said == pytest.approx(held_by_dora - held, rel=0.15)


class Kept:
    """A tensor that autograd saves; it is there as long as autograd needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_estimates_count_what_is_trained(folder):
    """Of biases, whole modules and DoRA; the copy of what weights were, and logits where the head is trained."""
    bare = skeleton(str(folder))
    method = load_config(model="x").method()
    config = load_config(model=str(folder), quantization="none")

    def peak_of(**options) -> int:
        changed = method.model_copy(update=options)
        adapted = adapted_with(bare, changed, str(folder), "none")
        estimator = estimate.Estimator(config, str(folder), [], 1, bare)
        _, found = estimator.of(
            [Example((Message("user", "So what?"),), "That.", "q")], 10, 1000, changed, ["train"], adapted
        )
        return found.peak_memory_bytes

    plain = peak_of()
    adapted = adapted_with(bare, method.model_copy(update={"modules_to_save": ("lm_head",)}), str(folder), "none")
    head = bare.get_output_embeddings().weight.numel()
    assert adapted.trains_head
    assert peak_of(modules_to_save=("lm_head",)) > plain + ADAPTER_BYTES * head
    assert peak_of(rank_pattern=("q_proj=1",)) < plain < peak_of(rank_pattern=("q_proj=64",))
    shape = shape_of(str(folder), LORA_TARGETS)
    assert peak_of(init="pissa") == plain + 4 * shape.adapted_weights
    assert peak_of(lora_variant="dora") > plain


def test_an_8b_model_is_known_by_its_configuration(tmp_path):
    source = llama_3_8b(tmp_path)
    config = load_config(model=source)
    shape = shape_of(source, config.target_modules)
    assert shape.layer_weights + shape.other_weights == 8_030_261_248
    assert weight_bytes(shape, "none", gpu(80)) == 2 * 8_030_261_248
    assert weight_bytes(shape, "8bit", gpu(80)) == pytest.approx(9.08e9, rel=0.01)
    assert weight_bytes(shape, "4bit", gpu(80)) == pytest.approx(5.70e9, rel=0.01)
    for quantization, floats in (("none", 0), ("8bit", 2 * 4096 * 14336), ("4bit", 2 * 4096 * 14336)):
        weights = weight_bytes(shape, quantization, gpu(80))
        assert base_bytes(shape, quantization, gpu(80)) - weights == floats, "one matrix at a time"
    assert 16 * config.lora_r * shape.adapter_rows == 16 * 41_943_040, "PEFT counts as many for r 16"


def test_what_cannot_fit_is_one_line_that_says_what_would(tmp_path):
    source = llama_3_8b(tmp_path)
    config = load_config(model=source, quantization="8bit")
    shape = shape_of(source, config.target_modules)
    assert estimate.misfit(shape, gpu(24), config) == ""
    line = estimate.misfit(shape, gpu(10), config)
    assert "it needs 10.0 GB" in line
    assert "--quantization 4bit would fit" in line
    assert "\n" not in line
    assert "--max-memory can put a part of it on the CPU" in estimate.misfit(shape, gpu(6), config)
    assert "this GPU has" in estimate.misfit(shape, gpu(6), config)
    two, half = (load_config(model=source, gpus_per_worker=share) for share in (2, 0.5))
    assert estimate.misfit(shape, hardware.lent(gpu(10), 2), two) == ""
    assert "a group of 2 GPUs has" in estimate.misfit(shape, hardware.lent(gpu(4), 2), two)
    assert "a share of 0.5 of this GPU has" in estimate.misfit(shape, hardware.lent(gpu(12), 0.5), half)
    shared = load_config(model=source, max_memory={"0": "5GiB", "cpu": "30GiB"})
    assert estimate.misfit(shape, gpu(6), shared) == ""


def test_memory_that_is_short_makes_minibatches_smaller(tmp_path):
    source = llama_3_8b(tmp_path)
    config = load_config(model=source, quantization="4bit", stages="train")
    shape, sizes = shape_of(source, config.target_modules), estimate.Sizes(1000, 400.0, 900)
    work = estimate.work_of(config, config.method(), sizes, QuestionTokens(), config.stages)
    roomy, tight = (estimate.estimate(shape, gpu(g), "4bit", config.method(), sizes, work) for g in (80, 12))
    assert tight.peak_memory_bytes < 12e9 < roomy.peak_memory_bytes
    assert tight.seconds > 1.4 * roomy.seconds, "checkpointing runs the forward pass twice"


def test_tokens_that_are_run_are_counted(tmp_path):
    config = load_config(model="x", sample_size=10, probe_steps=5, batch_size=2, gradient_accumulation=2, num_epochs=3)
    sizes = estimate.Sizes(100, 50.0, 80)
    work = estimate.work_of(config, config.method(), sizes, QuestionTokens(7000), config.stages)
    assert (work.trained, work.evaluated) == (5 * 4 * 50 + 3 * 5000, 2 * 10 * 50 + 7000)
    assert (work.held_out_tokens, work.train_step_tokens) == (2 * 50, 4 * 50)
    only_train = estimate.work_of(config, config.method(), sizes, QuestionTokens(7000), ["train"])
    assert (only_train.trained, only_train.evaluated, only_train.held_out_tokens) == (15000, 0, 0)


@pytest.fixture(scope="module")
def of_8b(tmp_path_factory) -> Shape:
    return shape_of_8b(tmp_path_factory.mktemp("llama-3-8b"))


def estimated(shape, kernels, storage, num_examples=1600, mean=117.8, num_together=1, questions=0, **options):
    """What an H200 takes for a dataset like the first of chunk_001: the Estimate, and the Work."""
    config = load_config(model="x", max_length=256, **options)
    method, sizes = config.method(), estimate.Sizes(num_examples, mean, 256)
    work = estimate.work_of(
        config, method, sizes, QuestionTokens(125 * questions), config.stages
    )  # tokens a question, 0-shot
    if storage == LLM_INT8:  # as it was measured, each micro-batch of the probe was a pass of its own
        work = dataclasses.replace(work, probe_steps=4 * work.probe_steps, probe_step_tokens=work.probe_step_tokens / 4)
    return estimate.estimate(shape, h200(kernels), storage, method, sizes, work, num_together), work


@pytest.mark.parametrize(
    ("kernels", "storage", "num_together", "dropout", "tokens_a_second"),
    [
        ("torch", "none", 1, 0.1, 3700), ("torch", "none", 1, 0.0, 4900), ("torch", "4bit", 1, 0.1, 3300),
        ("torch", LLM_INT8, 1, 0.1, 2700),  # measured
        ("liger", "none", 1, 0.1, 14000), ("liger", "none", 8, 0.1, 16000), ("liger", "4bit", 1, 0.1, 12500),
        ("liger", "8bit", 1, 0.1, 12500),  # aims
    ],
)  # fmt: skip
def test_training_on_an_h200(of_8b, kernels, storage, num_together, dropout, tokens_a_second):
    options = {"stages": "train", "num_epochs": 1, "lora_dropout": dropout}
    found, work = estimated(of_8b, kernels, storage, num_together=num_together, **options)
    assert work.trained / (found.seconds - estimate.HOST_SECONDS) == pytest.approx(tokens_a_second, rel=0.25)


@pytest.mark.parametrize(
    ("kernels", "storage", "tokens_a_second"),
    [("torch", "none", 22600), ("torch", LLM_INT8, 9600), ("liger", "none", 36000), ("liger", "8bit", 33000)],
)
def test_scoring_on_an_h200(of_8b, kernels, storage, tokens_a_second):
    found, work = estimated(of_8b, kernels, storage, questions=1140, stages="mmlu")
    assert work.evaluated / (found.seconds - estimate.HOST_SECONDS) == pytest.approx(tokens_a_second, rel=0.25)
    if storage == "none":
        assert found.peak_memory_bytes == pytest.approx(18.0e9, rel=0.05)


@pytest.mark.parametrize(
    ("kernels", "storage", "steps", "tokens_a_second"), [("torch", LLM_INT8, 6, 1000), ("liger", "8bit", 20, 12000)]
)
def test_a_probe_on_an_h200(of_8b, kernels, storage, steps, tokens_a_second):
    found, work = estimated(of_8b, kernels, storage, stages="features", probe_steps=steps)
    without, _ = estimated(of_8b, kernels, storage, stages="features", probe_steps=0)
    assert work.trained / (found.seconds - without.seconds) == pytest.approx(tokens_a_second, rel=0.25)


@pytest.mark.parametrize(("mean", "seconds"), [(112.2, 31), (140.4, 39)])
def test_a_whole_experiment_on_an_h200_as_it_went(of_8b, mean, seconds):
    """Of 160 examples and 570 questions: 6.4 and 7.4 s were planned, and 26 GB of the 46 that it took."""
    options = {"probe_steps": 6, "num_epochs": 1}
    found, _ = estimated(of_8b, "torch", LLM_INT8, 160, mean, questions=570, **options)
    assert found.seconds == pytest.approx(seconds, rel=0.25)
    assert found.peak_memory_bytes == pytest.approx(46e9, rel=0.05)


@pytest.mark.parametrize(("kernels", "storage", "seconds"), [("torch", LLM_INT8, 320), ("liger", "8bit", 75)])
def test_a_default_experiment_on_an_h200(of_8b, kernels, storage, seconds):
    found, _ = estimated(of_8b, kernels, storage, 1000, questions=14042)
    assert found.seconds == pytest.approx(seconds, rel=0.25)


def test_what_is_trained_together_fills_the_memory_and_no_more(of_8b):
    alone, together = (
        estimated(of_8b, "liger", "8bit", num_together=n, stages="train", num_epochs=1)[0] for n in (1, 1000)
    )
    assert alone.peak_memory_bytes < 30e9
    # Its passes take half of it: what is captured of one size stays beside those of others.
    assert 50e9 < together.peak_memory_bytes < 80e9
    assert together.seconds < alone.seconds


def test_of_a_gpu_elsewhere_a_step_of_one_is_known_and_no_time(of_8b):
    config = load_config(model="x", stages="train")
    sizes = estimate.Sizes(1600, 117.8, 256)
    work = estimate.work_of(config, config.method(), sizes, QuestionTokens(), config.stages)
    found = estimate.estimate(of_8b, hardware.ELSEWHERE, "8bit", config.method(), sizes, work, 1000)
    assert found.seconds is None
    assert found.peak_memory_bytes < 30e9


def test_lengths_of_a_sample_stand_for_a_dataset():
    sample = [Example((Message("user", "What is it?"),), "word " * n, "What is it?") for n in (1, 20, 500)]
    sizes = estimate.sizes_of(make_tokenizer(), sample, num_examples=300, max_length=64)
    assert sizes.longest == 64
    assert sizes.num_tokens == round(100 * sum(estimate.sizes_of(make_tokenizer(), [e], 1, 64).longest for e in sample))


def test_a_sorted_files_first_examples_are_weighed_by_its_characters():
    short, long = (Example((Message("user", "What is it?"),), "word " * n, "What is it?") for n in (3, 300))
    first = [short] * 32
    num_chars = sum(map(count_chars, [*first, *[long] * 32]))
    sizes = estimate.sizes_of(make_tokenizer(), first, 64, 2048, num_chars)
    true = sum(estimate.sizes_of(make_tokenizer(), [e], 1, 2048).longest for e in (short, long)) / 2
    assert sizes.mean_tokens == pytest.approx(true, rel=0.25)
    assert sizes.longest >= sizes.mean_tokens
    assert estimate.sizes_of(make_tokenizer(), first, 64, 64, num_chars).mean_tokens == 64


def test_a_dry_run_says_what_it_takes(tmp_path, tiny_model_folder):
    write_dataset(tmp_path / "data" / "chunk_1", "short", num=4)
    write_dataset(tmp_path / "data" / "chunk_1", "long", num=40)
    (tmp_path / "data" / "chunk_1" / "bad.json").write_text("[{")
    options = {**OPTIONS, "model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "out"}
    config = load_config(**options, chunk="chunk_1", dry_run=True, questions="more=demo")
    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    assert [e.dataset for e in plan.experiments] == ["long", "short", "bad"], "by tokens"
    long, short, bad = plan.experiments
    assert long.num_tokens == pytest.approx(10 * short.num_tokens, rel=0.1)
    assert long.estimated_seconds > short.estimated_seconds > 0
    assert bad.estimated_seconds is None
    console = make_console(width=200, file=io.StringIO(), record=True)
    show_plan.print_plan(plan, console)
    shown = console.export_text()
    assert "for one worker, stages that are done not taken off" in shown
    assert "\nlong, short: records of the form question/answer\n" in shown
    for name in ("", "more: "):
        assert f"\n{name}{plan.num_questions} questions can show changes of accuracy from " in shown
    assert " after Holm over 3 datasets (at 5%, found in 80% of cases; an assumed 15% of the answers" in shown
    with pytest.raises(UserError, match="fewer --num-workers"):
        make_plan(config.model_copy(update={"num_workers": 10_000}), files, chunk).check_fit()


def test_a_dry_run_has_a_line_for_all_datasets_of_one_form():
    shown = [("a", "question/answer", "id"), ("b", "question/answer", ""), ("bad", "", "")]
    shown += [(f"c{i}", "messages", "id, [red]") for i in range(7)]
    experiments = [Experiment(n, n, n, {}, "", {}, "", record_form=f, ignored_keys=k) for n, f, k in shown]
    assert show_plan.lines_on_forms([*experiments, experiments[0]]) == [
        "a: records of the form question/answer; keys left aside: id",
        "b: records of the form question/answer",
        "c0, c1, c2, c3, c4 and 2 more: records of the form messages; keys left aside: id, [red]",
    ]


def test_a_dry_run_counts_the_held_out_examples_of_all_datasets(tmp_path, tiny_model_folder):
    for name, num in (("long", 200), ("short", 20)):
        write_dataset(tmp_path / "data" / "chunk_1", name, num=num)
    (tmp_path / "data" / "chunk_1" / "bad.json").write_text("[{")
    options = {**OPTIONS, "model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "out"}
    config = load_config(**options, chunk="chunk_1", stages=("train",))
    chunk, files = find_files(config)
    plan = make_plan(config.model_copy(update={"transfer": True}), files, chunk)
    long, short, bad = plan.experiments
    # A token of the training has two passes; what is left of the seconds is the same for both.
    seconds, tokens = (long.estimated_seconds, short.estimated_seconds), (long.num_tokens, short.num_tokens)
    a_pass = (seconds[0] - seconds[1]) / (2 * config.num_epochs * (tokens[0] - tokens[1]))
    left = seconds[1] - 2 * config.num_epochs * tokens[1] * a_pass
    share = estimate.SHARE_OF_RATE["train"] / estimate.SHARE_OF_RATE["evaluate"]
    assert left == pytest.approx(share * a_pass * (tokens[0] + tokens[1]) / 10, rel=0.01)
    assert bad.estimated_seconds is None
    console = make_console(width=200, file=io.StringIO(), record=True)
    show_plan.print_plan(plan, console)
    assert "train: new; transfer: new" in console.export_text()


def test_a_dataset_that_the_chat_template_refuses_costs_no_other(tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    template = "{% for m in messages %}{{ raise_exception('no') if 'tea' in m.content }}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    write_dataset(tmp_path / "data" / "chunk_1", "good")
    (tmp_path / "data" / "chunk_1" / "tea.json").write_text('[{"question": "tea?", "answer": "yes"}]')
    options = {**OPTIONS, "model": str(folder), "data_root": tmp_path / "data", "output": tmp_path / "out"}
    config = load_config(**options, chunk="chunk_1")
    chunk, files = find_files(config)
    good, tea = make_plan(config, files, chunk).experiments
    assert (good.dataset, tea.dataset) == ("good", "tea")
    assert good.num_tokens > tea.num_tokens == 0
    assert tea.estimated_seconds is None


@pytest.mark.parametrize("change", ["quantized", "nameless"])
def test_a_model_of_which_nothing_is_known_gets_no_estimate(tmp_path, change):
    source = llama_3_8b(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    if change == "nameless":
        values = {"model_type": "no such type"}
    path.write_text(json.dumps(values))
    assert shape_of(source, load_config(model="x").target_modules) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_an_estimate(name, tmp_path):
    model = make_family(name)
    config = load_config(model="x", quantization="none")
    with torch.device("meta"):
        shape = shape_of_skeleton(AutoModelForCausalLM.from_config(model.config), config.target_modules)
    num_weights = sum(p.numel() for p in model.parameters())
    assert weight_bytes(shape, "none", CPU) == 4 * num_weights
    loaded = load_family(name)
    assert config.lora_r * shape.adapter_rows == sum(p.numel() for p in loaded.attach(config.method(), 0))
    experts = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3 and "expert" in n)
    assert (shape.expert_weights, shape.used_expert_weights) == (experts, experts / 2), "2 of 4 experts a token"
    sizes = estimate.Sizes(100, 40.0, 60)
    work = estimate.work_of(config, config.method(), sizes, QuestionTokens(), ("features", "train"))
    found = estimate.estimate(shape, CPU, "none", config.method(), sizes, work)
    assert found.peak_memory_bytes > 4 * num_weights


def test_experts_count_as_stored_and_as_used(tmp_path):
    """Mixtral 8x7B: 46.7 billion weights, of which a token uses 12.9 (Jiang et al. 2024, table 1)."""
    MixtralConfig().save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), ("auto",))
    assert shape.layer_weights + shape.other_weights == pytest.approx(46.7e9, rel=0.01)
    unused = shape.expert_weights - shape.used_expert_weights
    assert shape.layer_weights + shape.other_weights - unused == pytest.approx(12.9e9, rel=0.01)
    assert weight_bytes(shape, "4bit", gpu(80)) > 2 * shape.expert_weights, "experts are not quantized"
