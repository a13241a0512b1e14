"""The help: commands in groups, and examples."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any

import click

# Of each command, the module of this package that has it in its COMMANDS.
GROUPS = {
    "Run a server": {
        "serve": "serve",
        "check": "check",
        "config": "configuration",
        "doctor": "doctor",
        "health": "health",
        "reload": "moves",
        "user": "users",
        "keys": "keys",
        "policy": "policy",
    },
    "Configure clients": {"setup": "setup"},
    "See what is stored and saved": {
        "ls": "content",
        "show": "content",
        "history": "history",
        "diff": "history",
        "stats": "savings",
        "top": "top",
        "fills": "fills",
        "why": "status",
        "webhooks": "status",
        "extensions": "extensions",
        "audit": "audit",
    },
    "Fetch, keep and delete": {
        "warm": "offline",
        "refresh": "maintenance",
        "pin": "pins",
        "unpin": "pins",
        "pins": "pins",
        "purge": "removal",
        "evict": "removal",
        "scrub": "maintenance",
    },
    "Keep a private registry": {
        "tag": "stores",
        "delete": "stores",
        "collect": "removal",
        "migrate": "moves",
        "backup": "backups",
        "restore": "backups",
    },
    "Move images": {"copy": "copy", "export": "bundles", "import": "bundles"},
    "Prepare for an outage": {"ready": "offline", "drill": "offline", "lock": "lock"},
    "Use the shell": {"completion": "completion"},
}

# Of each command, after the names of its groups, what to type, and what that does.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("entrepot serve", "cache the public registries at 127.0.0.1:5000"),
        ("entrepot serve --store local", "the same, and a private registry"),
        ("entrepot setup docker --write", "have dockerd pull through it"),
        ("entrepot stats", "see what it has saved"),
    ),
    "serve": (
        ("entrepot serve /etc/entrepot.yml", ""),
        ("entrepot serve --listen 0.0.0.0:5000 --disk /data --store local", ""),
        ("entrepot serve --upstream registry.example=https://registry.example", ""),
        ("entrepot serve --set disk.cache_limit=500GiB", ""),
    ),
    "user": (
        ("entrepot user add ann --file /etc/entrepot/users", "asks for the password"),
        ("entrepot user ls", "those of access.htpasswd"),
    ),
    "user add": (
        ("entrepot user add ann", "asks for the password"),
        ("entrepot user add ci --password-stdin <password.txt", "for a script"),
    ),
    "user passwd": (
        ("entrepot user passwd ann", ""),
        ("entrepot user passwd ci --password-stdin <password.txt", ""),
    ),
    "user rm": (("entrepot user rm ann --file /etc/entrepot/users", ""),),
    "user ls": (
        ("entrepot user ls", ""),
        ("entrepot user ls --json --file /etc/entrepot/users", ""),
    ),
    "keys": (
        ("entrepot keys create ci --scope 'repository:local/*:pull' --expires 30d", ""),
        ("entrepot keys list", ""),
    ),
    "keys create": (
        ("entrepot keys create ci --scope 'repository:local/*:pull' --expires 30d", ""),
        ("entrepot keys create edge --locked images.lock", ""),
    ),
    "keys list": (("entrepot keys list", ""),),
    "keys revoke": (("entrepot keys revoke ci", ""),),
    "keys end-tokens": (("entrepot keys end-tokens", "clients log in again"),),
    "check": (("entrepot check entrepot.yml", ""),),
    "config": (
        ("entrepot config show", "what is set, and where"),
        ("entrepot config diff old.yml new.yml", ""),
    ),
    "config schema": (("entrepot config schema", "for an editor"),),
    "config show": (
        ("entrepot config show", "what is set, and where"),
        ("entrepot config show --effective", "with all defaults"),
    ),
    "config diff": (
        ("entrepot config diff old.yml new.yml", ""),
        ("entrepot config diff entrepot.yml", "from a server without a configuration"),
    ),
    "policy": (
        ("entrepot policy check new.yml", "before it is used"),
        ("entrepot policy explain alpine:3", "why it is served, or not"),
    ),
    "policy check": (("entrepot policy check new.yml", ""),),
    "policy test": (("entrepot policy test cases.yml --config new.yml", ""),),
    "policy replay": (("entrepot policy replay new.yml --last 7d", "what it would have refused"),),
    "policy explain": (("entrepot policy explain alpine:3", ""),),
    "policy held": (("entrepot policy held", ""),),
    "policy approve": (("entrepot policy approve alpine:3.20.1@sha256:…", ""),),
    "policy override": (
        ("entrepot policy override alpine:edge --for 2h --reason 'hotfix 4711'", ""),
        ("entrepot policy override alpine:edge --end", ""),
    ),
    "policy overrides": (("entrepot policy overrides", ""),),
    "policy reject": (("entrepot policy reject alpine:3.20.1@sha256:…", ""),),
    "doctor": (
        ("entrepot doctor", "on the server"),
        ("entrepot doctor --client http://cache.example:5000", "on a client"),
    ),
    "health": (
        ("entrepot health", "the exit status is 0 if it serves"),
        ("entrepot health --wait 60s", "also if it is just starting"),
    ),
    "setup": (
        ("entrepot setup containerd --url http://cache.example:5000", "print the files"),
        ("entrepot setup docker --write", "install them"),
        ("entrepot setup docker --remove", "take them out again"),
    ),
    "ls": (
        ("entrepot ls ghcr.io --sort size", "the repositories of a namespace"),
        ("entrepot ls --tags 'alpine:3*'", "the tags that match"),
    ),
    "show": (("entrepot show alpine:3", ""),),
    "history": (("entrepot history alpine:3", ""),),
    "diff": (("entrepot diff alpine:3", "with what it stood for before"),),
    "audit": (("entrepot audit refused ann", "acts with both words"),),
    "migrate": (("entrepot migrate --to shared --dry-run", ""),),
    "backup": (("entrepot backup /mnt/backup", "again: copies only what is new"),),
    "restore": (("entrepot restore /mnt/backup --set disk.path=/data", ""),),
    "reload": (("entrepot reload", ""),),
    "stats": (("entrepot stats --period 7d", ""),),
    "top": (
        ("entrepot top", "until q is typed"),
        ("entrepot top --once --json", "for a script"),
    ),
    "fills": (("entrepot fills --watch", ""),),
    "why": (("entrepot why ghcr.io/team/app:1.2", ""),),
    "webhooks": (("entrepot webhooks", ""),),
    "extensions": (("entrepot extensions", ""),),
    "warm": (
        ("entrepot warm postgres:17 --platform linux/amd64", ""),
        ("entrepot warm --from compose.yml", ""),
    ),
    "refresh": (("entrepot refresh alpine:3", ""),),
    "pin": (("entrepot pin 'alpine:3*' --keep-fresh 1h", ""),),
    "unpin": (("entrepot unpin 'docker.io/library/alpine:3*'", ""),),
    "pins": (("entrepot pins", ""),),
    "purge": (("entrepot purge 'ghcr.io/team/*' --dry-run", ""),),
    "evict": (("entrepot evict --to 200GiB --dry-run", ""),),
    "scrub": (("entrepot scrub --wait", ""),),
    "tag": (("entrepot tag local/team/app:1.2 local/team/app:stable", ""),),
    "delete": (
        ("entrepot delete local/team/app:1.2", ""),
        ("entrepot delete 'local/*:ci-*' --older-than 30d --keep 10 --dry-run", ""),
    ),
    "collect": (("entrepot collect --dry-run", ""),),
    "copy": (("entrepot copy old.example/team/app:1.0 localhost:5000/local/team/app", ""),),
    "export": (("entrepot export images.tar 'docker.io/*' --used-within 30d", ""),),
    "import": (("entrepot import images.tar", ""),),
    "ready": (("entrepot ready compose.yml", ""),),
    "lock": (("entrepot lock compose.yml Dockerfile >images.lock", ""),),
    "completion": (
        ("entrepot completion bash --install", ""),
        ("entrepot completion zsh >~/.zfunc/_entrepot", ""),
    ),
    "drill": (("entrepot drill 10m --namespace docker.io", ""),),
}


class ExplainedCommand(click.Command):
    """A command whose help ends with examples."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(_path(context), formatter)


