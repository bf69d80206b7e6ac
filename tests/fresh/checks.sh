# The checks of fresh.sh, one function each. They run as root in a fresh root file system, in the clone, with `set -eu`.

check_demo() {
    make demo
}

check_test() {
    make test
}

check_short() {
    add_broken_source
    add_user
    missing_packages
    make demo
    make test TESTS="tests/unit/test_docs.py tests/unit/test_iptables_render.py tests/api/test_daemon.py tests/kernel/test_readme.py tests/kernel/test_traffic.py"
}

check_user() {
    add_user
    command=$(missing_packages)
    echo "as root: $command"
    echo 'APT::Get::Assume-Yes "true";' >/etc/apt/apt.conf.d/90-yes # answers apt's prompt
    sh -c "$command" >/dev/null
    as_user "make demo"
    as_user "make test"
}

check_byhand() {
    add_user
    apt-get -qq update
    install sudo $(by_hand | sed -n 's/.*`apt-get install \(.*\)`.*/\1/p')
    echo 'somebody ALL = NOPASSWD: ALL' >/etc/sudoers.d/somebody
    typed '$' >/tmp/ordinary
    # Wait for the server to listen, which takes less time than typing the next command.
    typed '#' | sed '/&$/a until curl --silent --output /dev/null http://192.0.2.10:8080/; do sleep 0.1; done' >/tmp/root
    chmod a+r /tmp/ordinary /tmp/root
    # As on a terminal, each shell reads the input that the previous one left.
    as_user ". /tmp/ordinary" </tmp/root 2>&1 | tee /tmp/output
    [ "$(grep -cx 200 /tmp/output)" -eq 1 ] || stop "the Service was not reached"
    grep -q '^curl: (28)' /tmp/output || stop "the Service was reached after --cleanup"
}

# Make apt-get update fail: add a source that no longer exists, and one that is unreachable.
add_broken_source() {
    echo 'deb file:/nonexistent stable main' >/etc/apt/sources.list.d/gone.list
    echo 'deb http://127.0.0.1:9/debian stable main' >/etc/apt/sources.list.d/unreachable.list
    ! apt-get -qq update 2>/dev/null || stop "apt-get update succeeded despite a broken source"
    rm -rf /var/lib/apt/lists/*
}

add_user() {
    useradd --create-home --shell /bin/bash somebody
    cp -R . /home/somebody/kproxy
    chown -R somebody: /home/somebody/kproxy
}

as_user() { # COMMAND
    su - somebody -c "cd kproxy && $1"
}

# Print the installation command that `make demo` prints for an ordinary user.
missing_packages() {
    ! as_user "make demo" >/tmp/said 2>&1 || stop "make demo succeeded although packages should be missing"
    grep -v '^make: ' /tmp/said >/tmp/lines
    [ "$(wc -l </tmp/lines)" -eq 1 ] || stop "expected one line about missing packages, got: $(cat /tmp/said)"
    grep '^missing packages; install them as root with: apt-get update; apt-get install ' /tmp/lines >/dev/null ||
        stop "the output has no installation command: $(cat /tmp/said)"
    sed 's/.* with: //' /tmp/lines
}

# Print the section "Try it by hand" of docs/local.md.
by_hand() {
    sed -n '/^## Try it by hand$/,/^## Work/p' docs/local.md
}

# Print the commands of that section that follow the given prompt.
typed() { # PROMPT
    by_hand | sed -n "s/^$1 //p"
}

install() { # PACKAGE...
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0 install "$@" >/dev/null
}

stop() {
    echo "fresh: $*" >&2
    exit 1
}
