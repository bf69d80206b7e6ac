"""A kernel in QEMU whose root is the host's file system: changes stay in the guest's memory, and it has no network."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernels.fetch import Kernel
from tests.kernels.initramfs import initramfs

QEMU = "qemu-system-x86_64"
BUSYBOX = "/bin/busybox"
MEMORY = "2048M"
CHECKOUT = Path(__file__).resolve().parents[2]

KERNEL_ARGUMENTS = "console=ttyS0 loglevel=4 panic=-1 mitigations=off"
"""A panic ends QEMU, which runs with -no-reboot."""

INIT = """\
#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do $bb insmod "$module" || echo "cannot load $module"; done
shared=trans=virtio,version=9p2000.L,msize=524288
$bb mount -t 9p -o "$shared,ro,cache=loose" host /lower
$bb mount -t tmpfs tmpfs /upper
$bb mkdir /upper/changes /upper/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work overlay /merged
$bb mount -t proc proc /merged/proc
$bb mount -t sysfs sysfs /merged/sys
$bb mount --move /dev /merged/dev
$bb mkdir -p /merged/dev/shm /merged/dev/pts
$bb mount -t tmpfs tmpfs /merged/dev/shm
$bb mount -t devpts devpts /merged/dev/pts
$bb mount -t tmpfs tmpfs /merged/run
$bb mkdir -p /merged/run/results /merged/run/tmp /merged/lib/modules/{release}
$bb mount -t 9p -o "$shared,cache=none" results /merged/run/results
$bb mount --bind /merged{modules} /merged/lib/modules/{release}
$bb umount /proc
exec $bb switch_root /merged /bin/sh -c {command}
"""

COMMAND = """\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export TMPDIR=/run/tmp PYTHONPATH={checkout} PYTHONHASHSEED=0
cd {checkout} && {python} -m tests.kernels.guest >/run/results/output.txt 2>&1 </dev/null
echo $? >/run/results/status
sync
{busybox} reboot -f
"""


@contextmanager
def booted(kernel: Kernel, results: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Boot a kernel, which runs `tests.kernels.guest`. Yield the process of QEMU, which exits with the guest.

    `results` is an empty directory that the guest can write to, as /run/results. Console output goes to `console.txt`
    in it. QEMU is killed at the end of the block, and with this process.
    """
    archive = results / "initramfs"
    archive.write_bytes(initramfs(_init(kernel), Path(BUSYBOX), kernel.modules))
    command = ["setpriv", "--pdeathsig", "KILL", *_qemu(kernel, archive, results)]
    with (results / "qemu.txt").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _init(kernel: Kernel) -> str:
    command = COMMAND.format(checkout=shlex.quote(str(CHECKOUT)), python=shlex.quote(sys.executable), busybox=BUSYBOX)
    return INIT.format(release=kernel.release, modules=kernel.modules.resolve(), command=shlex.quote(command))


def _qemu(kernel: Kernel, archive: Path, results: Path) -> list[str]:
    # KVM is not used: many virtual machines have none, or one that does not work. Without 5-level page tables, emulated
    # memory accesses are cheaper. A second processor makes the guest slower: most tests wait for one process at a time.
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", "tcg", "-cpu", "max,la57=off", "-smp", "1", "-m", MEMORY),
        *("-kernel", str(kernel.image), "-initrd", str(archive), "-append", KERNEL_ARGUMENTS),
        *("-chardev", f"file,id=console,path={results / 'console.txt'}", "-serial", "chardev:console"),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"local,id=results,path={results},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=results,mount_tag=results"),
    ]
