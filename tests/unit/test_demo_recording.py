"""docs/pictures/demo.svg: self-contained, and up to date with what `make demo` prints. `make recording` rewrites it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree as ET

from rich.console import Console

from tests.demo.cluster import SERVICE, TARGET_PORT, DemoCluster
from tests.demo.recording import ROWS, frames, render
from tests.demo.screen import Screen
from tests.demo.steps import run
from tests.lab.client import Answered, Outcome

PICTURE = Path(__file__).parents[2] / "docs/pictures/demo.svg"
SVG = "{http://www.w3.org/2000/svg}"
LIMIT = 60_000


class FakeDemoCluster:
    """A DemoCluster without namespaces, processes or rules. Ready pods answer in turn, without delay."""

    def __init__(self) -> None:
        self.node, self.client = host("node-1", "10.99.0.2"), host("client", "10.244.1.100")
        self._requests = count()
        self._ready: Sequence[Any] = ()

    def add_pod(self, name: str, address: str) -> Any:
        return host(name, address)

    def stop_pod(self, pod: Any) -> None:
        pass

    def write_service(self) -> None:
        pass

    def write_endpoints(self, ready: Sequence[Any], terminating: Sequence[Any] = ()) -> None:
        self._ready = tuple(ready)

    def start_kproxy(self) -> tuple[Any, float]:
        return SimpleNamespace(command="kproxy run"), 0.5

    def request(self) -> Outcome:
        pods = self._ready
        return Answered(pods[next(self._requests) % len(pods)].name, "10.244.1.100")

    def dump(self) -> str:
        return f'-A KUBE-SERVICES -m comment --comment "{SERVICE}:main cluster IP"\n'

    def time_until_programmed(self, change: Callable[[], None], pod: Any, *, present: bool) -> float:
        change()
        return 0.5


def host(name: str, address: str) -> Any:
    return SimpleNamespace(name=name, address=lambda: address)


class TextScreen(Screen):
    """A screen that records the text of the demo, without bars, rules and the daemon's command line."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.steps: list[str] = []
        self.texts: list[str] = []

    def heading(self, text: str) -> None:
        self.texts.append(text)

    def step(self, text: str) -> None:
        self.steps.append(text)

    def line(self, text: str, style: str = "") -> None:
        if not text.startswith("$ "):
            self.texts.append(text)

    def result(self, passed: bool, text: str) -> None:
        assert passed
        self.texts.append(f"ok: {text}")


def run_demo() -> TextScreen:
    screen = TextScreen()
    assert run(cast("DemoCluster", FakeDemoCluster()), screen)
    return screen


def picture_lines(document: str) -> list[str]:
    """Return the text of a picture, line by line."""
    lines: dict[float, str] = {}
    for piece in ET.fromstring(document).iter(f"{SVG}text"):
        height = float(piece.attrib["y"])
        lines[height] = lines.get(height, "") + (piece.text or "").replace("\u00a0", " ")
    return [lines[height] for height in sorted(lines)]


def normalized(text: str) -> str:
    """Return a text without white space and with all numbers replaced by 0, to compare output of different runs."""
    return re.sub(r"\s+", "", re.sub(r"\d+", "0", text))


def test_picture_has_the_steps_of_the_demo() -> None:
    steps = [match[1] for line in picture_lines(PICTURE.read_text()) if (match := re.match(r"\d+\. (.*)", line))]
    expected = run_demo().steps
    assert expected
    assert steps == expected, "the demo's steps have changed: run `make recording`"


def test_picture_has_the_output_of_the_demo() -> None:
    picture = normalized("".join(picture_lines(PICTURE.read_text())))
    texts = run_demo().texts
    assert any(str(TARGET_PORT) in line for line in texts)
    missing = [line for line in texts if normalized(line) not in picture]
    assert missing == [], "the demo's output has changed: run `make recording`"


def test_picture_is_small_and_self_contained() -> None:
    document = PICTURE.read_text()
    assert len(document.encode()) < LIMIT
    names = {element.tag.removeprefix(SVG) for element in ET.fromstring(document).iter()}
    assert names <= {"svg", "title", "style", "g", "rect", "text"}
    (style,) = (element.text or "" for element in ET.fromstring(document).iter(f"{SVG}style"))
    assert re.findall(r"url\(|@import|@font-face", style) == []
    attributes = [name for element in ET.fromstring(document).iter() for name in element.attrib]
    assert [name for name in attributes if "href" in name or name.startswith("on")] == []


def test_colors_and_special_characters_are_rendered() -> None:
    document = render("\x1b[1;32m1. \x1b[0mA <b> & \u2588\n")
    assert picture_lines(document) == ["$ make demo", "1. A <b> & \u2588"]
    assert len(set(re.findall(r'class="(.*?)"', document))) == 3


def test_long_lines_are_wrapped_and_indented() -> None:
    lines = picture_lines(render("   " + " ".join(["word"] * 40)))[1:]
    assert len(lines) == 3
    assert [line[:6] for line in lines] == ["   wor", "     w", "     w"]


def test_every_step_is_a_frame_and_the_last_lines_stay_visible() -> None:
    lines = ["$", "", "intro", "", "1. a", "x", "", *["2. b"], *["y"] * ROWS]
    recorded = frames(lines)
    assert [frame.lines for frame in recorded] == [1, 4, 7, len(lines)]
    assert [frame.scrolled for frame in recorded] == [0, 0, 0, len(lines) - ROWS]
    assert all(frame.seconds > 1 for frame in recorded)
