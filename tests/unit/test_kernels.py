"""tests/kernels: what `make kernels` runs, fetches, boots and reports. The checks themselves take minutes in QEMU."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import fetch as fetching
from tests.kernels.boot import CHECKOUT
from tests.kernels.checks import CHECKS, SELECTED, Check
from tests.kernels.fetch import FetchError, Kernel, fetch
from tests.kernels.initramfs import initramfs, load_order
from tests.kernels.report import Report, Result, table, verdict

CHECK = Check("example", ("traffic.py::test_a", "traffic.py::test_b[x]"), may_lack="no such kernel feature")
TESTS = ["tests/kernel/test_traffic.py::test_a", "tests/kernel/test_traffic.py::test_b[x]"]


# The selection.


def test_every_selected_test_exists_and_belongs_to_one_check() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *SELECTED]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert {sum(check.includes(node_id) for check in CHECKS) for node_id in collected} == {1}
    for own in SELECTED:
        assert any(node_id == own or node_id.startswith(f"{own}[") for node_id in collected), own


def test_a_name_without_brackets_includes_all_variations_and_no_other_test() -> None:
    assert CHECK.includes(TESTS[0])
    assert CHECK.includes(f"{TESTS[0]}[y]")
    assert not CHECK.includes(f"{TESTS[0]}_and_more")
    assert CHECK.includes(TESTS[1])
    assert not CHECK.includes(TESTS[1].replace("x", "y"))


# The report.


def results(*outcomes: tuple[str, str]) -> dict[str, Result]:
    return {name: Result(name, *outcome, 1.5) for name, outcome in zip(TESTS, outcomes, strict=False)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (results(("passed", ""), ("passed", "")), ("ok", ", 2 tests, 3 s")),
        (
            results(("passed", ""), ("failed", "assert 1 == 2")),
            ("FAILED", ", 1 of 2 tests; the first one is test_traffic.py::test_b[x]: assert 1 == 2"),
        ),
        (
            results(("skipped", "no SCTP sockets"), ("passed", "")),
            ("FAILED", ", 1 of 2 tests; the first one is test_traffic.py::test_a: skipped: no SCTP sockets"),
        ),
        (
            results(("skipped", "no such kernel feature: x"), ("skipped", "no SCTP sockets")),
            ("FAILED", ", 1 of 2 tests; the first one is test_traffic.py::test_b[x]: skipped: no SCTP sockets"),
        ),
        (
            results(("skipped", "no such kernel feature: x"), ("passed", "")),
            ("skipped", ", 1 of 2 tests: no such kernel feature: x"),
        ),
        (
            results(("skipped", "no such kernel feature: x"), ("failed", "OSError: 5")),
            ("FAILED", ", 1 of 2 tests; the first one is test_traffic.py::test_b[x]: OSError: 5"),
        ),
        (
            results(("passed", "")),
            ("FAILED", ": the guest stopped before the end of test_traffic.py::test_b[x]"),
        ),
    ],
)
def test_verdict(found: dict[str, Result], expected: tuple[str, str]) -> None:
    assert verdict(CHECK, TESTS, found) == expected


def test_guest_that_does_not_start_fails_every_check() -> None:
    report = Report("sid", "7.2.1")
    lines = report.finish()
    assert len(lines) == len(CHECKS)
    assert lines[0] == f"sid 7.2.1: {CHECKS[0].name}: FAILED: the guest did not start the tests"
    assert not report.passed


def test_each_check_is_reported_once_when_its_last_test_ends() -> None:
    report, lines = Report("sid", "7.2.1"), list[str]()
    assert report.add({"collected": SELECTED}) == []
    for node_id in SELECTED:
        lines += report.add({"test": node_id, "outcome": "passed", "reason": "", "seconds": 1})
    assert [line.split(": ")[1] for line in lines] == [check.name for check in CHECKS]
    assert report.finish() == []
    assert report.passed
    head, rule, row = table([report])
    assert head.startswith("| Kernel | nftables mode |")
    assert row == f"| 7.2.1 (sid) |{' ok |' * len(CHECKS)}"
    assert rule.count("|") == head.count("|")


GUEST_TESTS = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no device")

@pytest.fixture
def ends_badly():
    yield
    raise OSError("busy")

def test_passes(): pass
def test_fails(): assert 1 == 2, "not equal\\nmore"
def test_skips(): pytest.skip("no SCTP sockets\\nmore")
def test_setup(broken): pass
def test_teardown(ends_badly): pass
"""
RUN = """
import sys, pytest
from pathlib import Path
from tests.kernels.guest import Reporter
pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir=.", "test_guest.py"], plugins=[Reporter(Path("results"))])
"""


