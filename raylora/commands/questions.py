"""The questions of a benchmark, from the Hugging Face hub, in the files where raylora looks for them.

raylora questions mmlu    # mmlu_dataset/test_all_subjects.json, and dev_all_subjects.json beside it for --num-fewshot
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from raylora.commands.options import QuestionsConfig
from raylora.errors import ErrorKind, UserError, one_line
from raylora.mmlu.questions import load_questions
from raylora.storage.atomic import write_text
from raylora.texts import shown_line

REPOSITORY = "cais/mmlu"
SPLITS = ("test", "dev")


def run_mmlu(config: QuestionsConfig) -> int:
    """Write both splits of MMLU (14,042 and 285 questions), with the hub's own words and order.

    Raises:
        UserError: the hub cannot be reached, or what it gives is not what is expected.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it says each of its retries
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS:
            found = load_questions(_download(f"all/{split}-00000-of-00001.parquet", config.revision, folder))
            rows = [
                {"question": q.question, "choices": q.choices, "answer": q.answer, "subject": q.subject} for q in found
            ]
            path = config.output / f"{split}_all_subjects.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(rows, ensure_ascii=False))
            except OSError as error:
                raise UserError(f"--output {config.output}: {error.strerror}") from error
            print(shown_line(f"{path}: {len(rows)} questions of {len({q.subject for q in found})} subjects"))
    return 0


def _download(name: str, revision: str, folder: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=revision, local_dir=folder))
    except LocalEntryNotFoundError as error:
        text = f"{REPOSITORY}: the hub cannot be reached: {one_line(error.__cause__ or error)}"
        raise UserError(text, kind=ErrorKind.QUESTIONS) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{REPOSITORY}, revision {revision}: {one_line(error)}", kind=ErrorKind.QUESTIONS) from error
