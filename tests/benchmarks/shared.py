"""What the benchmarks share: processes of their own, Trainer, the machine, tables, files."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
THREADS, BATCH, REPEATS = 2, 32, 5
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SCRATCH = tempfile.TemporaryDirectory(prefix="benchmark-")  # goes with the process


def apart(script: str, *given: str) -> dict[str, Any]:
    """The last line that `script` prints in a process of its own, read as JSON."""
    command = [sys.executable, script, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    import torch

    from healing_utils.study.study import PACKAGES, version

    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    return {
        "processor": gpu or torch.cpu.get_capabilities().get("cpu_name", "unknown"),
        "versions": {name: version(name) for name in PACKAGES}, "threads": THREADS,
    }  # fmt: skip


def seconds_of(work: Callable[[], object]) -> float:
    """With the GPU, where there is one, idle before and after."""
    import torch

    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def matrix_rate(precision: str = "float32") -> float:
    """GFLOP/s of one large product, 2048³ on a CPU with the current threads and 8192³ on a GPU, the
    best of ten."""
    import torch

    from healing_utils.healing.training import pick_device

    device = pick_device()
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, precision))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(10)) / 1e9


def trainer(model: Any, data: Any, tokenizer: Any = None, pad: int = 0, **setting: Any) -> Any:
    """transformers' Trainer on `data`, an `Encoded`, whose examples are padded to `pad` tokens."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    arguments = TrainingArguments(
        SCRATCH.name, per_device_train_batch_size=BATCH, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True, **setting,
    )  # fmt: skip
    rows = []
    for ids, label in zip(data.ids, data.labels, strict=True):
        fill = max(0, pad - len(ids))
        mask, ids = [1] * len(ids) + [0] * fill, ids + [data.pad[0]] * fill
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": int(label)})
    collator = tokenizer and DataCollatorWithPadding(tokenizer)
    return Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collator
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown: names on the left, numbers on the right."""
    lines = [" | ".join(row) for row in (head, *rows)]
    rule = "---|" + "---:|" * (len(head) - 1)
    return "\n".join(f"| {line} |" for line in lines).replace(" |\n", f" |\n|{rule}\n", 1) + "\n"


def write(name: str, result: Any, *paragraphs: str) -> None:
    """``NAME.json``, and ``NAME.md`` of the paragraphs, beside this file."""
    text = "\n\n".join(paragraph.strip() for paragraph in paragraphs) + "\n"
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / f"{name}.md").write_text(text)
    print("\n" + text)
