"""One experiment in this process: what changes, or goes, under a run is noticed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raylora.config.run import load_config
from raylora.errors import ErrorKind, MachineError
from raylora.experiment.runner import ExperimentRunner
from raylora.experiment.story import run_experiment
from raylora.experiment.together import train_together
from raylora.experiment.workbench import Workbench
from raylora.mmlu.question_set import load_question_set
from raylora.mmlu.scoring import load_score
from raylora.planning.plan import make_plan
from raylora.report.terminal import print_results
from raylora.rows import FEATURE_NAMES, ROW_COLUMNS, load_results
from raylora.run.live_table import describe
from tests.helpers.chunks import OPTIONS, planned, still, write_dataset
from tests.helpers.families import EXPERTS, save_family
from tests.helpers.questions import as_dicts, questions_of_many_sizes
from tests.helpers.tiny import make_model


def test_questions_or_a_model_that_change_during_a_run_leave_nothing(options, tmp_path, tiny_model_folder):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    questions, model = tmp_path / "questions.json", tmp_path / "model"
    right = [{"subject": "anatomy", "question": f"Q{i}", "choices": list("wxyz"), "answer": i % 4} for i in range(8)]
    questions.write_text(json.dumps(right))
    shutil.copytree(tiny_model_folder, model)
    options = {**options, "mmlu": str(questions), "model": str(model), "max_samples": None}
    plan = planned(options, stages=("train", "mmlu"))
    (experiment,) = plan.experiments
    questions.write_text(json.dumps([{**q, "answer": 0} for q in right]))
    with plan.store.held(False), pytest.raises(MachineError, match="when the run began") as raised:
        ExperimentRunner(plan.config, plan.store).run(experiment)
    assert raised.value.kind is ErrorKind.CHANGED_MEANWHILE
    assert not list(plan.store.root.rglob("scores.parquet"))
    assert plan.store.read_row(experiment) is None
    questions.write_text(json.dumps(right))
    assert ExperimentRunner(plan.config, plan.store).run(experiment).ok
    (tmp_path / "other").mkdir()
    make_model(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", model)
    plan.store.forget_stage(experiment, "train")
    with pytest.raises(MachineError, match="model: not what it was when the run began"):
        ExperimentRunner(plan.config, plan.store).run(experiment)


def further_sets(tmp_path) -> dict:
    """Options of a run with a further set and a mask, which leaves out 3 of the 20 questions."""
    asked = load_question_set(load_config(mmlu="demo", max_samples=20)).questions
    (tmp_path / "mask.json").write_text(json.dumps([q.question_id for q in asked[:3]]))
    (tmp_path / "many.json").write_text(json.dumps(as_dicts(questions_of_many_sizes())))
    return {"questions": f"many={tmp_path / 'many.json'}", "mask": str(tmp_path / "mask.json"), "scoring": "cloze"}


def test_further_sets_and_a_mask_have_columns_in_the_row(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, **further_sets(tmp_path), stages=("train", "mmlu"))
    (experiment,) = plan.experiments
    row = ExperimentRunner(plan.config, plan.store).run(experiment)
    assert row.ok, row.values["error"]
    v = row.values
    score, base = (
        load_score(p)
        for p in (plan.store.scores_path(experiment), plan.store.base_file(experiment.base_key, "scores.parquet"))
    )
    assert v["total_questions"] == len(score.questions) == 20
    left = score.questions.index >= 3
    assert v["total_questions[masked]"] == left.sum() == 17
    change = score.questions["correct"].astype(int) - base.questions["correct"].astype(int)
    assert v["accuracy_change"] == pytest.approx(change.mean())
    assert v["accuracy_change[masked]"] == pytest.approx(change[left].mean())
    assert (v["total_questions[many]"], v["num_fewshot[many]"]) == (6, 0)
    assert sum(v[f"prediction_share_{letter}[many]"] for letter in "abcdefghij") == pytest.approx(1)
    assert v["correct_probability_change[many]"] is not None
    assert "accuracy_stem[many]" not in v
    assert "prediction_share_e" not in v
    plan.store.write_tables([row], ROW_COLUMNS)
    table = load_results(plan.store.root)
    assert table["total_questions[many]"].dtype == "Int64"
    assert table["mmlu_note[many]"].dtype == "string"
    assert list(table.columns[: len(ROW_COLUMNS)]) == ROW_COLUMNS


def test_what_one_set_was_asked_is_kept_when_the_next_one_is_killed(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    sets = further_sets(tmp_path)
    plan = planned(options, **sets, stages=("train", "mmlu"))
    (experiment,) = plan.experiments
    runner = ExperimentRunner(plan.config, plan.store)

    def stop(stage, done, total) -> None:
        if plan.store.scores_path(experiment).is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(experiment, stop)
    first = plan.store.scores_path(experiment).stat().st_mtime_ns
    assert runner.run(experiment).ok
    assert plan.store.scores_path(experiment).stat().st_mtime_ns == first
    assert plan.store.scores_path(experiment, "many").is_file()
    again = planned(options, **sets, stages=("train", "mmlu"))
    assert again.done()
    (tmp_path / "mask.json").write_text(json.dumps(json.loads((tmp_path / "mask.json").read_text())[:1]))
    (changed,) = planned(options, **sets, stages=("train", "mmlu")).experiments
    assert plan.store.why_not_done(changed, "mmlu") == "mask changed"
    plan.store.forget_stage(experiment, "mmlu")
    with pytest.raises(MachineError, match=r"mask\.json: not what it was when the run began"):
        ExperimentRunner(plan.config, plan.store).run(experiment)
    row = ExperimentRunner(plan.config, plan.store).run(changed)
    assert row.values["total_questions[masked]"] == 19
    assert plan.store.scores_path(experiment).stat().st_mtime_ns == first, "asked again for a mask"


@pytest.mark.slow
@pytest.mark.ci
def test_trainings_of_one_dataset_with_other_seeds_measure_its_features_once(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, repeats=2)
    first, second = (ExperimentRunner(plan.config, plan.store).run(e).values for e in plan.experiments)
    assert {first["seed"], second["seed"]} == {0, 1}
    assert {name: first[name] for name in FEATURE_NAMES} == {name: second[name] for name in FEATURE_NAMES}
    assert first["probe_seconds"] > 0
    assert second["probe_seconds"] is None, "its time is in the row that measured"
    assert first["train_final_loss"] != second["train_final_loss"]
    assert first["base_overall_accuracy"] == second["base_overall_accuracy"]
    alone = ExperimentRunner(*(lambda p: (p.config, p.store))(planned(options, output=tmp_path / "alone")))
    row = alone.run(*planned(options, output=tmp_path / "alone").experiments).values
    of_seed_0 = first if first["seed"] == 0 else second
    for name in (*FEATURE_NAMES, "train_final_loss", "overall_accuracy"):
        assert row[name] == of_seed_0[name], name


def test_a_worker_trains_while_another_measures_the_features(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, repeats=2, stages=("features", "train"))
    one, other = plan.experiments
    assert ExperimentRunner(plan.config, plan.store).run(one).ok
    (path,) = plan.store.root.glob("base/*/features.json")
    stages = []
    lock = plan.store.base_lock(path.parent.name, "features")

    def progress(stage, done, total) -> None:
        stages.append(stage)
        if stage == "train":  # it has not waited, and can finish when the other one has
            lock.release(force=True)

    with lock:
        row = ExperimentRunner(plan.config, plan.store).run(other, progress)
    assert row.ok
    assert "train" in stages
    assert row.values["avg_grad_norm"] is not None


def error_kind_of(options, **more) -> str:
    """What a run of the one dataset, with these options, has in its row."""
    plan = planned(options, **more)
    row = ExperimentRunner(plan.config, plan.store).run(*plan.experiments)
    assert row.values["status"] == ("error" if row.values["error"] else "ok")
    return row.values["error_kind"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (None, {}),
        ("diverged", {"learning_rate": 9.0, "max_grad_norm": 1e30, "lora_alpha": 1e30}),
        ("adapter", {"stages": ("mmlu",)}),
    ],
)
def test_a_row_says_what_kind_of_error_it_has(options, tmp_path, kind, more):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    assert error_kind_of(options, **{"stages": ("train",), **more}) == kind


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("data", b""),
        ("truncated_file", b'[{"question": "Q", "answer": "A"}, {"quest'),
        ("not_utf8", b'[{"question": "\xff", "answer": "A"}]'),
        ("bad_records", b'[{"foo": "bar"}]'),
        ("data", b'[{"question": "Q" "answer": "A"}]'),
    ],
)
def test_the_plan_knows_the_kind_of_a_bad_file(options, tmp_path, kind, content):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    (tmp_path / "data" / "chunk_1" / "data.json").write_bytes(content)
    (experiment,) = planned(options).experiments
    assert experiment.error_kind == kind
    assert error_kind_of(options) == kind


def test_a_model_that_cannot_be_loaded_is_the_machines_fault_and_of_that_kind(options, tmp_path, tiny_model_folder):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    plan = planned({**options, "model": str(model), "adapters_a_pass": 2})
    (model / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(MachineError, match="cannot be loaded") as raised:
        ExperimentRunner(plan.config, plan.store).run(*plan.experiments)
    assert raised.value.kind is ErrorKind.MODEL
    assert train_together(Workbench(plan.config, plan.store), plan.experiments * 2) == 0


@pytest.mark.slow
@pytest.mark.ci
def test_files_that_somebody_took_away_or_cut_are_made_again(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, stages=("train", "mmlu"))
    (experiment,) = plan.experiments
    first = ExperimentRunner(plan.config, plan.store).run(experiment).values
    adapter = plan.store.adapter_folder(experiment)
    (base,) = plan.store.root.glob("base/*/scores.parquet")
    for harm in (
        (adapter / "adapter_model.safetensors").unlink,
        lambda: (adapter / "adapter_config.json").write_text(""),
        lambda: base.write_bytes(b""),
        lambda: base.with_name("questions.parquet").write_bytes(base.read_bytes()[:100]),
    ):
        harm()
        plan.store.forget_stage(experiment, "mmlu")
        again = ExperimentRunner(plan.config, plan.store).run(experiment).values
        assert again["status"] == "ok"
        for name in ("overall_accuracy", "base_overall_accuracy", "train_final_loss"):
            assert again[name] == pytest.approx(first[name])


def test_a_dataset_that_is_gone_or_changed_since_the_plan_gives_no_row(tmp_path, tiny_model_folder, loaded):
    write_dataset(tmp_path / "data", "a")
    file = tmp_path / "data" / "a.json"
    config = load_config(model=str(tiny_model_folder), output=tmp_path / "out", **OPTIONS)
    plan = make_plan(config, [file], "single")
    (experiment,) = plan.experiments
    bench = Workbench(config, plan.store, loaded)
    was = file.read_text()
    for now, why in ((was.replace("What", "Why"), "not what it was when the run began"), (None, "No such file")):
        file.unlink()
        if now is not None:
            file.write_text(now)
        with pytest.raises(MachineError, match=why):
            run_experiment(bench, experiment)
        assert plan.store.read_row(experiment) is None


@pytest.mark.parametrize("rate", [1e-3, 0.0])
def test_an_adapter_that_is_what_it_was_is_no_good_row_without_a_word(options, tmp_path, capsys, rate):
    """Sixteen examples at one epoch are one step: it trains, and at rate 0 the row, the lines and the report say so."""
    write_dataset(tmp_path / "data" / "chunk_1", "data", num=16)
    default = {"batch_size": 4, "gradient_accumulation": 4, "num_epochs": 1, "learning_rate": rate}
    plan = planned(options, stages=("train", "mmlu"), **default)
    (experiment,) = plan.experiments
    row = ExperimentRunner(plan.config, plan.store).run(experiment)
    note = row.values["train_notes"]
    weights = load_file(plan.store.adapter_folder(experiment) / "adapter_model.safetensors")
    trained = any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name)
    assert row.values["num_train_steps"] == 1
    assert trained == (rate > 0) == (not note)
    plan.store.write_tables([row], ROW_COLUMNS)
    print_results([row], plan.store)
    assert ("the model is the base" in capsys.readouterr().out) == (rate == 0)
    assert ("the model is the base" in describe(row)) == (rate == 0)
    table = load_results(plan.store.root)
    assert table["train_notes"].tolist() == [note]
    if rate == 0:
        assert row.values["accuracy_change"] == 0


@pytest.mark.parametrize(
    ("name", "more", "without"),
    [
        ("gpt2", {}, ""),
        ("mixtral", {}, ",".join(EXPERTS)),
        ("mixtral", {"target_modules": EXPERTS, "lora_dropout": 0.0}, "q_proj,k_proj,v_proj,o_proj"),
    ],
)
def test_models_whose_layers_have_other_names_give_good_rows(options, tmp_path, name, more, without):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, model=str(save_family(name, tmp_path / name)), num_epochs=1, probe_steps=1, **more)
    row = ExperimentRunner(plan.config, plan.store).run(plan.experiments[0])
    assert row.ok, row.values["error"]
    assert row.values["modules_without_adapter"] == without
    assert row.values["relative_weight_update"] > 0
    assert row.values["estimated_peak_memory_bytes"] > 0
    assert row.values["overall_accuracy"] >= 0


ODD_RECORDS = {
    "texts": ([{"text": f"Text {i} of many words."} for i in range(8)], "text", ""),
    "tools": (
        [
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?", "at": i},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": f'{{"n": {i}}}'}}]},
                    {"role": "tool", "content": f"It is {i}."},
                    {"role": "assistant", "content": f"It is {i}, they say."},
                ],
                "tools": [{"name": "look"}],
            }
            for i in range(8)
        ],
        "messages",
        "messages[].at",
    ),
    "weights": (
        [
            {
                "conversations": [
                    {"from": "human", "value": f"What is {i}?"},
                    {"from": "gpt", "value": "Nobody knows.", "weight": 0},
                    {"from": "human", "value": "Sure?"},
                    {"from": "gpt", "value": f"It is {i}."},
                ]
            }
            for i in range(8)
        ],
        "conversations",
        "",
    ),
}


@pytest.mark.parametrize("train_on", ["answer", "all"])
@pytest.mark.parametrize("name", ODD_RECORDS)
def test_texts_tools_and_turns_not_to_be_learned_give_good_rows(options, tmp_path, name, train_on):
    records, form, ignored = ODD_RECORDS[name]
    (tmp_path / "data" / "chunk_1").mkdir(parents=True)
    (tmp_path / "data" / "chunk_1" / "data.json").write_text(json.dumps(records))
    plan = planned(options, stages=("features", "train"), train_on=train_on)
    (experiment,) = plan.experiments
    values = ExperimentRunner(plan.config, plan.store).run(experiment).values
    assert (values["status"], values["num_examples"], values["num_bad_records"]) == ("ok", 8, 0), values["error"]
    assert (values["record_form"], values["ignored_keys"]) == (form, ignored)
    assert values["num_supervised_tokens"] > 8
    assert values["train_final_loss"] > 0
    assert values["static_valid_count"] == min(8, values["sample_size"])
    assert values["base_model_perplexity"] > 1


VARIANTS = {
    "rslora": {"lora_variant": "rslora", "rank_pattern": "q_proj=4"},
    "dora": {"lora_variant": "dora", "target_modules": "q_proj,v_proj"},
    "whole": {"modules_to_save": "lm_head", "bias": "all"},
    "pissa": {"init": "pissa", "lora_variant": "dora"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva"},
}


@pytest.mark.parametrize(
    "name", [n if n in {"dora", "whole"} else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]
)
def test_relatives_of_lora_are_scored_as_peft_has_them(options, tmp_path, tiny_model_folder, name):
    """With a plain experiment before and behind each, in one process: their numbers stay what they are alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from raylora.api import evaluate_mmlu_with_model
    from tests.helpers.tiny import make_tokenizer

    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plain = planned(options, probe_steps=2)
    plan = planned(options, probe_steps=2, **VARIANTS[name])
    (experiment,), (other,) = plan.experiments, plain.experiments
    assert experiment.experiment_id != other.experiment_id
    bench = Workbench(plan.config, plan.store)
    before = run_experiment(bench, other).values
    row = run_experiment(bench, experiment)
    assert row.ok, row.values["error"]
    v = row.values
    assert {k: v[k] for k in VARIANTS[name]} == VARIANTS[name]
    assert (v["adapter_forward"] == "raylora") == (name in {"rslora", "olora", "eva", "whole"})
    if name != "eva":  # which counts ranks, not parameters
        assert (v["num_trained_parameters"] > before["num_trained_parameters"]) == (name in {"whole", "pissa"})
    for feature in ("perplexity_change_rate", "avg_grad_norm", "relative_weight_update", "landscape_flatness"):
        assert v[feature] is not None
        assert v[feature] != before[feature]
    folder = plan.store.adapter_folder(experiment)
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    theirs = evaluate_mmlu_with_model(PeftModel.from_pretrained(model, folder).eval(), make_tokenizer(), "demo", 4, 20)
    ours = load_score(plan.store.scores_path(experiment)).questions
    names = [f"logprob_{letter}" for letter in "abcd"]
    np.testing.assert_allclose(ours[names], theirs["questions"][names], atol=1e-4)
    base = load_score(plan.store.base_file(experiment.base_key, "scores.parquet")).questions
    assert np.abs(ours[names] - base[names]).to_numpy().max() > 1e-4
    for stage in ("train", "mmlu", "features"):
        plain.store.forget_stage(other, stage)
    after = run_experiment(bench, other).values
    assert still(after) == still(before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_training_goes_on_from_an_adapter(options, tmp_path, tiny_model_folder, kind):
    """Without a learning rate it is that adapter; its content, not its place, is in the experiment's identity."""
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    more = {"lora_variant": kind, "rank_pattern": "q_proj=2", "target_modules": "q_proj,v_proj", "lora_r": 4}
    first = planned(options, stages="train,mmlu", **more)
    (experiment,) = first.experiments
    assert ExperimentRunner(first.config, first.store).run(experiment).ok
    folder = shutil.copytree(first.store.adapter_folder(experiment), tmp_path / "first")
    going_on = {**options, "stages": "train,mmlu", "init_adapter": str(folder)}
    still_one = planned(going_on, learning_rate=0)
    (same,) = still_one.experiments
    row = ExperimentRunner(still_one.config, still_one.store).run(same)
    assert row.ok, row.values["error"]
    v = row.values
    assert (v["lora_r"], v["rank_pattern"], v["lora_variant"]) == (4, "q_proj=2", kind)
    assert {*v["target_modules"].split(",")} == {"q_proj", "v_proj"}
    assert v["init_adapter"] == str(folder)
    kept = load_file(still_one.store.adapter_folder(same) / "adapter_model.safetensors")
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(value, kept[key])
    scores = [load_score(p.store.scores_path(e)) for p, e in ((first, experiment), (still_one, same))]
    names = [f"logprob_{letter}" for letter in "abcd"]
    np.testing.assert_allclose(*(score.questions[names] for score in scores), atol=1e-6)
    plan = planned(going_on)
    (trained,) = plan.experiments
    row = ExperimentRunner(plan.config, plan.store).run(trained)
    assert row.ok, row.values["error"]
    assert row.values["train_initial_loss"] < v["train_initial_loss"] + 1e-6
    (moved,) = planned({**going_on, "init_adapter": str(shutil.copytree(folder, tmp_path / "moved"))}).experiments
    assert moved.identity == trained.identity
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, folder / "adapter_model.safetensors")
    (other,) = planned(going_on).experiments
    assert other.experiment_id != trained.experiment_id
    plan.store.forget_stage(trained, "train")
    with pytest.raises(MachineError, match="first: not what it was when the run began"):
        ExperimentRunner(plan.config, plan.store).run(trained)