def test_guest_writes_each_result_with_its_reason_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "test_guest.py").write_text(GUEST_TESTS)
    environment = {"PYTHONPATH": str(CHECKOUT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, check=True)
    first, *others = map(json.loads, (tmp_path / "results").read_text().splitlines())
    names = [f"test_guest.py::test_{name}" for name in ("passes", "fails", "skips", "setup", "teardown")]
    assert first == {"collected": names}
    assert [line["test"] for line in others] == names
    assert [(line["outcome"], line["reason"]) for line in others] == [
        ("passed", ""),
        ("failed", "AssertionError: not equal"),
        ("skipped", "no SCTP sockets"),
        ("failed", "OSError: no device"),
        ("failed", "OSError: busy"),
    ]


# The kernel.


def test_unreachable_mirror_is_reported_in_one_line(tmp_path: Path) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get not found: this is not Debian")
    with pytest.raises(FetchError) as raised:
        fetch("sid", tmp_path, "http://127.0.0.1:1/debian")
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("cannot get the kernel of Debian sid: apt-get --quiet: ")
    assert "127.0.0.1:1" in message
    assert message.endswith("; make kernels needs a Debian mirror, which MIRROR=... selects")


DEPENDS = {
    "linux-image-amd64": "linux-base-amd64 (= 2-1), linux-image-2+deb14-amd64 (= 2-1)",
    "linux-base-amd64": "linux-base-2+deb14-amd64 (= 2-1)",
    "linux-image-2+deb14-amd64": "dracut | initramfs-tools, linux-binary-2+deb14-amd64, linux-modules-2+deb14-amd64",
    "linux-binary-2+deb14-amd64": "linux-base-2+deb14-amd64 (= 2-1)",
    "linux-modules-2+deb14-amd64": "kmod, linux-base-2+deb14-amd64 (= 2-1)",
    "linux-base-2+deb14-amd64": "",
}


class FakeDebian:
    """What apt, dpkg-deb and depmod do for a kernel that is split into packages, as in Debian 14."""

    def __init__(self) -> None:
        self.version = "2-1"
        self.downloaded: list[str] = []

    def __call__(
        self, suite: str, command: tuple[str, ...] | list[str], environment: dict[str, str], cwd: Path | None
    ) -> str:
        program, *rest = command
        if program == "apt-cache":
            return f"Package: {rest[-1]}\nVersion: {self.version}\nDepends: {DEPENDS[rest[-1]]}\n"
        if "download" in rest:
            assert cwd is not None
            self.downloaded += rest[2:]
            for each in rest[2:]:
                (cwd / each.partition("=")[0]).touch()
        if program == "dpkg-deb" and "linux-modules" in rest[-2]:
            modules = Path(rest[-1], "usr/lib/modules/2+deb14-amd64")
            modules.mkdir(parents=True)
            (modules / "vmlinuz").touch()
        return ""


def test_kernel_of_several_packages_is_fetched_once_for_each_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian = FakeDebian()
    monkeypatch.setattr(fetching, "_run", debian)
    modules = tmp_path / "unpacked/lib/modules/2+deb14-amd64"
    expected = Kernel("2+deb14-amd64", modules / "vmlinuz", modules)
    assert fetch("sid", tmp_path) == expected
    names = {each.partition("=")[0] for each in debian.downloaded}
    assert names == {name for name in DEPENDS if "2+deb14" in name}
    assert {each.partition("=")[2] for each in debian.downloaded} == {"2-1"}
    assert fetch("sid", tmp_path) == expected
    assert len(debian.downloaded) == len(names)
    debian.version = "2-2"
    assert fetch("sid", tmp_path) == expected
    assert len(debian.downloaded) == 2 * len(names)


# The initramfs.


def write_modules(folder: Path) -> None:
    paths = {
        "kernel/fs/9p/9p.ko.xz": "kernel/net/9p/9pnet.ko.xz kernel/fs/netfs.ko.xz",
        "kernel/net/9p/9pnet_virtio.ko.xz": "kernel/net/9p/9pnet.ko.xz",
        "kernel/net/9p/9pnet.ko.xz": "",
        "kernel/fs/netfs.ko.xz": "",
        "kernel/fs/overlayfs/overlay.ko": "",
        "kernel/drivers/net/dummy.ko": "",
    }
    (folder / "modules.dep").write_text("".join(f"{path}: {needed}\n" for path, needed in paths.items()))
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content = path.encode()
        (folder / path).write_bytes(lzma.compress(content) if path.endswith(".xz") else content)


def test_modules_are_loaded_after_those_that_they_need(tmp_path: Path) -> None:
    """virtio_pci is built in."""
    write_modules(tmp_path)
    assert load_order(tmp_path) == [
        "kernel/net/9p/9pnet.ko.xz",
        "kernel/net/9p/9pnet_virtio.ko.xz",
        "kernel/fs/netfs.ko.xz",
        "kernel/fs/9p/9p.ko.xz",
        "kernel/fs/overlayfs/overlay.ko",
    ]


def test_cpio_unpacks_the_initramfs(tmp_path: Path) -> None:
    cpio = ["cpio"] if shutil.which("cpio") else ["busybox", "cpio"]
    if shutil.which(cpio[0]) is None:
        pytest.skip("neither cpio nor busybox is installed")
    modules, unpacked, busybox = tmp_path / "modules", tmp_path / "unpacked", tmp_path / "busybox"
    modules.mkdir()
    unpacked.mkdir()
    write_modules(modules)
    busybox.write_bytes(b"an ELF file")
    archive = gzip.decompress(initramfs("#!/bin/busybox sh\n", busybox, modules))
    subprocess.run([*cpio, "-i"], cwd=unpacked, input=archive, capture_output=True, check=True)
    assert (unpacked / "init").read_text() == "#!/bin/busybox sh\n"
    assert (unpacked / "init").stat().st_mode & 0o111
    assert (unpacked / "bin/busybox").read_bytes() == b"an ELF file"
    assert (unpacked / "merged").is_dir()
    contents = [path.read_text() for path in sorted((unpacked / "modules").iterdir())]
    assert contents == load_order(modules)
