"""Settings of our own process."""

from __future__ import annotations

from pathlib import Path

_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


def set_oom_score_adj(value: int) -> None:
    """Set how readily the kernel ends this process when memory runs out, -1000 (never) to 1000. Raises `OSError`.

    Lowering it takes CAP_SYS_RESOURCE (proc(5)).
    """
    _OOM_SCORE_ADJ.write_text(str(value))
