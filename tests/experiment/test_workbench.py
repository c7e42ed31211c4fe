"""What a worker keeps between experiments."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from raylora.config.run import load_config
from raylora.console import make_console
from raylora.data.encoding import lengths_of
from raylora.errors import BaseChangedError, ErrorKind, MachineError
from raylora.experiment.runner import ExperimentRunner
from raylora.experiment.story import run_experiment
from raylora.experiment.workbench import Workbench, attach_job, load_planned_dataset
from raylora.mmlu.prompts import encode_questions
from raylora.planning.plan import make_plan
from raylora.planning.show_plan import print_plan
from raylora.records import Question
from raylora.report.terminal import print_results
from raylora.rows import ROW_COLUMNS
from tests.helpers.chunks import OPTIONS, planned, write_dataset
from tests.helpers.templates import TEMPLATES
from tests.helpers.tiny import CHAT_TEMPLATE


def test_a_base_that_was_changed_makes_no_row(tiny_model_folder, tmp_path):
    """What a stage made with a harmed base is not kept, and a worker that says so is replaced."""
    path = write_dataset(tmp_path / "data" / "chunk_1", "data")
    config = load_config(**{**OPTIONS, "model": str(tiny_model_folder), "output": tmp_path / "out"})
    plan = make_plan(config, [path], "single")
    bench = Workbench(config, plan.store)
    with torch.no_grad():
        bench.loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    (experiment,) = plan.experiments
    with pytest.raises(BaseChangedError):
        run_experiment(bench, experiment)
    assert plan.store.read_stage(experiment, "features") is None
    assert plan.store.read_row(experiment) is None


def test_a_change_that_no_logit_shows_counts_too(tiny_model_folder, tmp_path):
    path = write_dataset(tmp_path / "data" / "chunk_1", "data")
    config = load_config(**{**OPTIONS, "model": str(tiny_model_folder), "output": tmp_path / "out"})
    bench = Workbench(config, make_plan(config, [path], "single").store)
    logits = bench.loaded.logits_hash()
    bench.check_base()
    table = bench.loaded.model.model.embed_tokens  # is no longer the head's, and of a token that is not looked at
    table.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    table.weight[470, 0] += 1
    assert bench.loaded.logits_hash() == logits
    with pytest.raises(BaseChangedError):
        bench.check_base()


def test_a_model_that_lacks_weights_is_not_scored(tiny_model_folder, tmp_path):
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    path = write_dataset(tmp_path / "data" / "chunk_1", "data")
    config = load_config(**{**OPTIONS, "model": str(model), "output": tmp_path / "out"})
    plan = make_plan(config, [path], "single")
    with pytest.raises(MachineError, match="its files lack 9 weights") as raised:
        run_experiment(Workbench(config, plan.store), plan.experiments[0])
    assert raised.value.kind is ErrorKind.MODEL


def with_template(folder, model_folder, template):
    """A copy of the model whose chat template is this one."""
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


PICKY = (
    "{% for m in messages %}{% if 'What is 2 ' in m['content'] %}{{ raise_exception('not 2') }}{% endif %}{% endfor %}"
    + CHAT_TEMPLATE
)


@pytest.mark.parametrize("more", [{}, {"stages": ("features",)}, {"transfer": True}])
def test_a_record_that_the_template_refuses_costs_itself_and_no_other(
    options, tmp_path, tiny_model_folder, capsys, more
):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    options["model"] = with_template(tmp_path / "picky", tiny_model_folder, PICKY)
    plan = planned(options, **{"stages": ("features", "train"), "num_epochs": 1, **more})
    plan.write_columns()
    print_plan(plan, make_console(width=200))
    assert "data, first examples: the chat template refuses 1 of the first 8 examples" in capsys.readouterr().out
    runner = ExperimentRunner(plan.config, plan.store)
    values = runner.run(*plan.experiments).values
    assert (values["status"], values["num_examples"], values["num_bad_records"]) == ("ok", 7, 1), values["error"]
    assert values["bad_records"].startswith("record 3: the tokenizer's chat template refuses the conversation")
    assert values["num_train_examples"] == (None if "features" in more.get("stages", ()) else 6 if more else 7)
    # What was counted once is read by others, which then have the same dataset.
    other = Workbench(plan.config, plan.store)
    assert (
        load_planned_dataset(other, plan.experiments[0]).seed
        == load_planned_dataset(runner.bench, plan.experiments[0]).seed
    )
    assert "loaded" not in vars(other)


def test_what_was_encoded_when_a_dataset_was_loaded_is_what_is_trained_on(options, tmp_path, tiny_model_folder):
    """In the order of the training, whichever examples are left out."""
    write_dataset(tmp_path / "data" / "chunk_1", "data", num=30)
    options["model"] = with_template(tmp_path / "picky", tiny_model_folder, PICKY)
    plan = planned(options, stages=("train",), transfer=True)
    (experiment,) = plan.experiments
    bench = Workbench(plan.config, plan.store)
    jobs = []
    for name in ("first", "second"):
        dataset = load_planned_dataset(bench, experiment, 256)
        assert (bench.encoded is not None) is (name == "first")
        jobs.append(attach_job(bench, experiment, dataset, name))
        assert bench.encoded is None
    first, second = ([e.input_ids for e in job.examples] for job in jobs)
    assert first == second
    assert len(first) == 26
    assert lengths_of(jobs[0].examples) == lengths_of(jobs[1].examples)


def test_a_template_that_cuts_answers_or_never_ends_them_is_said(options, tmp_path, tiny_model_folder, capsys):
    records = [{"question": f"What is {i}?", "answer": f"<think>Hm.</think>It is {i}."} for i in range(8)]
    path = tmp_path / "data" / "chunk_1" / "data.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records))
    options["model"] = with_template(tmp_path / "cutting", tiny_model_folder, TEMPLATES["reasoning"])
    plan = planned(options, stages=("train",))
    values = ExperimentRunner(plan.config, plan.store).run(*plan.experiments).values
    assert (values["status"], values["error_kind"]) == ("error", "chat_template")
    assert "data.json: the chat template leaves out a part of 8 of 8 answers (the first: record 1)" in values["error"]
    path.write_text(json.dumps([*records[:2], *({**r, "answer": "Short."} for r in records[2:])]))
    no_end = TEMPLATES["reasoning"].replace("<|im_end|>", "\n")
    options["model"] = with_template(tmp_path / "endless", tiny_model_folder, no_end)
    plan = planned(options, stages=("train",))
    row = ExperimentRunner(plan.config, plan.store).run(*plan.experiments)
    assert row.values["num_answers_cut"] == 2
    said = (
        "the chat template leaves out a part of the answer of 2 of 8 examples; no end-of-turn token stands behind the "
        "answer of 8 of 8 examples: the model does not learn to stop there"
    )
    assert row.values["template_note"] == said
    plan.store.write_tables([row], ROW_COLUMNS)
    print_results([row], plan.store, make_console(width=400))
    print_plan(plan, make_console(width=400))
    assert capsys.readouterr().out.count(said) == 2


def test_a_date_in_the_template_is_the_same_whatever_the_day(options, tmp_path, tiny_model_folder):
    template = "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHAT_TEMPLATE
    options["model"] = with_template(tmp_path / "dated", tiny_model_folder, template)
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plans = [planned(options, stages=("train",), **more) for more in ({}, {"template_date": "2024-07-26"})]
    assert len({plan.experiments[0].identity for plan in plans}) == 1
    other = planned(options, stages=("train",), template_date="2025-01-02")
    assert other.experiments[0].experiment_id != plans[0].experiments[0].experiment_id
    assert other.experiments[0].identity != plans[0].experiments[0].identity
    for plan, date in ((plans[0], "26 July 2024"), (other, "02 January 2025")):
        bench = Workbench(plan.config, plan.store)
        job = attach_job(bench, plan.experiments[0], load_planned_dataset(bench, plan.experiments[0]))
        tokenizer = bench.loaded.tokenizer
        assert {tokenizer.decode(e.input_ids).splitlines()[0] for e in job.examples} == {f"Today is {date}."}
        question = Question("s", "Which?", ("1", "2", "3", "4"), 0, "s/0")
        (encoded,) = encode_questions(tokenizer, [question], {}, "chat", 512)
        assert tokenizer.decode(encoded.context_ids).startswith(f"Today is {date}.")
