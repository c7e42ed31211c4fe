"""What the folder of an adapter says before it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest

from raylora.errors import UserError
from raylora.model.adapter_files import adapter_hash, check_adapter, is_plain_lora, note_on_base, overwritten_by
from tests.helpers.adapters import PROMPT_KINDS, save_kind


def with_config(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return folder


def test_raylora_s_own_adapter_is_plain_lora(adapter_folder):
    check_adapter(adapter_folder)
    assert is_plain_lora(adapter_folder)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("plain", True),
        ("ranks", True),
        ("bias of all", False),
        ("modules to save", False),
        ("DoRA", False),
        ("IA3", False),
    ],
)
def test_what_has_more_than_a_and_b_is_not_plain(tmp_path, name, plain):
    assert is_plain_lora(save_kind(name, tmp_path / "adapter")) == plain


def test_what_loading_writes_over_is_known(tmp_path):
    biases = overwritten_by(save_kind("bias of LoRA's", tmp_path / "bias"))
    assert {name for name in biases if name.endswith(".bias")} == {
        f"model.layers.{i}.self_attn.{of}_proj.bias" for i in (0, 1) for of in "qv"
    }
    assert "model.layers.1.self_attn.v_proj.weight" in overwritten_by(save_kind("OLoRA", tmp_path / "olora"))
    assert "lm_head.weight" not in overwritten_by(save_kind("modules to save", tmp_path / "saved")), (
        "beside the original"
    )


@pytest.mark.parametrize("name", PROMPT_KINDS)
def test_kinds_outside_of_the_layers_are_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=f"adapter: is {name}"):
        check_adapter(save_kind(name, tmp_path / "adapter"))


@pytest.mark.parametrize(("file", "content"), [("adapter_config.json", "{"), ("adapter_config.json", "[]")])
def test_a_damaged_file_is_one_line(adapter_folder, tmp_path, file, content):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        check_adapter(folder)


def test_damaged_weights_are_one_line(adapter_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"\x01")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: cannot be read"):
        is_plain_lora(folder)


def test_the_hash_is_of_weights_and_options(adapter_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    assert adapter_hash(folder) == adapter_hash(adapter_folder)
    assert adapter_hash(with_config(folder, lora_alpha=1)) != adapter_hash(adapter_folder)


@pytest.mark.parametrize(
    ("trained_on", "source", "warns"),
    [
        ("org/Model-1B", "/data/models/model-1b", False),
        ("/gone/model-1b/", "/data/models/model-1b", False),
        ("org/model-1b", "/root/.cache/huggingface/hub/models--org--Model-1B/snapshots/0a1b", False),
        ("", "/data/model", False),
        (None, "/data/model", False),
        ("org/model-1b", "/data/models/model-3b", True),
        ("/gone/model", "org/other", True),
    ],
)
def test_another_base_is_noted_by_its_name(adapter_folder, tmp_path, trained_on, source, warns):
    folder = with_config(shutil.copytree(adapter_folder, tmp_path / "adapter"), base_model_name_or_path=trained_on)
    note = note_on_base(folder, source)
    assert bool(note) == warns
    assert not warns or (trained_on in note and source in note)


def test_folders_that_are_there_are_compared_by_content(adapter_folder, tiny_model_folder, tmp_path):
    copied = shutil.copytree(tiny_model_folder, tmp_path / "another_name")
    assert note_on_base(adapter_folder, str(copied)) == ""
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert "was trained on" in note_on_base(adapter_folder, str(copied))
