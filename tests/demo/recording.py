"""Record `make demo` as an animated SVG: `python -m tests.demo.recording FILE`, or `make recording`.

The script runs the real demo and renders its output with Rich. The animation adds one step at a time, at reading speed
rather than in real time. The file refers to no external font, style sheet or script, so a page can embed it as an
image. Viewers without animation, and readers who prefer reduced motion, see the last frame.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

PROMPT = "$ make demo"
COLUMNS, ROWS = 100, 34
INDENT = "     "
PADDING = 14
SECONDS_PER_STEP = 1.2
SECONDS_PER_LINE = 0.2
SECONDS_AT_END = 6.0
ASPECT_RATIO = 0.6
"""Width of a character by its height, in most monospace fonts."""

DESCENT = 2
"""Pixels that letters such as g and y may reach into the next line."""

_SEPARATOR = "\x1e"
_PARTS = _SEPARATOR.join(("{styles}", "{matrix}", "{terminal_width}", "{line_height}"))
"""What is taken from Rich's export; its own frame refers to web fonts by URL."""

_STEP = re.compile(r"\d+\. ")


@dataclass(frozen=True)
class Frame:
    """The first `lines` lines of the output, shown for `seconds`."""

    lines: int
    seconds: float

    @property
    def scrolled(self) -> int:
        """Number of lines that have left the window at the top."""
        return max(0, self.lines - ROWS)


def play() -> str:
    """Run the demo and return its output with colors as ANSI escape codes.

    Raises:
        SystemExit: the demo failed; it has printed the reason to stderr.

    """
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "tests.demo"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=False)
    if done.returncode:
        sys.stdout.write(done.stdout)
        raise SystemExit(f"recording: the demo failed with exit code {done.returncode}")
    return done.stdout


def render(output: str) -> str:
    """Return an SVG that animates the demo's output."""
    text = Text.assemble((PROMPT, "bold"), "\n\n", Text.from_ansi(output.rstrip()))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)
    lines = [part for line in text.split("\n", allow_blank=True) for part in _wrapped(line, console)]
    console.print(Text("\n").join(lines))
    svg = console.export_svg(
        theme=SVG_EXPORT_THEME, code_format=_PARTS, font_aspect_ratio=ASPECT_RATIO, unique_id="demo"
    )
    styles, matrix, width, height = svg.split(_SEPARATOR)
    return _document(styles, _pieces(matrix), float(width), float(height), frames([line.plain for line in lines]))


def _wrapped(line: Text, console: Console) -> Iterator[Text]:
    """Yield a line in parts that fit into the window."""
    first, *rest = line.wrap(console, COLUMNS - len(INDENT)) or [line]
    yield first
    yield from (Text.assemble(INDENT, part) for part in rest)


def _pieces(matrix: str) -> str:
    """Return Rich's text elements, one a line, without line breaks as elements of their own."""
    matrix = re.sub(r"<text [^>]*>\n</text>", "", matrix)
    # Rich clips each element to its line. Stretching the glyphs suffices, and closes the gaps in bars.
    matrix = re.sub(r' clip-path="[^"]*"', ' lengthAdjust="spacingAndGlyphs"', matrix)
    return matrix.replace("&#160;", "\u00a0").replace("</text>", "</text>\n").rstrip()


def frames(lines: Sequence[str]) -> list[Frame]:
    """Return one frame for the prompt, one for the introduction and one for each step."""
    starts = [number for number, line in enumerate(lines) if _STEP.match(line)]
    ends = [2, *starts, len(lines)]
    seconds = [SECONDS_PER_STEP + SECONDS_PER_LINE * (end - start) for start, end in pairwise(ends)]
    seconds[-1] += SECONDS_AT_END
    return [Frame(1, SECONDS_PER_STEP), *map(Frame, ends[1:], seconds)]


def _document(styles: str, matrix: str, width: float, height: float, shown: Sequence[Frame]) -> str:
    seconds = sum(frame.seconds for frame in shown)
    scroll = [(frame.seconds, -frame.scrolled * height - (DESCENT if frame.scrolled else 0)) for frame in shown]
    curtain = [(frame.seconds, frame.lines * height + DESCENT) for frame in shown]
    window, whole = ROWS * height, shown[-1].lines * height
    full_width, full_height = width + 2 * PADDING, window + 2 * PADDING
    background = SVG_EXPORT_THEME.background_color
    color = f"#{background[0]:02x}{background[1]:02x}{background[2]:02x}"
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full_width:g} {full_height:g}" role="img">
<title>A recording of make demo</title>
<style>
text {{ font: 20px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }}
{styles}
#scroll {{ animation: scroll {seconds:g}s step-end infinite }}
#curtain {{ animation: curtain {seconds:g}s step-end infinite }}
{_keyframes("scroll", scroll)}
{_keyframes("curtain", curtain)}
@media (prefers-reduced-motion: reduce) {{ #scroll, #curtain {{ animation: none }} }}
</style>
<rect width="{full_width:g}" height="{full_height:g}" rx="8" fill="{color}"/>
<svg x="{PADDING}" y="{PADDING}" width="{width:g}" height="{window:g}">
<g id="scroll" transform="translate(0 {scroll[-1][1]:g})">
{matrix}
<rect id="curtain" transform="translate(0 {curtain[-1][1]:g})" width="{width:g}" height="{whole:g}" fill="{color}"/>
</g>
</svg>
</svg>
"""


def _keyframes(name: str, moves: Sequence[tuple[float, float]]) -> str:
    """Return a CSS animation of vertical moves, each given by its seconds and its distance in pixels."""
    total, elapsed, rules = sum(seconds for seconds, _ in moves), 0.0, []
    for seconds, distance in moves:
        rules.append(f"{100 * elapsed / total:.2f}% {{ transform: translateY({distance:g}px) }}")
        elapsed += seconds
    return f"@keyframes {name} {{ {' '.join(rules)} }}"


def main(file: Path) -> None:
    """Write the recording to a file."""
    document = render(play())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(document, encoding="utf-8")
    print(f"wrote {file}: {len(document.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
