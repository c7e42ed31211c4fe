"""A stage is done when everything that it makes is there."""

from __future__ import annotations

from raylora.storage.store import Store
from tests.helpers.pool import make_experiment


def test_a_product_that_was_taken_away_is_made_again(tmp_path):
    store, one = Store(tmp_path), make_experiment("one")
    folder = store.folder(one)
    (folder / "adapter").mkdir(parents=True)
    files = [folder / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for file in (*files, folder / "loss_curve.csv"):
        file.write_text("what a training makes")
    store.write_stage(one, "train", {"train_loss": 1.0})
    assert store.read_stage(one, "train") == {"train_loss": 1.0}
    assert store.why_not_done(one, "train") == ""
    files[0].write_text("")
    files[1].unlink()
    assert store.read_stage(one, "train") is None
    assert store.why_not_done(one, "train") == "adapter/adapter_config.json, adapter/adapter_model.safetensors missing"
