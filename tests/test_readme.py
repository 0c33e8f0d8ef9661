"""The README is executed: every block of shell and Python, in order, as a reader would."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
SCRATCH = ("embedding.f32", "request.bin", "answer.json", "request.json", "sheet.png", "my-models")
# The lines of the two blocks that are more than one command to run and wait for.
DEMO = next(text for _, text in BLOCKS if "make demo" in text)
SERVE = next(text for _, text in BLOCKS if "make serve" in text)


@pytest.fixture(scope="module")
def _served() -> Iterator[None]:
    """`make serve`, as the README says, until its tests are over."""
    with subprocess.Popen(
        SERVE, shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            for line in process.stdout or ():
                if line.startswith("Ready"):
                    break
            else:
                pytest.fail(f"`make serve` ended with {process.wait()}: are its ports in use?")
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
            for name in SCRATCH:
                path = ROOT / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run(text: str, language: str = "sh") -> str:
    shell = ["bash", "-euo", "pipefail", "-c"]
    command = [*shell, text] if language == "sh" else [ROOT / ".venv/bin/python", "-c", text]
    path = f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def has_buf() -> bool:
    """Whether Node.js is here and can get the tool of the README's example."""
    if shutil.which("npx") is None:
        return False
    command = ["npx", "--yes", "@bufbuild/buf@1", "--version"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.timeout(1800)  # a first demo installs and builds everything
def test_make_demo() -> None:
    assert "make demo" in DEMO
    said = run("make demo")
    assert "Ready: every model has answered" in said
    assert len(re.findall(r"^\$ vit-client (classify|embed|features) ", said, re.M)) == 3
    (right,) = re.findall(r"^Right: (\d+) of 360 images that it was not trained on$", said, re.M)
    assert int(right) > 342
    with Image.open(ROOT / "demo.png") as sheet:
        assert sheet.mode == "RGB"
    assert "The server has stopped" in said


@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize(
    ("language", "text"),
    [
        pytest.param(language, text, id=text.strip().splitlines()[0][:50])
        for language, text in BLOCKS
        if text not in (DEMO, SERVE)
    ],
)
def test_block(language: str, text: str) -> None:
    if "npx" in text and not has_buf():
        text = text.partition("npx ")[0]
    run(text, language)


def test_every_link_leads_somewhere() -> None:
    for path in ROOT.glob("**/README.md"):
        if any(part.startswith(".venv") for part in path.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path}: {target}"
