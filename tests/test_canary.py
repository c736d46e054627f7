"""Secrets of the environment go nowhere: no log, artifact, plan, card, cache or error shows them."""

from __future__ import annotations

import http.server
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hyperion_core.artifact import Artifact, read_json, write_json
from hyperion_core.errors import ConfigError, ModelError, Problem
from hyperion_core.plan import Choice, Plan
from hyperion_core.secrets import RedactedStream, hide_in_logs, redacted
from hyperion_core.testing.fixtures import Command, CommandResult, FakeDistributions

from hyperion.cli.json_output import print_json
from hyperion.config import FinetuneConfig
from hyperion.governance.model_card import model_card

SECRETS = {
    "HF_TOKEN": "canary-hub-7f3a9c",
    "WANDB_API_KEY": "canary+wandb/55e1==",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/0b7d",
    "HYPERION_PASSWORD": "canary\u00e9password",
}
#: In the environment too, inside a URL.
IN_URL = "canary-url-2c4e"
ENVIRONMENT = {**SECRETS, "HTTPS_PROXY_OF_MINE": f"http://me:{IN_URL}@proxy.example"}

# A careless plugin: it logs, with a handler of its own too, and raises, all that it finds in the environment.
CARELESS = """
import logging
import os
from hyperion_core.config import PluginConfig
from hyperion_core.kinds import Observer

def environment():
    return " ".join(f"{name}={value}" for name, value in os.environ.items())

log = logging.getLogger("hyperion.careless")
log.addHandler(logging.FileHandler("careless.log"))

class Careless(Observer):
    config_class = PluginConfig
    def run_start(self, plan, ctx):
        ctx.log.warning("started with %s", environment())
        log.warning("started with %s", environment())
        print(environment())
    def run_step(self, step, metrics, ctx):
        raise RuntimeError(environment())
"""
BROKEN = "import os\nraise RuntimeError(' '.join(os.environ.values()))\n"


def leaks(content: str | bytes) -> list[str]:
    data = content.encode() if isinstance(content, str) else content
    return [secret for secret in (*SECRETS.values(), IN_URL) if secret.encode() in data or _escaped(secret) in data]


def _escaped(secret: str) -> bytes:
    return json.dumps(secret)[1:-1].encode()


def assert_silent(done: CommandResult) -> None:
    assert not leaks(done.stdout), done.stdout
    assert not leaks(done.stderr), done.stderr


def config(folder: Path, base_model: str, **changes: object) -> str:
    rows = [{"prompt": f"{number} is", "completion": f" {number}"} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content = {
        "base_model": base_model,
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj"]},
        "dataset": {"dataset": "rows.jsonl", "validation_split": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "eval_samples": 1},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return "config.yaml"


@pytest.mark.slow
def test_a_run_leaves_no_secret_behind(
    cli: Command, fake_dist: FakeDistributions, tiny_model: Path, tmp_path: Path
) -> None:
    fake_dist(
        "acme-careless", {"hyperion.observers": {"careless": "acme_careless:Careless"}}, {"acme_careless": CARELESS}
    )
    name = config(tmp_path, str(tiny_model), plugins=["careless"])
    places = {"HYPERION_CACHE": "cache", "HF_DATASETS_CACHE": "cache/datasets", "HF_HOME": "cache/hf"}
    done = cli(
        "train", name, "-o", "out", env={**ENVIRONMENT, **{key: str(tmp_path / at) for key, at in places.items()}}
    )
    assert done.code == 0, done.stderr
    assert_silent(done)
    # What was to be hidden was really shown.
    assert "started with" in done.stderr
    assert "HF_TOKEN=***" in done.stderr
    assert "HF_TOKEN=***" in done.stdout
    assert "HF_TOKEN=***" in (tmp_path / "careless.log").read_text(encoding="utf-8")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"plan.json", "README.md", "hyperion.lock", "trainer_state.json"} <= {path.name for path in written}
    assert not {path: found for path in written if (found := leaks(path.read_bytes()))}


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": f"https://me:{IN_URL}@huggingface.co/owner/model"},
        {"dataset": f"https://me:{IN_URL}@example.com/rows.jsonl"},
        {"dataset": f"hf://{SECRETS['HF_TOKEN']}@datasets/owner/rows"},
        {"dtype": SECRETS["HF_TOKEN"]},
        {"dataset": {"dataset": "rows.jsonl", "format": "chat", "system": f"You are {SECRETS['WANDB_API_KEY']}."}},
        {"training": {"hub_model_id": f"owner/{SECRETS['HF_TOKEN']}"}},
    ],
    ids=["base_model", "dataset", "hub dataset", "dtype", "system", "hub_model_id"],
)
def test_a_secret_in_the_config_is_refused_and_not_repeated(
    cli: Command, tmp_path: Path, changes: dict[str, object]
) -> None:
    done = cli("validate", config(tmp_path, **{"base_model": "owner/model", **changes}), env=ENVIRONMENT)  # type: ignore[arg-type]
    assert done.code == 2, done.stdout
    assert "***" in done.stderr
    assert_silent(done)


@pytest.mark.parametrize("command", ["plugins list", "plugins info broken", "plugins doctor", "train config.yaml"])
def test_an_error_of_a_plugin_is_shown_without_secrets(
    cli: Command, fake_dist: FakeDistributions, tmp_path: Path, command: str
) -> None:
    fake_dist("acme-broken", {"hyperion.adapters": {"broken": "acme_broken:Broken"}}, {"acme_broken": BROKEN})
    config(tmp_path, "owner/model", adapter="broken")
    done = cli(*command.split(), env=ENVIRONMENT)
    assert "***" in done.stdout + done.stderr or command == "plugins list"
    assert_silent(done)


