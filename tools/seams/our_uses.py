"""
What our source uses of vLLM's internals, found in its syntax trees.

It finds names imported from `vllm`; what subclasses of vLLM's classes override, call through `super()` or take from
`self` without defining it; attributes of parameters, variables and attributes annotated with one of vLLM's classes; and
attributes of imported modules and classes, with those assigned to (patches) listed separately. A use of any other form
is not found.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vllm_sources import Function, VllmSources


@dataclass(slots=True)
class Use:
    """
    One name of vLLM's and how we use it.

    Attributes:
        users: Our files, below `src/cascadeinfer`.
        members: What is used of it, with how: `overridden`, `patched` or `used`; what is both is overridden or patched.
    """

    users: set[str] = field(default_factory=set)
    members: dict[str, str] = field(default_factory=dict)

    def add(self, member: str, how: str) -> None:
        """Record that a member is used in this way."""
        if self.members.get(member, "used") == "used":
            self.members[member] = how


def uses_of(folder: Path, vllm: VllmSources) -> dict[str, Use]:
    """All uses in the files below a folder, by `module.name`."""
    found: defaultdict[str, Use] = defaultdict(Use)
    for file in sorted(folder.rglob("*.py")):
        _File(ast.parse(file.read_text()), str(file.relative_to(folder)), vllm, found).read()
    return dict(found)


class _File:
    """One of our files."""

    def __init__(self, tree: ast.Module, name: str, vllm: VllmSources, found: defaultdict[str, Use]) -> None:
        self._tree = tree
        self._name = name
        self._vllm = vllm
        self._found = found
        self._imports: dict[str, str] = {}

    def read(self) -> None:
        """Add the uses of this file."""
        for node in ast.walk(self._tree):
            self._import(node)
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ClassDef):
                self._class(node)
            elif isinstance(node, Function):
                self._annotated(node)
            elif isinstance(node, ast.Attribute):
                self._attribute(node)

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                self._imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._use(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    # `import vllm.x` binds `vllm`, `import vllm.x as y` binds the module.
                    key = alias.name if alias.asname else "vllm"
                    self._imports[alias.asname or "vllm"] = key
                    self._use(key)

    def _attribute(self, node: ast.Attribute) -> None:
        """Of an imported module or class."""
        if isinstance(node.value, ast.Name) and node.value.id in self._imports and node.attr != "__dict__":
            how = "patched" if isinstance(node.ctx, ast.Store) else "used"
            self._use(self._imports[node.value.id]).add(node.attr, how)

    def _use(self, key: str) -> Use:
        self._found[key].users.add(self._name)
        return self._found[key]

    def _class(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self._imports:
                self._subclass(node, self._imports[base.id])
        for name, key in _annotations(ast.walk(node), self._imports):
            for attribute in ast.walk(node):
                if isinstance(attribute, ast.Attribute) and ast.unparse(attribute.value) == f"self.{name}":
                    self._use(key).add(attribute.attr, "used")

    def _subclass(self, node: ast.ClassDef, base: str) -> None:
        """What it overrides, and what it has from its base."""
        own = {method.name for method in node.body if isinstance(method, Function)}
        stored = {n.attr for n in _self_attributes(node) if isinstance(n.ctx, ast.Store)} | _class_variables(node)
        for method in sorted(own):
            if self._vllm.used(base, method) is not None and (method == "__init__" or not method.startswith("__")):
                self._use(base).add(method, "used" if method == "__init__" else "overridden")
        for attribute in _self_attributes(node):
            name = attribute.attr
            inherited = name not in own | stored or self._vllm.used(base, name) is not None
            if inherited and not name.startswith("__"):
                self._use(base).add(name, "used")
        for called in _super_calls(node):
            self._use(base).add(called, "used")

    def _annotated(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        typed = {a.arg: key for a in every if (key := _key_of(a.annotation, self._imports)) is not None}
        typed |= dict(_annotations(ast.walk(function), self._imports))
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in typed:
                self._use(typed[node.value.id]).add(node.attr, "used")


def _class_variables(node: ast.ClassDef) -> set[str]:
    found = set()
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _self_attributes(node: ast.ClassDef) -> Iterator[ast.Attribute]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self":
            yield inner


def _super_calls(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.value, ast.Call)
            and isinstance(inner.value.func, ast.Name)
            and inner.value.func.id == "super"
        ):
            yield inner.attr


def _annotations(nodes: Iterable[ast.AST], imports: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Variables and attributes of `self` that are annotated with one of vLLM's classes."""
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and (key := _key_of(node.annotation, imports)) is not None:
            if isinstance(node.target, ast.Name):
                yield node.target.id, key
            elif isinstance(node.target, ast.Attribute):
                yield node.target.attr, key


def _key_of(annotation: ast.expr | None, imports: dict[str, str]) -> str | None:
    """`T`, `"T"`, `T | None`."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return _key_of(annotation.left, imports) or _key_of(annotation.right, imports)
    return imports.get(annotation.id) if isinstance(annotation, ast.Name) else None
