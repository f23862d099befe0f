"""Writes the tables of ``reference/index.md``: every public name with its signature and its number of parameters.

Run ``python docs/public_api.py`` after a public name or signature was changed. The numbers of release 0.1.0 (commit
caa642a) stand in the page; the script keeps them, and a new name has none.
"""

import inspect
import re
from pathlib import Path

import scalabl_pyro
from scalabl_pyro import data

PAGE = Path(__file__).resolve().parent / "reference" / "index.md"
TABLES = re.compile(r"(<!-- tables of docs/public_api.py -->\n).*?(<!-- end of tables -->)", re.DOTALL)
ROW = re.compile(r"^\| `(?P<name>[\w.]+)` \|.*\| (?P<now>\d+|-) \| (?P<before>\d+|-) \|$", re.MULTILINE)

#: Namespaces in the order of data flow.
NAMESPACES = ("priors", "data", "guides", "distributed", "metrics", "conformal", "plots", "infer", "baselines")


def public_names() -> dict[str, object]:
    """Every public name, without the leading ``scalabl_pyro.``: those of the package first, then each namespace's."""
    found = {name: getattr(scalabl_pyro, name) for name in scalabl_pyro.__all__}
    found = {name: value for name, value in found.items() if not inspect.ismodule(value)}
    for namespace in NAMESPACES:
        module = data if namespace == "data" else getattr(scalabl_pyro, namespace)
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"]
        found |= {f"{namespace}.{name}": getattr(module, name) for name in getattr(module, "__all__", own)}
    return found


class Long:
    """Stands for a default that is too long to show."""

    def __repr__(self) -> str:
        return "..."


def signature(value: object) -> inspect.Signature | None:
    """Signature of a function or of a class's constructor, without types; None for constants and exceptions."""
    is_error = isinstance(value, type) and issubclass(value, BaseException)
    if is_error or not callable(value) or (not inspect.isclass(value) and not inspect.isfunction(value)):
        return None
    full = inspect.signature(value)
    plain = [
        p.replace(
            annotation=p.empty, default=Long() if len(repr(p.default)) > 40 or "<" in repr(p.default) else p.default
        )
        if p.default is not p.empty
        else p.replace(annotation=p.empty)
        for p in full.parameters.values()
    ]
    return full.replace(parameters=plain, return_annotation=inspect.Signature.empty)


def tables(before: dict[str, str]) -> str:
    """A table for the package and for each namespace."""
    parts, names = [], public_names()
    for namespace in ("", *NAMESPACES):
        parts.append(
            f"### {namespace or 'scalabl_pyro'}\n\n| name | call | parameters | in 0.1.0 |\n|---|---|---|---|\n"
        )
        for name, value in names.items():
            if name.rpartition(".")[0] == namespace:
                s = signature(value)
                shown = "" if s is None else str(s)
                now = "-" if s is None else str(len(s.parameters))
                call = f"`{shown}`" if shown else ""
                parts.append(f"| `{name}` | {call} | {now} | {before.get(name, '-')} |\n")
        parts.append("\n")
    return "".join(parts)


def numbers_before(page: str) -> dict[str, str]:
    """Numbers of parameters in release 0.1.0, as the page has them."""
    return {row["name"]: row["before"] for row in ROW.finditer(page)}


def updated(page: str) -> str:
    """The page with tables that show the code."""
    made = tables(numbers_before(page))
    return TABLES.sub(lambda found: f"{found[1]}\n{made}{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