class ExplainedGroup(click.Group):
    """A group of commands whose help ends with examples."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(_path(context), formatter)


class LazyCommands(UserDict[str, Any]):
    """The commands of GROUPS by name; the module of one is imported when it is asked for.

    So a server does not have the other commands in memory.
    """

    def __init__(self) -> None:
        super().__init__({name: module for group in GROUPS.values() for name, module in group.items()})

    def __getitem__(self, name: str) -> click.Command:
        module = import_module(f"proxy.cli.{super().__getitem__(name)}")
        commands: Iterable[click.Command] = module.COMMANDS
        return next(each for each in commands if each.name == name)


class GroupedCommands(click.Group):
    """The group of all commands, whose help lists them by what they are for."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(width), self.commands[name].get_short_help_str(80)) for name in names]
                )

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples("", formatter)


def _path(context: click.Context) -> str:
    """The name of a command after those of its groups: `user add`."""
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, context.info_name or "")
        context = context.parent
    return " ".join(names)


def _write_examples(name: str, formatter: click.HelpFormatter) -> None:
    if examples := EXAMPLES.get(name):
        with formatter.section("Examples"):
            width = max(len(line) for line, _ in examples)
            for line, purpose in examples:
                space = " " * formatter.current_indent
                formatter.write(f"{space}{line.ljust(width)}  {purpose}".rstrip() + "\n")


command: Callable[..., Callable[[Callable[..., object]], click.Command]] = partial(
    click.command, cls=ExplainedCommand
)