class Echo(http.server.BaseHTTPRequestHandler):
    """A hub that refuses everything, and says back what it was told."""

    def do_GET(self) -> None:
        told = self.headers.get("Authorization", "nothing")
        self.server.told.append(told)  # type: ignore[attr-defined]
        body = json.dumps({"error": f"you said {told}"}).encode()
        self.send_response(403)
        self.send_header("X-Error-Message", f"you said {told}")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.HTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.told = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


ASK = """
import pathlib, sys
from hyperion_core.errors import HyperionError
from hyperion.models.hub_commit import hub_commit
from hyperion.models.load import materialize
from hyperion.models.source import resolve_source
source = resolve_source("owner/model")
for ask in (lambda: materialize(source, pathlib.Path("cache"), print), lambda: hub_commit(source)):
    try:
        ask()
    except HyperionError as error:
        print(error)
"""


def test_a_server_that_says_the_token_back_is_quoted_without_it(hub: http.server.HTTPServer, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, cwd=tmp_path, capture_output=True,
                          encoding="utf-8", timeout=120, check=False)  # fmt: skip
    assert any(SECRETS["HF_TOKEN"] in told for told in hub.told)  # type: ignore[attr-defined]
    assert done.stdout.count("fix:") == 2, done.stdout + done.stderr
    assert not leaks(done.stdout + done.stderr)


# --- what is a secret ---


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("secrets")
def test_every_way_out_is_masked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = " ".join(SECRETS.values())
    assert not leaks(str(ModelError(text, why=text, fix=text)))
    assert not leaks(str(ConfigError([Problem("path", text, text, text)])))
    assert not leaks(write_json(tmp_path / "plan.json", {"said": text}).read_bytes())
    logging.getLogger("hyperion").warning("said: %s", text)
    assert caplog.messages == ["said: *** *** *** ***"]


@pytest.mark.usefixtures("secrets")
def test_loggers_below_ours_are_masked_for_their_own_handlers_too(capsys: pytest.CaptureFixture[str]) -> None:
    log, told = logging.getLogger("hyperion.canary.below"), io.StringIO()
    log.addHandler(handler := logging.StreamHandler(told))
    log.propagate = False  # pytest's own handler would raise where others tell
    try:
        hide_in_logs(logging.getLogger("hyperion"))
        log.warning("said: %s", SECRETS["HF_TOKEN"])
        log.warning("%d does not fit", "this")  # told as logging tells it, never raised
    finally:
        log.removeHandler(handler)
        log.propagate = True
    assert told.getvalue() == "said: ***\n"
    assert "does not fit" in capsys.readouterr().err


FIGURES = {"tokens": 12345678, "loss": 1.123456789, "said": "PIN 12345678", "each": [12345678, {"12345678": True}]}
MASKED = {**FIGURES, "said": "PIN ***", "each": [12345678, {"***": True}]}


@pytest.fixture
def pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that looks like the figures of a run."""
    monkeypatch.setenv("ACME_PASSWORD", "12345678")
    monkeypatch.setenv("ACME_TOKEN", "1.123456")


@pytest.mark.usefixtures("pin")
def test_a_secret_of_digits_takes_no_figure_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_json(write_json(tmp_path / "plan.json", FIGURES)) == MASKED
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", RedactedStream(shown))
    print_json(FIGURES)
    assert json.loads(shown.getvalue()) == MASKED


@pytest.mark.usefixtures("pin")
def test_the_model_card_keeps_its_figures_and_no_secret(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, {"type": "lora"}, {"eval_loss": 1.123456}, {"acme": "1"}, FIGURES)
    (tmp_path / "samples.jsonl").write_text(
        json.dumps({"step": 12345678, "prompt": "PIN?", "expected": "12345678", "generated": "12345678."}) + "\n"
    )
    plan = Plan({}, (Choice("adapter", "lora", "acme", "1", "installed"),), "cpu", "float32", {"pin": "12345678"},
                steps=12345678)  # fmt: skip
    card = model_card(artifact, plan, FinetuneConfig(base_model="owner/model", adapter="lora"))
    assert "| steps | 12345678 |" in card
    assert "| eval_loss | 1.12346 |" in card
    assert "| tokens | 12345678 |" in card
    assert "| loss | 1.123456789 |" in card
    assert "(step 12345678)" in card
    assert "| pin | *** |" in card
    assert "| said | PIN *** |" in card
    assert card.count("    ***") == 2  # of the sample


@pytest.mark.usefixtures("secrets")
def test_what_is_a_secret_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TOKENIZERS_PARALLELISM": "parallelism",
        "SHORT_TOKEN": "false",
        "HF_TOKEN_PATH": "where-it-lies",
        "SSH_KEY": "/home/me/.ssh/key",
        "MONKEY": "a-long-value",
    }.items():
        monkeypatch.setenv(name, value)
        assert redacted(f"<{value}>") == f"<{value}>"
    monkeypatch.setenv("LONGER_TOKEN", SECRETS["HF_TOKEN"] + "-and-more")
    assert redacted(f"<{SECRETS['HF_TOKEN']}-and-more>") == "<***>"
    assert redacted("a%2Fb canary%2Faws%2F0b7d") == "a%2Fb ***"
    assert redacted("https://me:word@host/x?at=a@b") == "https://***@host/x?at=a@b"
    assert redacted("Authorization: Bearer abcdefgh.ijkl") == "Authorization: Bearer ***"
    assert redacted("hf_abcdefghijklmnopqrstuvwx sk-1") == "*** sk-1"
    assert redacted("package://module/file@home") == "package://module/file@home"
