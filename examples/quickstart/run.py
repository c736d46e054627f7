"""The quickstart: validate, fine-tune, and hold the tuned model beside its base on messages it never saw.

    python examples/quickstart/run.py [OUTPUT_DIR]

Exits with 1 when the result is not what the README promises.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from grade import Result, grade
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "config.yaml"
BASE_AT_MOST, TUNED_AT_LEAST = 0.10, 0.80
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    output = new_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("quickstart-output"))
    hyperion("validate", str(CONFIG))
    began = time.monotonic()
    hyperion("train", str(CONFIG), "--output_dir", str(output))
    minutes = (time.monotonic() - began) / 60
    rows = [json.loads(line) for line in (HERE / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    base, tuned = answers(output, rows)
    before, after = grade(rows, base), grade(rows, tuned)
    show_samples(rows, base, tuned, after)
    show_scores(before, after)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    console.print(f"trained in {minutes:.1f} minutes, {memory:.1f} GiB at the peak; everything is in {output}/")
    console.print(f"loss curve: {output / 'loss.png'}    model card: {output / 'README.md'}")
    (output / "quickstart.json").write_text(
        json.dumps(
            {"base": before.exact, "tuned": after.exact, "items": after.total, "minutes": minutes, "gib": memory}
        )
    )
    if before.exact > BASE_AT_MOST or after.exact < TUNED_AT_LEAST:
        console.print(f"[red]expected: base at most {BASE_AT_MOST:.0%}, tuned at least {TUNED_AT_LEAST:.0%}[/red]")
        return 1
    return 0


def new_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that is free: a run never overwrites another."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def hyperion(*arguments: str) -> None:
    """One command, as you would type it."""
    console.print(f"[bold]$ hyperion {' '.join(arguments)}[/bold]")
    finished = subprocess.run([sys.executable, "-m", "hyperion", *arguments])
    if finished.returncode:
        sys.exit(finished.returncode)


def answers(output: Path, rows: list[dict]) -> tuple[list[str], list[str]]:
    """What the base and the tuned model answer, greedily, to every row's messages but the last."""
    from hyperion.models import load_tuned

    tuned = load_tuned(output)
    prompts = [
        tuned.tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    found = []
    for name, use_adapter in (("base", False), ("tuned", True)):
        tuned.use_adapter(use_adapter)
        found.append(generate(tuned.model, tuned.tokenizer, prompts, name))
    return found[0], found[1]


def generate(model, tokenizer, prompts: list[str], name: str, batch: int = 32, most: int = 48) -> list[str]:
    """Greedy answers, in batches padded on the left."""
    import torch
    from rich.progress import track

    texts = []
    for start in track(range(0, len(prompts), batch), description=f"asking the {name} model", console=console):
        inputs = tokenizer(
            prompts[start : start + batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def show_samples(rows: list[dict], base: list[str], tuned: list[str], after: Result, most: int = 3) -> None:
    """A few messages with both answers; one that the tuned model got wrong, if there is one."""
    wrong = [index for index, right in enumerate(after.correct) if not right]
    chosen = [*range(most), *wrong[:1]]
    table = Table("message", "base", "tuned", "", show_lines=True)
    for index in dict.fromkeys(chosen):
        mark = "[green]right[/green]" if after.correct[index] else "[red]wrong[/red]"
        table.add_row(rows[index]["messages"][-2]["content"], base[index].strip(), tuned[index].strip(), mark)
    console.print(table)


def show_scores(before: Result, after: Result) -> None:
    """Accuracy on the held-out messages, side by side."""
    table = Table(f"{after.total} held-out messages", "base", "tuned")
    table.add_row("exactly right", f"{before.exact:.1%}", f"[bold]{after.exact:.1%}[/bold]")
    table.add_row("valid JSON", f"{before.valid_json:.1%}", f"{after.valid_json:.1%}")
    for field in after.fields:
        table.add_row(f"{field} right", f"{before.fields[field]:.1%}", f"{after.fields[field]:.1%}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
