"""
vLLM's sources, read without importing them: from the installed package or from a wheel of any version.

Names are resolved as Python would: through re-exports (`vllm.config.VllmConfig`), base classes and modules that are
packages. Names that a module creates at run time (`__getattr__`) count as existing.
"""

import ast
import copy
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
DEPTH_MAX = 12
"""Limit on the chain of re-exports and base classes that is followed."""


@dataclass(frozen=True, slots=True)
class Found:
    """A name's definition: its module and its syntax node, None if it is not a function, class or assignment."""

    module: str
    node: ast.AST | None


class VllmSources:
    """The source text of one version of vLLM."""

    def __init__(self, place: Path) -> None:
        """
        Args:
            place: The folder that holds the package `vllm`, or a wheel.
        """
        self._wheel = zipfile.ZipFile(place) if place.is_file() else None
        self._folder = place
        self._files = set(self._wheel.namelist()) if self._wheel else set()
        self._trees: dict[str, ast.Module | None] = {}

    @classmethod
    def installed(cls) -> "VllmSources":
        """The sources of the version installed in this environment."""
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        return cls(Path(spec.origin).parents[1])

    def tree(self, module: str) -> ast.Module | None:
        """A module's syntax tree; None if there is no such module in Python."""
        if module not in self._trees:
            text = self._text(module)
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]

    def _text(self, module: str) -> str | None:
        path = module.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if self._wheel is not None:
                if file in self._files:
                    return self._wheel.read(file).decode()
            elif (self._folder / file).is_file():
                return (self._folder / file).read_text()
        return None

    def used(self, key: str, member: str | None = None) -> Found | None:
        """The definition that a use refers to: `module.name`, or a member of it; None if it does not exist."""
        module, _, name = key.rpartition(".")
        if member is not None:
            return self.member(module, name, member) if module else self.find(key, member)
        return self.find(module, name) if module else Found(key, None)

    def find(self, module: str, name: str, depth: int = 0) -> Found | None:
        """What `from module import name` gives; None if that is an ImportError."""
        tree = self.tree(module)
        if tree is None or depth > DEPTH_MAX:
            return None
        for node in _statements(tree.body):
            if _defines(node, name):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(origin, alias.name, depth + 1) or self._as_module(origin, alias.name)
        if any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
            return self._as_module(module, name) or Found(module, None)
        return self._as_module(module, name)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import in `module` names, relative or not."""
        if node.level == 0:
            return node.module or ""
        parts = module.split(".")
        package = parts if self._is_package(module) else parts[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])

    def _is_package(self, module: str) -> bool:
        file = f"{module.replace('.', '/')}/__init__.py"
        return file in self._files if self._wheel is not None else (self._folder / file).is_file()

    def _as_module(self, module: str, name: str) -> Found | None:
        return Found(f"{module}.{name}", None) if self.tree(f"{module}.{name}") is not None else None

    def member(self, module: str, class_name: str, member: str) -> Found | None:
        """A method, field or instance attribute of a class or of one of its bases; for a module, a name in it."""
        found = self.find(module, class_name)
        if found is None:
            return None
        if found.node is None:
            return self.find(found.module, member)
        if isinstance(found.node, ast.AnnAssign) and isinstance(found.node.annotation, ast.Name):
            return self.member(found.module, found.node.annotation.id, member)  # an instance of that class
        owners = list(self.bases(found))
        for owner in owners:
            assert isinstance(owner.node, ast.ClassDef)
            if (node := _own_member(owner.node, member)) is not None:
                return Found(owner.module, node)
        passes_on = any(_own_member(o.node, "__getattr__") for o in owners if isinstance(o.node, ast.ClassDef))
        return Found(found.module, None) if passes_on else None

    def bases(self, found: Found, depth: int = 0) -> Iterator[Found]:
        """A class and its bases within vLLM, depth first."""
        if not isinstance(found.node, ast.ClassDef) or depth > DEPTH_MAX:
            return
        yield found
        for base in found.node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(target, ast.Name) and (parent := self.find(found.module, target.id)) is not None:
                yield from self.bases(parent, depth + 1)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, including those below `if TYPE_CHECKING`, `try` and the like."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                yield from _statements(getattr(node, field, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _defines(node: ast.AST, name: str) -> bool:
    """Whether a statement defines this name as a function, class or value."""
    if isinstance(node, Function | ast.ClassDef):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _own_member(owner: ast.ClassDef, member: str) -> ast.AST | None:
    """A class's method or field, or an attribute that one of its methods assigns."""
    for node in owner.body:
        if _defines(node, member):
            return node
    for method in owner.body:
        if isinstance(method, Function):
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr == member and isinstance(node.ctx, ast.Store):
                    return node
    return None


def parameters(node: ast.AST | None) -> str | None:
    """The parameters of a function or a class's `__init__`, without annotations; None for anything else."""
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
    if not isinstance(node, Function):
        return None
    arguments = copy.deepcopy(node.args)
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    return ast.unparse(arguments)


def body_hash(node: ast.AST | None) -> str | None:
    """
    A hash of a function's statements without docstring and comments: it
    changes if the behaviour may have changed.
    """
    if not isinstance(node, Function):
        return None
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return hashlib.sha256("\n".join(ast.unparse(statement) for statement in body).encode()).hexdigest()[:12]
