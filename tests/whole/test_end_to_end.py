"""The real model on real questions and real datasets, quantized."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

SMALL = ["--max-records", "8", "--max-samples", "19", "--num-epochs", "1", "--sample-size", "8", "--probe-steps", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_real_chunk_with_the_real_model(smollm2, shared_data, tmp_path, quantization):
    command = [
        sys.executable, "-m", "raylora.batch", "--chunk", "chunk_001", "--data-root", str(shared_data), "--limit", "2",
        "--mmlu", str(shared_data / "mmlu" / "test_all_subjects.json"), "--model", "demo",
        "--quantization", quantization, "--num-workers", "2", "--threads", "1", "--output", str(tmp_path), *SMALL,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_parquet(tmp_path / "chunk_001" / "results.parquet")
    assert len(table) == 2
    assert (table["status"] == "ok").all()
    assert (table["total_questions"] == 19).all()
    assert (table["quantization"] == quantization).all()
    assert table["train_final_loss"].between(0.1, 6).all()
    assert table["reference_perplexity"].between(2, 500).all()
    assert table["train_initial_loss"].nunique() == 2
