#!/usr/bin/env bash
# Expected: behind a pooler that gives a session to each transaction, for which statements must not be prepared by name, a client that
#   has not been told so gets an error: a statement that does not exist, or one that exists already.
# Actual: psycopg prepares a statement by itself when it is executed for the sixth time, and calls it `_pg3_0` in each
#   connection. Where two connections have swapped sessions, one executes what the other has prepared under that name: a
#   SELECT returns the rows of the other's query, and a DELETE of the other's table is as possible. There is no error.
# Versions: psycopg 3.3.9 with its binary (PyPI), pgbouncer 1.18.0-1+deb12u1 with `pool_mode = transaction`, postgresql-15 (Debian 12).
#   Newer versions of PgBouncer know of prepared statements, if `max_prepared_statements` is set.
# Why a registry cache must care: records of a private registry that are read or written by another statement are worse than an
#   outage. It must find out that sessions are not its own (`pg_backend_pid()` is not the number that the connection was told,
#   and another connection has the same one), or prepare nothing (`prepare_threshold=None`).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check 'psycopg[binary]==3.3.9'
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download pgbouncer=1.18.0-1+deb12u1 libc-ares2 postgresql-15 libpq5
for package in *.deb; do dpkg -x "$package" root; done
chmod 755 "$work"
mkdir -m 777 own # PostgreSQL does not run as root
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu" BIN="$work/root/usr/lib/postgresql/15/bin"
export POOLER="$work/root/usr/sbin/pgbouncer" DIRECTORY="$work/own" AS=""
[ "$(id -u)" != 0 ] || AS="setpriv --reuid 65534 --regid 65534 --clear-groups"
"$BIN/postgres" --version
"$POOLER" --version | sed -n 1p
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import os
import socket
import subprocess
import sys
import time

import psycopg

print("psycopg", psycopg.__version__)
bin_directory, directory, runas = os.environ["BIN"], os.environ["DIRECTORY"], os.environ["AS"].split()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


database, pooler = free_port(), free_port()
initialize = [f"{bin_directory}/initdb", "-A", "trust", "-U", "registry", "--no-sync", "-D", f"{directory}/data"]
subprocess.run([*runas, *initialize], check=True, capture_output=True)
options = [f"-cport={database}", "-clisten_addresses=127.0.0.1", f"-cunix_socket_directories={directory}", "-cfsync=off"]
with open(f"{directory}/pgbouncer.ini", "w") as file:
    file.write(
        f"[databases]\nregistry = host=127.0.0.1 port={database} dbname=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {pooler}\nauth_type = trust\n"
        f"auth_file = {directory}/users\nunix_socket_dir =\npool_mode = transaction\n"
    )
with open(f"{directory}/users", "w") as file:
    file.write('"registry" ""\n')
logs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
running = [
    subprocess.Popen([*runas, f"{bin_directory}/postgres", "-D", f"{directory}/data", *options], **logs),
    subprocess.Popen([*runas, os.environ["POOLER"], f"{directory}/pgbouncer.ini"], **logs),
]


def connect() -> psycopg.Connection:
    for _ in range(100):
        try:
            return psycopg.connect(f"postgresql://registry@127.0.0.1:{pooler}/registry", autocommit=True)
        except psycopg.OperationalError as error:
            last = error
            time.sleep(0.1)
    raise last


TAGS, BLOBS = "SELECT 'a tag', %s::text", "SELECT 'a blob', %s::text"
try:
    first, second = connect(), connect()
    for _ in range(6):
        assert first.execute(TAGS, ("x",)).fetchone() == ("a tag", "x")
    with first.transaction():  # it keeps its session meanwhile
        first.execute("SELECT 1")
        for _ in range(6):
            assert second.execute(BLOBS, ("x",)).fetchone() == ("a blob", "x")
    answer = second.execute(BLOBS, ("x",)).fetchone()
    first.close()
    second.close()
finally:
    for each in reversed(running):
        each.terminate()
        each.wait(20)
print(f"{BLOBS} is answered {answer}")
print("as stated" if answer == ("a tag", "x") else "CHANGED")
sys.exit(answer != ("a tag", "x"))
PYTHON
